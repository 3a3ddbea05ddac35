"""ClusterCAM: class tokens attend to patches and to soft clusters of patches (IEEE Access 2024).

Idea: a ViT with one class token per class. Beside plain attention every block groups its patch
tokens into soft clusters, a quarter as many, and lets class tokens and clusters attend to each
other. Attention of a class token to patches and, through the clusters, to groups of patches that
look alike are mixed by one learned scalar a block. The mixed maps of all layers and heads join the
final patch tokens as features of the patch classifier and of the decoder. CAM = patch classifier x
class attention of the last blocks, smoothed by the patches' attention to each other; refined by PAR
it becomes the decoder's pseudo label, all in one stage.

Paper: Kim & Kim, "ClusterCAM", IEEE Access 2024. Official code (read by the authors of our
specification, clustercam.md, not by us): upstream HEAD of April 2025. Departures: official.py, one
switch each.
Several processes: both losses of classification are means over images. The segmentation loss
divides by pixels of one forward pass, officially by those of the whole batch, which DataParallel
gathers before its losses. It is the same on one device with ``accumulate_grad_batches=1``.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.maps.cams import multiscale_cam
from wsss.maps.pixels import denormalise
from wsss.maps.pseudo_labels import refine_cam_to_label
from wsss.maps.refine.par import PAR
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.clustercam import network, official
from wsss.methods.clustercam.gallery import sheets
from wsss.methods.clustercam.network import BlockOutput, ClusterBranch, Encoded
from wsss.methods.clustercam.official import CORRECTED, Quirks
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.schedules import cosine_warmup, decayed_or_not
from wsss.methods.settings import (
    BelowOne,
    Count,
    Fraction,
    Layers,
    NotNegative,
    Number,
    Positive,
    Scales,
    ThresholdSettings,
    Width,
)
from wsss.models import class_tokens
from wsss.models.backbone import Backbone
from wsss.models.class_tokens import Attend, require_one_class_token
from wsss.models.decoders import LargeFOV

WARMUP_START = 1e-6  # learning rate of the first step, absolute as officially
FLOOR_RATIO = 0.16  # 1e-5 / 6.25e-5, MCTformer's floor over its base rate
# parameters that take ``head_lr_factor``; class tokens too, which have to part
NOT_PRETRAINED = re.compile(r"cls_token|to_space|mixing|^patch_head|^decoder")
TOKENS = ("backbone.vit.cls_token", "backbone.vit.pos_embed")


@dataclass(frozen=True, kw_only=True)
class ClusterCAMSettings(ThresholdSettings):
    """Settings of ClusterCAM; the defaults are the paper's for VOC."""

    # optimiser, and the parts of the run
    epochs: Count = 80  # equal parts of the run, in which the schedules count
    seg_from_epoch: Number = 50  # 0-based epoch with which the segmentation loss begins
    lr: Positive = 8.7890625e-6  # base rate; officially 5e-4 x batch / 512
    head_lr_factor: Positive = 1.0  # times lr: what pretraining does not give, class tokens too
    warmup_epochs: NotNegative = 5.0  # of linear warm-up from 1e-6
    weight_decay: NotNegative = 0.05  # AdamW's, of weights of two and more dimensions

    # network
    # deviation of normal noise that parts the class tokens at the start. Copies of one part through
    # their targets alone: not in 1,000 steps of the first phase here (docs/league.md); the paper
    # has 94,000
    token_noise: NotNegative = 0.0
    drop_path: BelowOne = 0.1  # rate of the last block, rising linearly from 0
    decoder_channels: Width = 512  # width of the decoder
    cluster_side: Width = 2  # patches a side of a cluster's start; 2: N / 4 clusters, 1: N
    iterations: Layers = 3  # of soft assignment of patches to clusters
    # None learns lambda; a number from 0 (attention to patches alone makes the class maps) to 1
    # (attention through clusters alone) keeps it there, in every block
    fixed_mixing: Fraction | None = None

    # CAMs, pseudo labels, loss
    cam_layers: Count = 3  # last blocks whose class maps make the CAM; all where there are fewer
    scales: Scales = (1.0, 0.75, 1.25)  # of the CAMs; 1 is always among them
    high_threshold: Fraction = 0.5  # background score that foreground must beat; bg + delta
    low_threshold: Fraction = 0.3  # background score below which all is background; bg - delta
    seg_weight: NotNegative = 0.1  # of the segmentation loss

    def check_schedule(self) -> None:
        """Raise WSSSError where a warm-up is longer than the run, or segmentation never begins."""
        super().check_schedule()
        if self.seg_weight > 0 and self.seg_from_epoch >= self.epochs:
            raise WSSSError(
                f"method.seg_from_epoch={self.seg_from_epoch}: beyond the run of {self.epochs} "
                "epochs; without segmentation give method.seg_weight=0"
            )


class ClusterCAM(WSSSModule):
    """Class tokens, patches and clusters on the shared ViT.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> settings = ClusterCAMSettings(max_steps=94000)
        >>> ClusterCAM(backbone=backbone, num_classes=20, settings=settings).num_classes
        20

    Args:
        backbone: shared encoder with one class token, which becomes one a class.
        num_classes: K, foreground classes.
        settings: see :class:`ClusterCAMSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone has not exactly one class token that has a position.
    """

    settings: ClusterCAMSettings
    #: how branch A attends, see :func:`class_tokens.attend`
    attend: Attend = staticmethod(class_tokens.attend)

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: ClusterCAMSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        s, blocks = settings, list(backbone.vit.blocks)
        require_one_class_token(backbone, "clustercam")
        self.quirks = self.follow(quirks)

        network.prepare_backbone(backbone, num_classes, s.drop_path, s.token_noise)
        self.branches = nn.ModuleList(
            ClusterBranch(block, side=s.cluster_side, iterations=s.iterations) for block in blocks
        )
        channels = backbone.dim + num_classes * sum(block.attn.num_heads for block in blocks)
        self.patch_head = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.decoder = LargeFOV(
            in_channels=channels, num_outputs=num_classes + 1, channels=s.decoder_channels
        )
        self.par = PAR(eps=1e-5)
        if quirks.official_start:
            self.start_as_official()
        if s.fixed_mixing is not None:
            for mixing in self.mixing():
                nn.init.constant_(mixing, s.fixed_mixing).requires_grad_(False)

    @torch.no_grad()
    def start_as_official(self) -> None:
        """Give the new parts the values that the official constructor draws after the seed."""
        backbone, vit, count = self.backbone, self.backbone.vit, self.num_classes
        sizes = {"dim": backbone.dim, "depth": backbone.depth, "patch_size": backbone.patch_size}
        sizes |= {"hidden": vit.blocks[0].mlp.fc1.out_features, "num_classes": count}
        sizes |= {"positions": vit.pos_embed.shape[1] - count}
        channels = self.settings.decoder_channels
        sizes |= {"features": self.patch_head.in_channels, "channels": channels}
        generator = torch.Generator().manual_seed(torch.initial_seed())
        start = official.official_start(generator, **sizes)
        for name, parameter in self.named_parameters():
            if (theirs := official.official_name(name)) in start:
                parameter.copy_(start[theirs])

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride."""
        encoded = self.encode(images)
        return Outputs(encoded.class_logits, self.decoder(encoded.activation))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give multi-scale CAMs of the batch's classes, (B, K, H, W) in [0, 1]; others are zero."""
        cam, scales = images.new_zeros(*labels.shape, *images.shape[-2:]), self.settings.scales
        present = (labels > 0).any(dim=0).nonzero()[:, 0]
        if len(present) == 0:
            return cam
        (own,) = multiscale_cam(
            lambda view: [self.raw_cam(view, present)], images, scales=scales, cut_negative=False
        )
        cam[:, present] = own.to(cam.dtype)
        return cam * labels[..., None, None]

    @torch.no_grad()
    def raw_cam(self, images: Tensor, classes: Tensor, *, refine: bool = True) -> Tensor:
        """Compute ClusterCAM (clustercam.md section 1), without gating or normalisation.

        V = E (see :meth:`evidence`) x class maps of the last blocks,
        CAM_k[i] = sum_j Omega[i, j] V_k[j].

        Args:
            images: (B, 3, H, W), normalised.
            classes: the C class indices that are wanted.
            refine: smooth V by the patches' attention.

        Returns:
            (B, C, h, w).
        """
        encoded = self.encode(images, with_affinity=refine)
        evidence = self.evidence(encoded.activation, classes)
        maps = class_tokens.sum_of_last(encoded.class_maps, self.settings.cam_layers)
        cam = evidence.flatten(2) * maps[:, classes]  # (B, C, N)
        if encoded.affinity is not None:
            cam = cam @ encoded.affinity.transpose(1, 2)
        return cam.unflatten(2, evidence.shape[-2:])

    def evidence(self, activation: Tensor, classes: Tensor) -> Tensor:
        """Give E (B, C, h, w): ReLU of the patch head without its bias, for C class indices."""
        return F.conv2d(activation, self.patch_head.weight[classes], padding=1).relu()

    @torch.no_grad()
    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Show what the strongest class attends to, and the clusters; see :func:`sheets`."""
        kept: list[BlockOutput] = []
        encoded = self.encode(images, keep=kept)
        return sheets(encoded, kept, labels, images.shape[-2:], self.settings.cam_layers)

    # ---- network -----------------------------------------------------------------------------

    def encode(
        self, images: Tensor, *, with_affinity: bool = False, keep: list[BlockOutput] | None = None
    ) -> Encoded:
        """Run all blocks on images (B, 3, H, W) of any size; see :func:`network.encode`."""
        if not self.quirks.dropped_remainder:  # Q14
            images = class_tokens.whole_patches(images, self.backbone.patch_size)
        attend = self.attend
        return network.encode(
            self.backbone, self.branches, images, attend, with_affinity=with_affinity, keep=keep
        )

    def patch_logits(self, activation: Tensor) -> Tensor:
        """Give the spatial mean of the patch head, (B, K)."""
        return network.mean_of_convolution(activation, self.patch_head)

    def mixing(self) -> list[nn.Parameter]:
        """Give lambda (1,) of every block."""
        branches: Any = self.branches
        return [branch.mixing for branch in branches]

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Make targets in the second phase, encode once, and compute :meth:`losses_of`.

        Args:
            batch: ``image`` (B, 3, H, W) and ``labels`` (B, K).
            step: decides whether segmentation is learned.
        """
        images, labels = batch["image"], batch["labels"]
        # targets before the forward pass, so that no graph lies in memory meanwhile
        targets = self.targets(images, labels) if self.learns_segmentation(step) else {}
        with self.phase("forward"):
            return self.losses_of(self.encode(images), labels, targets)

    def losses_of(self, encoded: Encoded, labels: Tensor, targets: dict[str, Tensor]) -> Step:
        """Compute the losses (clustercam.md section 2): two of classification, one of segmentation.

        Args:
            encoded: of the batch's images.
            labels: (B, K).
            targets: with ``pseudo_label`` (B, H, W) where segmentation is learned.
        """
        patch_logits = self.patch_logits(encoded.activation)
        losses = {
            "cls_loss": F.multilabel_soft_margin_loss(encoded.class_logits, labels),
            "patch_loss": F.multilabel_soft_margin_loss(patch_logits, labels),
        }
        total = losses["cls_loss"] + losses["patch_loss"]
        seg_logits = None
        if "pseudo_label" in targets:
            label = targets["pseudo_label"]
            seg_logits = self.decoder(encoded.activation)  # (B, K+1, h, w)
            full = F.interpolate(seg_logits, label.shape[-2:], mode="bilinear")
            losses["seg_loss"] = balanced_segmentation_loss(full, label)
            total = total + self.settings.seg_weight * losses["seg_loss"]
        mixing = {f"mixing_{i:02d}": one.detach()[0] for i, one in enumerate(self.mixing())}
        outputs, seen = Outputs(encoded.class_logits, seg_logits), {"patch_logits": patch_logits}
        return Step(losses, total, outputs, targets | seen, mixing)

    def epoch(self, step: int) -> int:
        """Give the 0-based epoch of a step: the run has ``epochs`` of equal length."""
        return step * self.settings.epochs // self.settings.max_steps

    def learns_segmentation(self, step: int) -> bool:
        """Tell whether the segmentation loss is in force at a 0-based step."""
        return self.settings.seg_weight > 0 and self.epoch(step) >= self.settings.seg_from_epoch

    def compiled_parts(self) -> list[nn.Module]:
        """Give clustering branches and MLPs; network.py writes the blocks themselves out."""
        return [*self.branches, *(block.mlp for block in self.backbone.vit.blocks)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave missing gradients missing; the quirk turns them into zeros."""
        if self.quirks.zero_gradients:  # Q9
            for parameter in self.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def param_groups(self) -> list[dict[str, Any]]:
        """Give weights decayed; biases, norms, mixing scalars, class tokens and positions not."""
        s, spared = self.settings, () if self.quirks.decayed_tokens else TOKENS  # Q8
        return decayed_or_not(
            self,
            lr=s.lr,
            head_lr_factor=s.head_lr_factor,
            weight_decay=s.weight_decay,
            spared=spared,
            fresh=NOT_PRETRAINED,
        )

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make AdamW (clustercam.md section 4)."""
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def lr_multiplier(self, step: int) -> float:
        """Warm up from 1e-6, then follow a cosine by the step, down to 0.16 of the base rate."""
        s, time = self.settings, step * self.settings.epochs / self.settings.max_steps
        if self.quirks.rate_by_epoch:  # Q6
            time = max(self.epoch(step) - 1.0, 0.0)
        floor = official.RATE_FLOOR / s.lr if self.quirks.absolute_floor else FLOOR_RATIO  # Q6
        start, warmup = WARMUP_START / s.lr, s.warmup_epochs
        return cosine_warmup(time, length=s.epochs, warmup=warmup, start=start, floor=floor)

    # ---- targets of the second phase ---------------------------------------------------------

    def targets(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Give the batch's ``cam`` (B, K, H, W) and its ``pseudo_label`` (B, H, W)."""
        mode = nullcontext() if self.quirks.drop_path_in_cams else evaluating(self)  # Q10
        with self.phase("cam"), mode:
            cam = self.cams(images, labels)
        with self.phase("pseudo_labels"):
            return {"cam": cam, "pseudo_label": self.pseudo_labels(images, cam, labels)}

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """Give PAR-refined pseudo labels (B, H, W), 255 where undecided."""
        s, guide = self.settings, self.guide(images)
        high, low = s.high_threshold, s.low_threshold
        return refine_cam_to_label(self.par, guide, cam, labels, high=high, low=low)

    def guide(self, images: Tensor) -> Tensor:
        """Give the images (B, 3, H, W) as PAR sees them: whole grey levels over 255."""
        pixels = denormalise(images)
        if self.quirks.wrapped_guide:  # Q12: a cast to uint8: -3 becomes 253, 300 becomes 44
            return pixels.trunc().remainder(256) / 255
        return pixels.round().clamp(0, 255) / 255
