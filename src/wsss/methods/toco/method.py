"""ToCo: Token Contrast for weakly-supervised semantic segmentation (CVPR 2023).

Idea: deep ViT layers over-smooth, so patch tokens of different objects become alike. An auxiliary
classifier on an intermediate block, where tokens still differ, gives pseudo token relations that
push final patch tokens apart (patch token contrast, PTC); crops of uncertain regions are pulled
towards, crops of background pushed from, the image's class token (class token contrast, CTC).
A decoder learns from the CAMs refined by pixel-adaptive refinement (PAR), all in one stage.

Paper: Ru, Zheng, Zhan, Du, "Token Contrast for Weakly-Supervised Semantic Segmentation".
Official code (read by the authors of our specification, toco.md, not by us): rulixiang/ToCo
``e13514d``. Departures: official.py, one switch each.
Several processes: the losses of classification, CTC and the energy are means over images. PTC
divides by pairs and the segmentation loss by pixels of one forward pass, here as on the official
code's GPUs, so the images a pass are part of a run's settings.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.cams import detached_activation, multiscale_cam
from wsss.maps.pixels import denormalise
from wsss.maps.pseudo_labels import (
    boxes_in_patches,
    refine_cam_to_label,
    roi_mask,
    token_labels,
)
from wsss.maps.refine.par import PAR
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.losses import (
    balanced_segmentation_loss,
    imagenet_energy_loss,
    pair_masks,
    ptc_loss,
)
from wsss.methods.schedules import encoder_and_heads, poly_warmup
from wsss.methods.settings import (
    Fraction,
    NotNegative,
    Number,
    Positive,
    Scales,
    Side,
    ThresholdSettings,
    Width,
)
from wsss.methods.toco.contrast import (
    CTCHead,
    LocalCrops,
    crop_local_views,
    ctc_loss,
)
from wsss.methods.toco.official import CORRECTED, Quirks
from wsss.models.aux_tokens import (
    aux_map,
    encode_with_aux,
    max_pooled_logits,
)
from wsss.models.backbone import Backbone, Features
from wsss.models.decoders import LargeFOV


@dataclass(frozen=True, kw_only=True)
class ToCoSettings(ThresholdSettings):
    """Settings of ToCo; the defaults are the paper's for VOC."""

    # optimiser
    warmup_steps: Number = 1500  # of linear warm-up
    lr: Positive = 6e-5  # of the encoder
    head_lr_factor: Positive = 10.0  # times lr: classifiers, CTC head, decoder
    weight_decay: NotNegative = 0.01  # AdamW's, decoupled, on everything

    # network and maps
    aux_layer: int = -3  # block of the auxiliary classifier; -3: third from last
    decoder_channels: Width = 512  # hidden width of LargeFOV
    decoder_dilation: Width = 5  # reach of its 3x3 convolutions in patches; 5 is for 28 x 28
    local_size: Side = 96  # side of the local crops in pixels
    scales: Scales = (1.0, 0.5, 1.5)  # of the CAM; each with its mirror image
    high_threshold: Fraction = 0.7  # a score above it is foreground
    low_threshold: Fraction = 0.25  # a score up to it is background

    # losses and when they are in force; shares are of the run
    temperature: Positive = 0.5  # of CTC; COCO 1.0
    momentum: Fraction = 0.9  # of the teacher head's moving average
    ptc_weight: NotNegative = 0.2  # of patch token contrast
    ctc_weight: NotNegative = 0.5  # of class token contrast
    seg_weight: NotNegative = 0.1  # of the segmentation loss
    reg_weight: NotNegative = 0.05  # of the dense energy
    contrast_after: Fraction | None = None  # share before PTC and CTC; None: none; COCO 0.15
    seg_after: Fraction = 0.1  # share before segmentation and energy
    aux_labels_until: Fraction | None = None  # share with auxiliary labels; None: none; COCO 0.15
    energy_kernel: Literal["lattice", "gaussian"] = "lattice"  # the official filter, or the exact


class ToCo(WSSSModule):
    """Token contrast on the shared ViT, whose positions are frozen.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> settings = ToCoSettings(max_steps=20000)
        >>> ToCo(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    Args:
        backbone: shared encoder with a class token.
        num_classes: K, foreground classes.
        settings: see :class:`ToCoSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone lacks the class token or the auxiliary block, or its patches are
            larger than a local crop.
    """

    settings: ToCoSettings
    takes_frozen = True

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: ToCoSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        s, depth, patch = settings, backbone.depth, backbone.patch_size
        if not -depth <= s.aux_layer < depth:
            raise WSSSError(f"method.aux_layer={s.aux_layer}: the backbone has {depth} blocks")
        if backbone.num_prefix_tokens == 0:
            raise WSSSError("method=toco contrasts class tokens, and this backbone has none")
        if s.local_size < patch:
            raise WSSSError(
                f"method.local_size={s.local_size}: smaller than one patch of {patch} px"
            )
        self.quirks = self.follow(quirks)
        self.aux_block = s.aux_layer % depth

        dim = backbone.dim
        backbone.vit.pos_embed.requires_grad_(False)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1, bias=False)
        self.aux_classifier = nn.Conv2d(dim, num_classes, kernel_size=1, bias=False)
        self.decoder = LargeFOV(
            in_channels=dim,
            num_outputs=num_classes + 1,
            channels=s.decoder_channels,
            dilation=s.decoder_dilation,
        )
        self.ctc_student, self.ctc_teacher = CTCHead(dim), CTCHead(dim)
        self.ctc_teacher.load_state_dict(self.ctc_student.state_dict())
        self.ctc_teacher.requires_grad_(False)
        self.par = PAR()

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride."""
        tokens = self.backbone(images).patch_map
        return Outputs(self.classify(self.classifier, tokens), self.decoder(tokens))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give multi-scale CAMs of the final tokens, (B, K, H, W) in [0, 1]; others zero."""
        cam, _ = multiscale_cam(self.raw_cams, images, scales=self.settings.scales)
        return cam * labels[..., None, None]

    def raw_cams(self, images: Tensor) -> list[Tensor]:
        """Give activations of final and auxiliary tokens, each (B, K, h, w), before any ReLU."""
        return self.activations(self.encode(images), len(images))

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the six terms of toco.md section 2; those without weight are left out.

        Args:
            batch: ``image`` (B, 3, H, W; input and first global view), ``view2`` (B, 3, H, W),
                ``local_view`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end).
            step: decides the weights of the terms.
        """
        images, labels, boxes = batch["image"], batch["labels"], batch["box"]
        weights, size = self.loss_weights(step), len(images)
        always = self.quirks.zero_weight_terms  # Q4b
        ptc, ctc, seg, reg = (weight > 0 or always for weight in weights.values())
        with self.phase("forward"):
            features = self.encode(torch.cat([images, batch["view2"]]) if ctc else images)
            seen: dict[str, Any] = {"features": features}
            tokens, aux_tokens = features.patch_map[:size], self.aux_map(features)[:size]
            class_logits = self.classify(self.classifier, tokens)
            aux_logits = self.classify(self.aux_classifier, aux_tokens)
            losses = {
                "cls_loss": F.multilabel_soft_margin_loss(class_logits, labels),
                "cls_aux_loss": F.multilabel_soft_margin_loss(aux_logits, labels),
            }
        if ptc or ctc or seg or reg:
            with self.phase("cam"), torch.no_grad():
                own, scales = self.activations(features, size), self.settings.scales
                cam, cam_aux = multiscale_cam(self.raw_cams, images, scales=scales, scale_one=own)
            seen |= {"cam": cam, "cam_aux": cam_aux}
        if ptc:
            seen["token_label"] = self.token_labels(cam_aux, labels, boxes, features.grid)
            with self.phase("forward"):
                same, different = pair_masks(seen["token_label"])
                if self.quirks.half_without_pairs or bool((same | different).any()):  # Q5
                    losses["ptc_loss"] = ptc_loss(tokens, same, different)
        if ctc:
            seen["local"] = self.local_crops(batch["local_view"], cam_aux, labels)
            with self.phase("forward"):
                if self.first_of_step:  # also where gradients are accumulated
                    self.update_teacher()
                losses["ctc_loss"] = self.class_token_contrast(features, seen["local"])
        seg_logits = None
        if seg or reg:
            with self.phase("pseudo_labels"):
                source = cam_aux if self.labels_from_aux(step) else cam
                seen["pseudo_label"] = self.pseudo_labels(images, source, labels, boxes)
            with self.phase("forward"):
                seg_logits = self.decoder(tokens)  # (B, K+1, h, w)
                full = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
        if seg:
            label, guard = seen["pseudo_label"], not self.quirks.nan_without_pixels  # Q4
            with self.phase("forward"):
                losses["seg_loss"] = balanced_segmentation_loss(full, label, guard=guard)
        if reg:
            with self.phase("energy"):
                losses["reg_loss"] = self.energy(images, full, seen["pseudo_label"], boxes)
        total = losses["cls_loss"] + losses["cls_aux_loss"]
        total = sum((w * losses[name] for name, w in weights.items() if name in losses), total)
        return Step(losses, total, Outputs(class_logits, seg_logits), seen)

    def loss_weights(self, step: int) -> dict[str, float]:
        """Give weights of the last four terms at a 0-based step (toco.md section 2, the table)."""
        s = self.settings
        contrast = s.contrast_after is None or step > round(s.contrast_after * s.max_steps)
        seg = step > round(s.seg_after * s.max_steps)
        return {
            "ptc_loss": s.ptc_weight * contrast,
            "ctc_loss": s.ctc_weight * contrast,
            "seg_loss": s.seg_weight * seg,
            "reg_loss": s.reg_weight * seg,
        }

    def labels_from_aux(self, step: int) -> bool:
        """Tell whether pseudo labels come from the auxiliary CAM at a 0-based step."""
        until = self.settings.aux_labels_until
        return until is not None and step <= round(until * self.settings.max_steps)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher before it is asked, by the moving average t <- m t + (1 - m) s."""
        momentum = self.settings.momentum
        pairs = zip(self.ctc_teacher.parameters(), self.ctc_student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.mul_(momentum).add_(student, alpha=1 - momentum)

    def param_groups(self) -> list[dict[str, Any]]:
        """Give encoder, its norms, heads and decoder."""
        lr, head_lr = self.settings.lr, self.settings.lr * self.settings.head_lr_factor
        heads = nn.ModuleList([self.classifier, self.aux_classifier, self.ctc_student])
        return encoder_and_heads(self.backbone, lr, head_lr, heads=heads, decoder=self.decoder)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make AdamW, decay on biases and norms too (toco.md section 4)."""
        decay = self.settings.weight_decay
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=decay)

    def lr_multiplier(self, step: int) -> float:
        """Warm up linearly from 1e-6, then (1 - step/max)^0.9, not rebased."""
        s = self.settings
        return poly_warmup(step, max_steps=s.max_steps, warmup_steps=s.warmup_steps)

    # ---- tokens --------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Features:
        """Give features of images (B, 3, H, W), with the tokens of the auxiliary block."""
        return encode_with_aux(self.backbone, images, self.aux_block)

    def aux_map(self, features: Features) -> Tensor:
        """Give tokens of the auxiliary block as a map (B, D, h, w); they are not normed (Q8)."""
        return aux_map(features, self.aux_block)

    @staticmethod
    def classify(classifier: nn.Conv2d, tokens: Tensor) -> Tensor:
        """Take the channel-wise maximum over tokens (B, D, h, w), then the linear map: (B, K)."""
        return max_pooled_logits(classifier, tokens)

    def activations(self, features: Features, size: int) -> list[Tensor]:
        """Give raw final and auxiliary CAMs (B, K, h, w), detached, of ``size`` images."""
        pairs = (
            (features.patch_map, self.classifier.weight),
            (self.aux_map(features), self.aux_classifier.weight),
        )
        return [detached_activation(tokens[:size], weight) for tokens, weight in pairs]

    # ---- targets -------------------------------------------------------------------------------

    @torch.no_grad()
    def token_labels(
        self, cam_aux: Tensor, labels: Tensor, boxes: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Label the tokens (B, h, w): class + 1, 0 background, 255 uncertain or padding."""
        if not self.quirks.box_in_pixels:  # Q1: only tokens that lie wholly on real pixels
            boxes = boxes_in_patches(boxes, self.backbone.patch_size)
        high, low = self.settings.high_threshold, self.settings.low_threshold
        return token_labels(cam_aux, labels, grid, boxes, high=high, low=low)

    def local_crops(self, local_view: Tensor, cam_aux: Tensor, labels: Tensor) -> LocalCrops:
        """Draw crops for CTC where the auxiliary CAM (B, K, H, W) is not sure of foreground."""
        s = self.settings
        roi = roi_mask(cam_aux, labels, high=s.high_threshold, low=s.low_threshold)
        return crop_local_views(local_view, roi, s.local_size)

    def class_token_contrast(self, features: Features, local: LocalCrops) -> Tensor:
        """Give CTC between the class tokens of the global views and of the local crops."""
        global_cls = features.cls_tokens[:, 0]  # (2B, D), [input, view 2]
        local_cls = self.backbone(local.crops.flatten(0, 1)).cls_tokens[:, 0]  # (8B, D)
        student = self.ctc_student(torch.cat([global_cls, local_cls]))
        with torch.no_grad():
            teacher = self.ctc_teacher(global_cls)
        return ctc_loss(student, teacher, local.flags, self.settings.temperature)

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Give PAR-refined pseudo labels (B, H, W), 255 where undecided or padded."""
        s = self.settings
        high, low, guide = s.high_threshold, s.low_threshold, self.guide(images)
        return refine_cam_to_label(self.par, guide, cam, labels, boxes=boxes, high=high, low=low)

    def guide(self, images: Tensor) -> Tensor:
        """Give the images (B, 3, H, W) as PAR sees them: whole grey levels over 255."""
        pixels = denormalise(images)
        pixels = pixels.trunc() if self.quirks.truncated_guide else pixels.round()
        return pixels.clamp(0, 255) / 255

    def energy(self, images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the gated dense-CRF energy of the prediction (toco.md section 2, "Reg")."""
        return imagenet_energy_loss(images, logits, label, boxes, self.settings.energy_kernel)
