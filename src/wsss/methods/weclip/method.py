"""WeCLIP: a frozen CLIP as the backbone of weakly-supervised segmentation (CVPR 2024).

Idea: CLIP compares an image with texts. The gradient of that comparison, for the classes an image
shows against texts of backgrounds, gives each class a map (Grad-CAM) before anything is learned.
The encoder stays frozen; only a small decoder on the tokens of its blocks learns, from the maps.
The maps are refined by the encoder's attention, and once the decoder knows which patches belong
together, by attention and the decoder's affinity (refinement module, RFM). What the decoder
learns thus improves what it learns from, all in one stage.

Paper: Zhang, Yu, Wei, Zhao, Xiao, "Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic
Segmentation". Official code (read by the authors of our specification, weclip.md, not by us):
zbf1991/WeCLIP ``0f47db4``. Departures: official.py, one switch each.
Several processes: the segmentation loss divides by pixels and the affinity loss by pairs of one
forward pass, officially on one GPU, so the images a pass are part of a run's settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.pseudo_labels import ignore_outside_boxes
from wsss.maps.refine.par import PAR
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.schedules import poly_warmup
from wsss.methods.settings import (
    Count,
    Fraction,
    Layers,
    NotNegative,
    Number,
    Positive,
    Settings,
    Width,
)
from wsss.methods.weclip import maps, tower
from wsss.methods.weclip.affinity import Filter, affinity_loss, near_pairs
from wsss.methods.weclip.decoder import WeCLIPDecoder, affinity
from wsss.methods.weclip.gradcam import Slots, class_slots, unit_range
from wsss.methods.weclip.official import CORRECTED, Quirks
from wsss.methods.weclip.texts import STORED, ClassTexts
from wsss.methods.weclip.tower import Encoded, Normalisation
from wsss.models.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class WeCLIPSettings(Settings):
    """Settings of WeCLIP; the defaults are the paper's for VOC."""

    # optimiser, of the decoder alone
    warmup_steps: Number = 50  # of linear warm-up
    lr: Positive = 2e-4  # base rate
    head_lr_factor: Positive = 10.0  # times lr: the decoder's
    weight_decay: NotNegative = 0.01  # AdamW's, decoupled, on everything

    # texts and CAM
    text: str  # file of text features
    normalisation: Normalisation = "imagenet"  # of the images: Q1, or CLIP's own
    box_threshold: Fraction = 0.4  # of CAM scores inside a box; COCO 0.7
    static_layers: Count = 8  # last blocks whose attention refines before RFM
    rfm_layers: Count = 6  # last blocks among which RFM chooses; COCO 10
    rfm_filter: Filter = "signed"  # how it chooses (Q7)
    # 1-based iteration from which RFM refines, and whether it does in evaluation; None: never.
    # COCO 40,001 (Q8)
    rfm_start: Count | None = 9145
    margin: Fraction = 0.0  # pseudo labels whose two best scores are nearer are 255 (Q11)

    # decoder
    decoder_channels: Width = 256  # d
    decoder_layers: Layers = 3  # blocks of its transformer
    decoder_heads: Layers = 8  # of attention in each block
    dropout: Fraction = 0.1  # of channels of the fused features

    # losses
    radius: Width = 8  # patches between which affinity is learned
    aff_weight: NotNegative = 0.1  # of the affinity loss


class WeCLIP(WSSSModule):
    """A decoder on CLIP's frozen image tower.

    Example:
        >>> backbone = Backbone(name="vit_base_patch16_clip_quickgelu_224", weights="random")
        >>> settings = WeCLIPSettings(max_steps=30000, text="random")
        >>> WeCLIP(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    The map of a class depends on which others are asked for: they compete in one softmax.

    Args:
        backbone: an image tower of CLIP; it is frozen.
        num_classes: K, foreground classes.
        settings: see :class:`WeCLIPSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone is no tower of CLIP or too shallow, or the text features do not
            fit it.
    """

    settings: WeCLIPSettings
    classes_compete = True
    takes_frozen = True
    held_by_checkpoint: Mapping[str, Any] = MappingProxyType({"text": STORED})

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: WeCLIPSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        s = settings
        tower.freeze(backbone, s.text, "weclip")
        tower.check_layers(backbone, static_layers=s.static_layers, rfm_layers=s.rfm_layers)
        self.quirks = self.follow(quirks)

        self.texts = ClassTexts(s.text, num_classes, backbone)
        self.files_sha256 = self.texts.files_sha256
        self.decoder = WeCLIPDecoder(
            dim=backbone.dim,
            num_taps=backbone.depth - 1,
            num_outputs=num_classes + 1,
            width=s.decoder_channels,
            depth=s.decoder_layers,
            num_heads=s.decoder_heads,
            dropout=s.dropout,
        )
        self.par = PAR(num_iter=20)

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride.

        A class's image-level logit is its largest log-odds against the background. Logits of
        images that are no whole number of patches are at the image's size.
        """
        encoded = self.encode(images)
        logits = self.decoder.segment(self.decoder.fused(encoded.taps, encoded.grid))
        class_logits = (logits[:, 1:] - logits[:, :1]).amax((2, 3))
        rest = any(side % self.backbone.patch_size for side in images.shape[-2:])
        if rest and not self.quirks.dropped_remainder:  # Q18
            logits = self.at_pixels(logits, images)
        return Outputs(class_logits, logits)

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give refined maps, stretched to [0, 1], (B, K, H, W); others zero."""
        slots, learned = class_slots(labels), self.settings.rfm_start is not None
        encoded = self.encode(images, layers=self.layers(learned))
        related = affinity(self.decoder.fused(encoded.taps, encoded.grid)) if learned else None
        refined = unit_range(self.refined_maps(encoded, slots, related))  # (B, S, h, w)
        return self.at_pixels(maps.by_class(refined, slots, self.num_classes), images)

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raise WSSSError where the text features are of other classes than the data."""
        self.texts.check(tuple(class_names), self.backbone)

    def fit_to(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's number of background texts."""
        self.texts.fit_to(state, "texts.")

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute segmentation and affinity loss against this step's pseudo labels.

        Args:
            batch: ``image`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end).
            step: decides how maps are refined.
        """
        learned, cut = self.refines_by_decoder(step), self.quirks.dropped_remainder
        # so that a patch, its logits and its label lie on the same pixels in any crop (Q18)
        images = tower.whole_patches(batch["image"], self.backbone.patch_size, cut=cut)
        with self.phase("encoder"):
            encoded = self.encode(images, layers=self.layers(learned))
        with self.phase("forward"):
            fused = self.decoder.fused(encoded.taps, encoded.grid)
            related = affinity(fused)  # R, (B, N, N)
            seg_logits = self.decoder.segment(fused)  # (B, K+1, h, w)
        slots = class_slots(batch["labels"])
        with self.phase("cam"):
            refined = self.refined_maps(encoded, slots, related.detach() if learned else None)
        with self.phase("pseudo_labels"):
            label = self.pseudo_labels(images, refined, slots, batch["box"])
        with self.phase("forward"):
            full = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
            guard = not self.quirks.nan_without_pixels  # Q12
            losses = {"seg_loss": balanced_segmentation_loss(full, label, guard=guard)}
            total = losses["seg_loss"]
            if self.settings.aff_weight > 0:
                pairs = near_pairs(label, encoded.grid, self.settings.radius)
                losses["aff_loss"] = affinity_loss(related, *pairs)
                total = total + self.settings.aff_weight * losses["aff_loss"]
        class_logits = (seg_logits[:, 1:] - seg_logits[:, :1]).amax((2, 3))
        seen = {"refined": refined, "pseudo_label": label, "affinity": related}
        return Step(losses, total, Outputs(class_logits, seg_logits), seen)

    def refines_by_decoder(self, step: int) -> bool:
        """Tell whether RFM refines at a 0-based step."""
        start = self.settings.rfm_start
        return start is not None and step + 1 >= start

    def layers(self, learned: bool) -> int:
        """Give how many last blocks' attention a refinement reads."""
        return self.settings.rfm_layers if learned else self.settings.static_layers

    def param_groups(self) -> list[dict[str, Any]]:
        """Give the decoder; the encoder is frozen."""
        lr = self.settings.lr * self.settings.head_lr_factor
        return [{"name": "decoder", "params": list(self.decoder.parameters()), "lr": lr}]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make AdamW, decay on biases and norms too (Q14)."""
        decay = self.settings.weight_decay
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=decay)

    def lr_multiplier(self, step: int) -> float:
        """Warm up linearly from 1e-6, then 1 - step/max, not rebased (Q14)."""
        s = self.settings
        return poly_warmup(step, max_steps=s.max_steps, warmup_steps=s.warmup_steps, power=1.0)

    # ---- maps ----------------------------------------------------------------------------------

    def encode(self, images: Tensor, *, layers: int = 0) -> Encoded:
        """Run the frozen tower on images (B, 3, H, W); see :func:`tower.encode`."""
        cut, how = self.quirks.dropped_remainder, self.settings.normalisation
        images = tower.whole_patches(images, self.backbone.patch_size, cut=cut)
        images = tower.renormalised(images, how)
        return tower.encode(self.backbone, images, layers=layers, phase=self.phase)

    def at_pixels(self, maps: Tensor, images: Tensor) -> Tensor:
        """Resize maps (B, C, h, w) of the patch grid to the images' size."""
        cut, patch = self.quirks.dropped_remainder, self.backbone.patch_size
        return tower.at_pixels(maps, images.shape[-2:], patch, cut=cut)

    def refined_maps(self, encoded: Encoded, slots: Slots, related: Tensor | None) -> Tensor:
        """Spread each class's Grad-CAM inside its boxes along an affinity of patches.

        Args:
            encoded: with the attention of :meth:`layers`.
            slots: class indices and validity, each (B, S).
            related: the decoder's affinity R (B, N, N), for RFM; None: attention alone.

        Returns:
            (B, S, h, w), zero in empty slots.
        """
        return maps.refined_maps(
            encoded,
            self.texts(),
            slots,
            box_threshold=self.settings.box_threshold,
            layers=self.layers(related is not None),
            related=related,
            rfm_filter=self.settings.rfm_filter,
            of_probability=self.quirks.vanishing_gradient,
            eight_bit=self.quirks.eight_bit_boxes,  # Q6
            open_edge=self.quirks.open_boxes,  # Q5
        )

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, refined: Tensor, slots: Slots, boxes: Tensor) -> Tensor:
        """Give PAR-refined pseudo labels (B, H, W), padding 255."""
        size = (images.shape[-2], images.shape[-1])
        scores = maps.propagated(self.par, images, maps.class_scores(refined, size))
        label = maps.label_maps(scores, slots, margin=self.settings.margin)
        return label if self.quirks.labelled_padding else ignore_outside_boxes(label, boxes)  # Q2
