"""ToCo: Token Contrast for weakly-supervised semantic segmentation (CVPR 2023).

Idea: deep ViT layers over-smooth, so patch tokens of different objects become alike. An auxiliary
classifier on an intermediate block, where tokens still differ, gives pseudo token relations that
push final patch tokens apart (patch token contrast, PTC); crops of uncertain regions are pulled
towards, crops of background pushed from, the image's class token (class token contrast, CTC).
A decoder learns from the CAMs refined by pixel-adaptive refinement (PAR), all in one stage.

Paper: Ru, Zheng, Zhan, Du, "Token Contrast for Weakly-Supervised Semantic Segmentation".
Official code (read by the authors of our specification, not by us): rulixiang/ToCo ``e13514d``.
Names Q1-Q9 are the numbered quirks of that specification.

Departures (``official_compat=True`` takes each of them back):
    * Q1: the crop box is scaled to the token grid before it masks token labels; the official code
      applies pixel coordinates to the 28 x 28 grid.
    * Q2, Q3: views and box share one flip decision (in ``wsss.data.views.toco.ToCoViews``).
    * Q4: a batch without background or without foreground pixels gives that half of the
      segmentation loss the value 0, not NaN.
    * Q4b: terms of zero weight are not computed, so the decoder (on COCO the CTC student, too) has
      no gradient during warm-up; officially it has a zero gradient, hence AdamW decays it from the
      first step.
    * Q5: without a single token pair PTC is 0, not 0.5.
    * The image for PAR is rounded to integers, not truncated.
Same numbers, less work (always): one encoder pass serves the input, both global views and the
unflipped CAM of scale 1; the decoder is not run for CAMs; PAR's affinity is computed once for both
thresholds; CTC is a closed form; attention is fused.
Several processes: the losses of classification, CTC and the energy are means over images. PTC
divides by pairs and the segmentation loss by pixels of one forward pass, here as on the official
code's GPUs, so the images a pass are part of a run's settings.
Kept as official: the learning rate jumps after warm-up (the polynomial is not rebased), CTC's
second logarithm and same-view pairs (Q6), the teacher is a head only (Q7), auxiliary tokens are not
normed (Q8). Nothing here corresponds to Q9 (bugs of the official evaluation scripts), nor to its
GPUs' shared augmentation streams: every place in the global batch has random draws of its own.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.cams import class_activation, multiscale_cam
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise
from wsss.maps.pseudo_labels import (
    cam_to_label_with_ignore,
    ignore_outside_boxes,
    refine_cam_to_label,
    roi_mask,
)
from wsss.maps.refine.par import PAR
from wsss.methods.base import (
    Batch,
    Outputs,
    WSSSModule,
    check_not_negative,
    check_positive,
    check_thresholds,
)
from wsss.methods.losses import balanced_segmentation_loss, dense_energy_loss
from wsss.methods.schedules import poly_warmup
from wsss.methods.toco.contrast import (
    CTCHead,
    LocalCrops,
    crop_local_views,
    ctc_loss,
    pair_masks,
    ptc_loss,
)
from wsss.models.backbone import Backbone, Features
from wsss.models.decoders import LargeFOV


class LossWeights(NamedTuple):
    """Weights of the four terms beside the two classification losses."""

    ptc: float
    ctc: float
    seg: float
    reg: float


class StepResult(NamedTuple):
    """Losses of a step and the targets behind them; None or absent where nothing needed them."""

    losses: dict[str, Tensor]
    total: Tensor
    outputs: Outputs
    features: Features
    cam: Tensor | None = None
    cam_aux: Tensor | None = None
    token_label: Tensor | None = None
    pseudo_label: Tensor | None = None
    local: LocalCrops | None = None


class ToCo(WSSSModule):
    """Token contrast on the shared ViT.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> ToCo(backbone=backbone, num_classes=20, max_steps=20000).num_classes
        20

    Args:
        backbone: shared encoder; its positions are frozen.
        num_classes: K, foreground classes.
        max_steps: optimiser steps of the run.
        warmup_steps: steps of linear warm-up (1500 of VOC's 20,000).
        lr: learning rate of the encoder; all heads take ``head_lr_factor`` times as much.
        head_lr_factor: see ``lr``.
        weight_decay: AdamW's decoupled decay, on everything.
        aux_layer: index into the block outputs for the auxiliary classifier (-3: third from last;
            the last entry is the output of the final norm).
        decoder_channels: hidden width of LargeFOV.
        decoder_dilation: reach of its 3x3 convolutions in patches; 5 is for maps of 28 x 28.
        local_size: side of the local crops in pixels.
        scales: scales of the multi-scale CAM; each with its mirror image.
        high_threshold: score above which a pixel is foreground.
        low_threshold: score up to which a pixel is background.
        temperature: of CTC; 0.5 VOC, 1.0 COCO.
        momentum: of the teacher head's moving average.
        ptc_weight: lambda of PTC.
        ctc_weight: lambda of CTC.
        seg_weight: lambda of the segmentation loss.
        reg_weight: lambda of the dense energy.
        contrast_after: fraction of the run after which PTC and CTC start; None: from the first
            step (VOC); 0.15 for COCO.
        seg_after: fraction of the run after which segmentation and energy start (0.1).
        aux_labels_until: fraction of the run during which pseudo labels come from the auxiliary
            CAM; None: never (VOC); 0.15 for COCO.
        energy_kernel: ``lattice`` (the official filter) or ``gaussian`` (exact; about twice as
            large, so it is halved to keep the weight's meaning).
        official_compat: reproduce the official numerics, bugs included.
    """

    #: PAR's affinity serves both thresholds; the benchmark turns it off to show the saving
    share_affinity = True

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        max_steps: int,
        warmup_steps: int = 1500,
        lr: float = 6e-5,
        head_lr_factor: float = 10.0,
        weight_decay: float = 0.01,
        aux_layer: int = -3,
        decoder_channels: int = 512,
        decoder_dilation: int = 5,
        local_size: int = 96,
        scales: Sequence[float] = (1.0, 0.5, 1.5),
        high_threshold: float = 0.7,
        low_threshold: float = 0.25,
        temperature: float = 0.5,
        momentum: float = 0.9,
        ptc_weight: float = 0.2,
        ctc_weight: float = 0.5,
        seg_weight: float = 0.1,
        reg_weight: float = 0.05,
        contrast_after: float | None = None,
        seg_after: float = 0.1,
        aux_labels_until: float | None = None,
        energy_kernel: Literal["lattice", "gaussian"] = "lattice",
        official_compat: bool = False,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, max_steps=max_steps)
        if not -backbone.depth <= aux_layer < backbone.depth:
            raise WSSSError(
                f"method.aux_layer={aux_layer}: the backbone has {backbone.depth} blocks"
            )
        if backbone.num_prefix_tokens == 0:
            raise WSSSError("method=toco contrasts class tokens, and this backbone has none")
        check_thresholds(low=low_threshold, high=high_threshold)
        check_positive(
            lr=lr, scales=scales, head_lr_factor=head_lr_factor, decoder_channels=decoder_channels
        )
        check_not_negative(
            weight_decay=weight_decay,
            ptc_weight=ptc_weight,
            ctc_weight=ctc_weight,
            seg_weight=seg_weight,
            reg_weight=reg_weight,
        )
        if local_size < backbone.patch_size:
            raise WSSSError(
                f"method.local_size={local_size}: smaller than one patch of "
                f"{backbone.patch_size} px"
            )
        self.weights = LossWeights(ptc_weight, ctc_weight, seg_weight, reg_weight)
        if min(self.weights) < 0:  # would pass for a weight of zero
            raise WSSSError(
                "method: expected ptc_weight, ctc_weight, seg_weight and reg_weight >= 0, got "
                f"{list(self.weights)}"
            )
        if not 0 <= momentum <= 1 or temperature <= 0:
            raise WSSSError(
                f"method: expected 0 <= momentum <= 1 and temperature > 0, got {momentum} and "
                f"{temperature}"
            )
        self.warmup_steps, self.lr, self.head_lr_factor = warmup_steps, lr, head_lr_factor
        self.weight_decay = weight_decay
        self.aux_block = aux_layer % backbone.depth
        self.local_size, self.scales = local_size, tuple(scales)
        self.high_threshold, self.low_threshold = high_threshold, low_threshold
        self.temperature, self.momentum = temperature, momentum
        self.contrast_after, self.seg_after = contrast_after, seg_after
        self.aux_labels_until = aux_labels_until
        self.energy_kernel: Literal["lattice", "gaussian"] = energy_kernel
        self.official_compat = official_compat

        backbone.vit.pos_embed.requires_grad_(False)
        self.classifier = nn.Conv2d(backbone.dim, num_classes, kernel_size=1, bias=False)
        self.aux_classifier = nn.Conv2d(backbone.dim, num_classes, kernel_size=1, bias=False)
        self.decoder = LargeFOV(
            in_channels=backbone.dim,
            num_outputs=num_classes + 1,
            channels=decoder_channels,
            dilation=decoder_dilation,
        )
        self.ctc_student = CTCHead(backbone.dim)
        self.ctc_teacher = CTCHead(backbone.dim)
        self.ctc_teacher.load_state_dict(self.ctc_student.state_dict())
        self.ctc_teacher.requires_grad_(False)
        self.par = PAR()

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride."""
        features = self.backbone(images)
        return Outputs(
            self._classify(self.classifier, features.patch_map), self.decoder(features.patch_map)
        )

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Multi-scale CAMs of the final tokens, (B, K, H, W) in [0, 1]; absent classes zero."""
        cam, _ = multiscale_cam(self.raw_cams, images, scales=self.scales)
        return cam * labels[..., None, None]

    def raw_cams(self, images: Tensor) -> list[Tensor]:
        """Class activations of final and auxiliary tokens, each (B, K, h, w), before any ReLU."""
        return self._raw_cams(self._encode(images), len(images))

    # ---- training ----------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of toco.md section 2; see :meth:`compute_losses`."""
        # once an optimiser step, also where gradients are accumulated
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        with self.own_draws(batch_idx, enabled=not self.official_compat):
            result = self.compute_losses(batch, self.global_step, move_teacher=first)
        if not self.official_compat:
            self.require_finite(result.losses, result.total, batch)
        self.log_losses(result.losses, result.total, len(batch["image"]))
        return result.total

    def compute_losses(self, batch: Batch, step: int, *, move_teacher: bool = True) -> StepResult:
        """All losses of a batch at a 0-based optimiser step.

        Args:
            batch: ``image`` (B, 3, H, W; input and first global view), ``view2`` (B, 3, H, W),
                ``local_view`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end).
            step: decides the weights of the terms.
            move_teacher: let the teacher head follow the student first.
        """
        images, labels, boxes = batch["image"], batch["labels"], batch["box"]
        weights = self.loss_weights(step)
        ptc, ctc, seg, reg = (weight > 0 or self.official_compat for weight in weights)
        size = len(images)

        with self.phase("forward"):
            features = self._encode(torch.cat([images, batch["view2"]]) if ctc else images)
            tokens = features.patch_map[:size]  # (B, D, h, w)
            aux_tokens = self._aux_map(features)[:size]
            class_logits = self._classify(self.classifier, tokens)
            losses = {
                "cls_loss": F.multilabel_soft_margin_loss(class_logits, labels),
                "cls_aux_loss": F.multilabel_soft_margin_loss(
                    self._classify(self.aux_classifier, aux_tokens), labels
                ),
            }
        total = losses["cls_loss"] + losses["cls_aux_loss"]
        if not (ptc or ctc or seg or reg):
            return StepResult(losses, total, Outputs(class_logits, None), features)

        with self.phase("cam"), torch.no_grad():
            own = self._raw_cams(features, size)
            cam, cam_aux = multiscale_cam(self.raw_cams, images, scales=self.scales, scale_one=own)
        token_label = pseudo_label = seg_logits = local = None
        if ptc:
            token_label = self._token_labels(cam_aux, labels, boxes, features.grid)
            with self.phase("forward"):
                same, different = pair_masks(token_label)
                if self.official_compat or bool((same | different).any()):
                    losses["ptc_loss"] = ptc_loss(tokens, same, different)
                    total = total + weights.ptc * losses["ptc_loss"]
        if ctc:
            local = self.local_crops(batch["local_view"], cam_aux, labels)
            with self.phase("forward"):
                if move_teacher:
                    self.update_teacher()
                losses["ctc_loss"] = self._class_token_contrast(features, local)
                total = total + weights.ctc * losses["ctc_loss"]
        if seg or reg:
            with self.phase("pseudo_labels"):
                source = cam_aux if self._labels_from_aux(step) else cam
                pseudo_label = self._pseudo_labels(images, source, labels, boxes)
            with self.phase("forward"):
                seg_logits = self.decoder(tokens)
                full = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
            if seg:
                with self.phase("forward"):
                    losses["seg_loss"] = balanced_segmentation_loss(
                        full, pseudo_label, guard=not self.official_compat
                    )
                    total = total + weights.seg * losses["seg_loss"]
            if reg:
                with self.phase("energy"):
                    losses["reg_loss"] = self._energy(images, full, pseudo_label, boxes)
                    total = total + weights.reg * losses["reg_loss"]
        outputs = Outputs(class_logits, seg_logits)
        return StepResult(
            losses, total, outputs, features, cam, cam_aux, token_label, pseudo_label, local
        )

    def loss_weights(self, step: int) -> LossWeights:
        """Weights in force at a 0-based step (toco.md section 2, the table)."""
        contrast = self.contrast_after is None or step > round(self.contrast_after * self.max_steps)
        seg = step > round(self.seg_after * self.max_steps)
        return LossWeights(
            self.weights.ptc * contrast,
            self.weights.ctc * contrast,
            self.weights.seg * seg,
            self.weights.reg * seg,
        )

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moving average of the CTC head, before the teacher is asked: t <- m t + (1 - m) s."""
        pairs = zip(self.ctc_teacher.parameters(), self.ctc_student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.mul_(self.momentum).add_(student, alpha=1 - self.momentum)

    def param_groups(self) -> list[dict[str, Any]]:
        """Encoder, its norms (same values, apart as officially), classifiers with CTC, decoder."""
        encoder = list(self.backbone.named_parameters())
        heads = [self.classifier, self.aux_classifier, self.ctc_student]
        head_lr = self.lr * self.head_lr_factor
        return [
            {
                "name": "encoder",
                "params": [p for n, p in encoder if "norm" not in n],
                "lr": self.lr,
            },
            {"name": "norms", "params": [p for n, p in encoder if "norm" in n], "lr": self.lr},
            {
                "name": "heads",
                "params": [p for head in heads for p in head.parameters()],
                "lr": head_lr,
            },
            {"name": "decoder", "params": list(self.decoder.parameters()), "lr": head_lr},
        ]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW, decay on biases and norms too (toco.md section 4)."""
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=self.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """Linear warm-up from 1e-6, then (1 - step/max)^0.9, not rebased."""
        return poly_warmup(step, max_steps=self.max_steps, warmup_steps=self.warmup_steps)

    # ---- pieces --------------------------------------------------------------------------------

    def _encode(self, images: Tensor) -> Features:
        # the last "intermediate" is the normed output, so it needs no tap
        last = self.aux_block == self.backbone.depth - 1
        return self.backbone(images, taps=() if last else (self.aux_block,))

    def _aux_map(self, features: Features) -> Tensor:
        tokens = features.intermediates.get(self.aux_block, features.patch_tokens)
        return features.as_map(tokens)

    @staticmethod
    def _classify(classifier: nn.Conv2d, tokens: Tensor) -> Tensor:
        """Channel-wise maximum over tokens (B, D, h, w), then the linear map: (B, K)."""
        return classifier(F.adaptive_max_pool2d(tokens, 1)).flatten(1)

    def _raw_cams(self, features: Features, size: int) -> list[Tensor]:
        """Raw CAMs, detached, of the first ``size`` images."""
        return [
            class_activation(features.patch_map[:size].detach(), self.classifier.weight.detach()),
            class_activation(
                self._aux_map(features)[:size].detach(), self.aux_classifier.weight.detach()
            ),
        ]

    @torch.no_grad()
    def _token_labels(
        self, cam_aux: Tensor, labels: Tensor, boxes: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Labels (B, h, w) of the tokens: class + 1, 0 background, 255 uncertain or padding."""
        small = F.interpolate(cam_aux, size=grid, mode="bilinear", align_corners=False)
        label = cam_to_label_with_ignore(
            small, labels, high=self.high_threshold, low=self.low_threshold
        )
        if not self.official_compat:  # Q1: only tokens that lie wholly on real pixels
            patch = self.backbone.patch_size
            start = (boxes[:, 0::2] + patch - 1).div(patch, rounding_mode="floor")
            end = boxes[:, 1::2].div(patch, rounding_mode="floor")
            boxes = torch.stack([start[:, 0], end[:, 0], start[:, 1], end[:, 1]], dim=1)
        return ignore_outside_boxes(label, boxes)

    def local_crops(self, local_view: Tensor, cam_aux: Tensor, labels: Tensor) -> LocalCrops:
        """Crops for CTC, drawn where the auxiliary CAM (B, K, H, W) is not sure of foreground."""
        roi = roi_mask(cam_aux, labels, high=self.high_threshold, low=self.low_threshold)
        return crop_local_views(local_view, roi, self.local_size)

    def _class_token_contrast(self, features: Features, local: LocalCrops) -> Tensor:
        """CTC between the class tokens of the global views and of the local crops."""
        global_cls = features.cls_tokens[:, 0]  # (2B, D), [input, view 2]
        local_cls = self.backbone(local.crops.flatten(0, 1)).cls_tokens[:, 0]  # (8B, D)
        student = self.ctc_student(torch.cat([global_cls, local_cls]))
        with torch.no_grad():
            teacher = self.ctc_teacher(global_cls)
        return ctc_loss(student, teacher, local.flags, self.temperature)

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """PAR-refined pseudo labels (B, H, W), 255 where undecided or padded."""
        pixels = denormalise(images)
        pixels = pixels.trunc() if self.official_compat else pixels.round()
        return refine_cam_to_label(
            self.par,
            pixels.clamp(0, 255) / 255,
            cam,
            labels,
            boxes=boxes,
            high=self.high_threshold,
            low=self.low_threshold,
            share_affinity=self.share_affinity,
        )

    def _energy(self, images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Gated dense-CRF energy of the prediction (toco.md section 2, "Reg")."""
        return dense_energy_loss(
            images,
            logits,
            label,
            boxes,
            kernel=self.energy_kernel,
            gaussian_scale=0.5,  # lattice / exact is 0.47-0.57: keeps the weight's meaning
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    def _labels_from_aux(self, step: int) -> bool:
        if self.aux_labels_until is None:
            return False
        return step <= round(self.aux_labels_until * self.max_steps)
