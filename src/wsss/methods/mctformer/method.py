"""MCTformer+: one class token per class, each unlike the others, finds its patches (TPAMI 2024).

Idea: a ViT with one class token per class. What the token of a class attends to is a map of that
class; a convolution over the final patch tokens gives a second one, PatchCAM, which is pooled by
rank, so that high responses count more than a mean would let them. Tokens of different classes are
made unlike by a contrast between them (CCT) after every block. The two maps are fused by their
geometric mean and spread along what patches attend to. There is no decoder: the maps, summed over
scales and mirror images, become pseudo labels (``wsss pseudo``) of a segmenter's training.

Paper: Xu et al., "MCTformer+", arXiv 2308.03005. Official code (read by the authors of our
specification, mctformer.md, not by us): upstream ``0acc27a``. Departures: official.py, one switch
each.
Several processes: all three losses are means over images, the same for any quotient.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.cams import normalise_cam
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.losses import full_precision, widened
from wsss.methods.mctformer import maps, network
from wsss.methods.mctformer.contrast import class_token_contrast
from wsss.methods.mctformer.network import Attention, Encoded
from wsss.methods.mctformer.official import CORRECTED, Quirks
from wsss.methods.schedules import cosine_warmup, decayed_or_not
from wsss.methods.settings import (
    BelowOne,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Scales,
    Settings,
    Side,
)
from wsss.models.backbone import Backbone
from wsss.models.class_tokens import require_one_class_token, whole_patches

# parameters that take ``head_lr_factor``; class tokens too, which have to part
NOT_PRETRAINED = re.compile(r"cls_token|^patch_head")
TOKENS, POSITIONS = "backbone.vit.cls_token", "backbone.vit.pos_embed"
# what the gallery calls the parts of a map
SHEETS = {"mct": "class attention", "patchcam": "PatchCAM", "fused": "fused"}


@dataclass(frozen=True, kw_only=True)
class MCTformerPlusSettings(Settings):
    """Settings of MCTformer+; the defaults are the paper's for VOC."""

    # optimiser
    epochs: Count = 45  # equal parts of the run, in which the schedule counts
    lr: Positive = 3.125e-5  # base rate; officially 5e-4 x batch / 512
    head_lr_factor: Positive = 1.0  # times lr: what pretraining does not give, class tokens too
    warmup_epochs: NotNegative = 5.0  # of linear warm-up
    warmup_lr: NotNegative = 1e-6  # rate at which the warm-up begins
    min_lr: NotNegative = 1e-5  # rate at which the cosine ends
    weight_decay: NotNegative = 0.05  # AdamW's, of weights of two and more dimensions

    # network
    input_size: Side = 448  # side of a training crop in pixels, whose grid has the positions
    # deviation of normal noise that parts the class tokens at the start; copies of one part through
    # their targets alone, and CCT has no gradient before (Q3)
    token_noise: NotNegative = 0.0
    drop_path: BelowOne = 0.1  # rate of the last block, rising linearly from 0
    pooling_decay: Fraction = 0.996  # weight of a rank over that before; 1: mean, 0: maximum

    # loss
    cct_weight: NotNegative = 1.0  # of the contrast of class tokens; 0 leaves it out
    num_cct: Count = 12  # last blocks whose class tokens are contrasted; all where there are fewer

    # localisation maps
    map: Literal["fused", "patchcam", "mct"] = "fused"  # mct: what class tokens attend to alone
    cam_layers: Count = 12  # last blocks of the class maps; all where there are fewer
    affinity: bool = True  # spread the maps along what patches attend to, in all blocks
    scales: Scales = (1.0, 0.75, 1.25)  # of the maps, each with its mirror image

    def check_schedule(self) -> None:
        """Raise WSSSError where a warm-up is longer than the run, or the rate would rise."""
        super().check_schedule()
        if self.min_lr > self.lr:
            raise WSSSError(
                f"method.min_lr={self.min_lr:g}: above method.lr={self.lr:g}, so the rate would "
                "rise through the run; lower it"
            )


def mean_of(class_logits: Tensor, patch_logits: Tensor) -> Outputs:
    """Give the mean of both logits (B, K), by which a class is predicted."""
    return Outputs((class_logits + patch_logits) / 2, None)


class MCTformerPlus(WSSSModule):
    """Class tokens and a patch classifier on the shared ViT; it localises and does not segment.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> settings = MCTformerPlusSettings(max_steps=14850)
        >>> MCTformerPlus(backbone=backbone, num_classes=20, settings=settings).title
        'MCTformer+'

    Args:
        backbone: shared encoder with one class token, which becomes one a class.
        num_classes: K, foreground classes.
        settings: see :class:`MCTformerPlusSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone has not exactly one class token that has a position.
    """

    settings: MCTformerPlusSettings

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: MCTformerPlusSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        require_one_class_token(backbone, "mctformer")
        self.quirks = self.follow(quirks)

        network.prepare_backbone(
            backbone,
            num_classes,
            side=max(1, settings.input_size // backbone.patch_size),
            nearest=quirks.repeated_positions,  # Q4
            token_noise=settings.token_noise,
            drop_path=settings.drop_path,
        )
        self.patch_head = nn.Conv2d(backbone.dim, num_classes, kernel_size=3, padding=1)

    @property
    def title(self) -> str:
        """The method's name as its paper writes it."""
        return "MCTformer+"

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K), the mean of class tokens' and patches'; no segmentation."""
        encoded = self.encode(images)
        patch_logits = self.pooled(self.patch_map(encoded.features))
        return mean_of(encoded.class_logits, patch_logits)

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give multi-scale maps of the batch's classes, (B, K, H, W) in [0, 1]; others are zero.

        Images are resized as 8-bit pixels, which are recovered from the normalised ones: exactly
        where those came from such pixels, else (``eval.cam_resize``) rounded to whole grey levels.
        """
        cam, size = images.new_zeros(*labels.shape, *images.shape[-2:]), images.shape[-2:]
        present = (labels > 0).any(dim=0).nonzero()[:, 0]
        if len(present) == 0:
            return cam
        own = self.export(maps.pictures_of(images), present, like=images)
        if own.shape[-2:] != size:  # the official size (Q9), brought to that of the image
            own = F.interpolate(own, size, mode="bilinear", align_corners=False)
        cam[:, present] = own.to(cam.dtype)
        return cam * labels[..., None, None]

    def export(self, pictures: maps.Pictures, classes: Tensor, *, like: Tensor) -> Tensor:
        """Give multi-scale maps (B, C, H, W) of C classes; see :func:`maps.multiscale_maps`."""
        return maps.multiscale_maps(
            lambda images: self.raw_maps(images, classes),
            pictures,
            scales=self.settings.scales,
            multiple=1 if self.quirks.dropped_remainder else self.backbone.patch_size,  # Q8
            first_size=self.quirks.size_of_first_scale,  # Q9
            like=like,
        )

    @torch.no_grad()
    def raw_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        """Compute the maps of one pass (mctformer.md section 3), not normalised.

        R = class-to-patch attention, E = ReLU(U), G = sqrt(R E), Ghat_k[i] = sum_j Omega[i, j]
        G_k[j].

        Args:
            images: (B, 3, H, W), normalised.
            classes: the C class indices that are wanted.

        Returns:
            (B, C, h, w).
        """
        s = self.settings
        attention = Attention(classes, s.cam_layers, with_affinity=s.affinity)
        encoded = self.encode(images, attention)
        own = self.fused(encoded, attention)[s.map]
        with full_precision(images):
            return own if attention.affinity is None else maps.refine(own, attention.affinity)

    def fused(self, encoded: Encoded, attention: Attention) -> dict[str, Tensor]:
        """Give ``mct`` R, ``patchcam`` E and ``fused`` G of the attention's classes, (B, C, h, w).

        Args:
            encoded: of the batch's images.
            attention: of the same pass.
        """
        evidence = widened(self.patch_map(encoded.features, attention.classes)).relu()
        rows = widened(attention.class_maps).view_as(evidence)
        return {"mct": rows, "patchcam": evidence, "fused": (rows * evidence).sqrt()}

    @torch.no_grad()
    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Show what the map of the strongest labelled class is made of, at scale 1."""
        every = torch.arange(self.num_classes, device=images.device)
        attention = Attention(every, self.settings.cam_layers, with_affinity=False)
        encoded = self.encode(images, attention)
        strongest = encoded.class_logits.masked_fill(labels <= 0, -torch.inf).argmax(dim=1)
        drawn = {}
        for name, parts in self.fused(encoded, attention).items():
            own = parts[torch.arange(len(parts)), strongest][:, None]  # (B, 1, h, w)
            full = F.interpolate(own, images.shape[-2:], mode="bilinear", align_corners=False)
            drawn[SHEETS[name]] = normalise_cam(full)[:, 0]
        return drawn

    # ---- network -----------------------------------------------------------------------------

    def encode(self, images: Tensor, attention: Attention | None = None) -> Encoded:
        """Run all blocks on images (B, 3, H, W) of any size; see :func:`network.encode`."""
        if not self.quirks.dropped_remainder:  # Q8
            images = whole_patches(images, self.backbone.patch_size)
        return network.encode(self.backbone, images, attention)

    def patch_map(self, features: Tensor, classes: Tensor | slice = slice(None)) -> Tensor:
        """Give U (B, C, h, w), the patch head with its bias, for all or for C class indices."""
        head: Any = self.patch_head
        return F.conv2d(features, head.weight[classes], head.bias[classes], padding=1)

    def pooled(self, patch_map: Tensor) -> Tensor:
        """Give patch logits (B, K) of U (B, K, h, w); see :func:`network.ranking_pooling`."""
        return network.ranking_pooling(patch_map, self.settings.pooling_decay)

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Encode once, on fused attention, and compute :meth:`losses_of`.

        Args:
            batch: ``image`` (B, 3, H, W) and ``labels`` (B, K).
            step: any; all terms are in force from the first step to the last.
        """
        with self.phase("forward"):
            encoded = self.encode(batch["image"])
            patch_logits = self.pooled(self.patch_map(encoded.features))
        tokens, class_logits = encoded.class_tokens, encoded.class_logits
        return self.losses_of(tokens, class_logits, patch_logits, batch["labels"])

    def losses_of(
        self, class_tokens: Tensor, class_logits: Tensor, patch_logits: Tensor, labels: Tensor
    ) -> Step:
        """Compute L = M(class logits) + lambda CCT + M(patch logits) (mctformer.md section 2).

        M is the multi-label soft margin, a mean over classes, then over images.

        Args:
            class_tokens: after every block, (L, B, K, D).
            class_logits: (B, K).
            patch_logits: (B, K).
            labels: (B, K).
        """
        s = self.settings
        losses = {"cls_loss": F.multilabel_soft_margin_loss(class_logits, labels)}
        total = losses["cls_loss"]
        if s.cct_weight > 0:
            losses["cct_loss"] = class_token_contrast(class_tokens[-s.num_cct :], labels)
            total = total + s.cct_weight * losses["cct_loss"]
        losses["patch_loss"] = F.multilabel_soft_margin_loss(patch_logits, labels)
        total = total + losses["patch_loss"]
        return Step(losses, total, mean_of(class_logits, patch_logits))

    def epoch(self, step: int) -> int:
        """Give the 0-based epoch of a step: the run has ``epochs`` of equal length."""
        return step * self.settings.epochs // self.settings.max_steps

    def param_groups(self) -> list[dict[str, Any]]:
        """Give weights decayed; biases, norms, class tokens and positions not."""
        s = self.settings
        spared = (TOKENS,) if self.quirks.decayed_positions else (TOKENS, POSITIONS)  # Q1
        return decayed_or_not(
            self,
            lr=s.lr,
            head_lr_factor=s.head_lr_factor,
            weight_decay=s.weight_decay,
            spared=spared,
            fresh=NOT_PRETRAINED,
        )

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make AdamW (mctformer.md section 4)."""
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def lr_multiplier(self, step: int) -> float:
        """Warm up linearly, then follow a cosine by the step, down to ``min_lr``."""
        s = self.settings
        time = step * s.epochs / s.max_steps
        if self.quirks.rate_by_epoch:  # Q2
            time = max(self.epoch(step) - 1.0, 0.0)
        start, floor = s.warmup_lr / s.lr, s.min_lr / s.lr
        return cosine_warmup(
            time, length=s.epochs, warmup=s.warmup_epochs, start=start, floor=floor
        )
