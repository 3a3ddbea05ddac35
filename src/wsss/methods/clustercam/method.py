"""ClusterCAM: class tokens attend to patches and to soft clusters of patches (IEEE Access 2024).

Idea: a ViT with one class token per class. Beside plain attention every block groups its patch
tokens into soft clusters, a quarter as many, and lets class tokens and clusters attend to each
other. Attention of a class token to patches and, through the clusters, to groups of patches that
look alike are mixed by one learned scalar a block. The mixed maps of all layers and heads join the
final patch tokens as features of the patch classifier and of the decoder. CAM = patch classifier x
class attention of the last blocks, smoothed by the patches' attention to each other; refined by PAR
it becomes the decoder's pseudo label, all in one stage.

Paper: Kim & Kim, "ClusterCAM", IEEE Access 2024. Official code (read by the authors of our
specification, clustercam.md, not by us): upstream HEAD of April 2025. Q1-Q14 are the numbered
quirks of that specification.

Departures (``official_compat=True`` takes each of them back):
    * Q6: the cosine's floor is 0.16 of the base rate, the proportion that it had in MCTformer; the
      official 1e-5 lies above the base rate, which therefore rises. And the rate follows the step;
      officially it stays for a whole epoch and lags one behind.
    * Q8: class tokens and positions are not decayed.
    * Q9: parameters without a gradient are left alone. Officially DataParallel gives them zeros, so
      AdamW decays the decoder, and counts its steps, through the whole first phase.
    * Q10: the CAM passes of training run without drop path.
    * Q12: the image for PAR is rounded and clipped, not truncated with wrap-around.
    * Q14: an image of no whole number of patches is resized to one, so that the maps cover it.
    * The random start is PyTorch's; officially it is drawn from the seed in an order of its own
      (``methods/clustercam_start.py``).
Same numbers, less work (always): attention between patches is never kept, its sum over blocks is
accumulated row by row, and only in CAM passes; CAMs are made before the training graph exists and
of the batch's classes alone; PAR's affinity is computed once for both thresholds; patch logits come
from nine sums a channel.
Several processes: both losses of classification are means over images; the segmentation loss
divides by pixels of one forward pass, officially those of the whole batch, which DataParallel
gathers before its losses. It is the same on one device with ``accumulate_grad_batches=1``.
Kept as official: positions scaled by (h + 0.1) / n; LayerNorm eps 1e-5 in both branches and 1e-6
before the MLP (Q11); the final norm exists and is never applied; assignments lag one update behind
the centres. Nothing here corresponds to Q2 (in-training mIoU), Q3 (selection on val), Q5 (label
file) and Q13 (fp16 in PAR: ours stays float32). Q1: the missing COCO margin is 0.1. Q4: a batch of
ignored pixels gives 0, where the official loop crashes. Q7: the scalars are logged.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.maps.cams import multiscale_cam, normalise_cam
from wsss.maps.pixels import denormalise
from wsss.maps.pseudo_labels import refine_cam_to_label
from wsss.maps.refine.par import PAR
from wsss.methods.base import (
    Batch,
    Outputs,
    WSSSModule,
    check_not_negative,
    check_positive,
    check_thresholds,
)
from wsss.methods.clustercam.network import (
    BlockOutput,
    ClusterBranch,
    Encoded,
    attend,
    mean_of_convolution,
    prepare_backbone,
    sum_of_last,
)
from wsss.methods.clustercam.official import start_as_official
from wsss.methods.losses import balanced_segmentation_loss
from wsss.methods.schedules import cosine_warmup
from wsss.models.backbone import Backbone
from wsss.models.decoders import LargeFOV
from wsss.models.vit import merge_heads, split_heads

WARMUP_START = 1e-6  # learning rates, absolute as officially
OFFICIAL_FLOOR = 1e-5
FLOOR_RATIO = 0.16  # 1e-5 / 6.25e-5, MCTformer's floor over its base rate
# parameters that take ``head_lr_factor``; class tokens too, which have to part
NOT_PRETRAINED = re.compile(r"cls_token|to_space|mixing|^patch_head|^decoder")


class StepResult(NamedTuple):
    """Losses of a step and what is behind them; None where nothing needed it."""

    losses: dict[str, Tensor]
    total: Tensor
    outputs: Outputs
    patch_logits: Tensor
    cam: Tensor | None = None
    pseudo_label: Tensor | None = None


class ClusterCAM(WSSSModule):
    """Class tokens, patches and clusters on the shared ViT.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> ClusterCAM(backbone=backbone, num_classes=20, max_steps=94000).num_classes
        20

    Args:
        backbone: shared encoder with one class token, which becomes one a class.
        num_classes: K, foreground classes.
        max_steps: optimiser steps of the run.
        epochs: equal parts of the run, in which the schedules count.
        seg_from_epoch: 0-based epoch with which the segmentation loss begins.
        lr: base learning rate; officially 5e-4 x batch / 512.
        token_noise: standard deviation of normal noise that parts the class tokens at the start;
            officially 0. Copies of one part through their targets alone: not in 1,000 steps of
            the first phase here (docs/league.md); the paper has 94,000. ``official_compat`` leaves
            this and ``head_lr_factor`` as they are set.
        head_lr_factor: times ``lr`` for what pretraining does not give: the class tokens' own
            values, the space of clusters, mixing scalars, patch head and decoder; officially 1.
        warmup_epochs: epochs of linear warm-up from 1e-6.
        weight_decay: of weights of two and more dimensions.
        drop_path: rate of the last block, rising linearly from 0.
        decoder_channels: width of the decoder.
        cluster_side: side of the square of patches that a cluster starts as; 2 gives a quarter as
            many clusters as patches, 1 as many.
        iterations: of soft assignment of patches to clusters.
        fixed_mixing: None learns lambda; a number from 0 (attention to patches alone makes the
            class maps) to 1 (attention through clusters alone) holds it there, in every block.
        cam_layers: last blocks whose class maps make the CAM; all where there are fewer.
        scales: of the training CAMs; 1 is always among them.
        high_threshold: background score that foreground must beat; bg + delta in the paper.
        low_threshold: background score below which all is background; bg - delta.
        seg_weight: of the segmentation loss.
        official_compat: reproduce the official numerics, quirks included (see *Departures*).

    Raises:
        WSSSError: a backbone without exactly one class token that has a position, or settings out
            of range.
    """

    #: False only in the benchmark: PAR's affinity anew for each image and threshold.
    share_affinity = True

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        max_steps: int,
        epochs: int = 80,
        seg_from_epoch: int = 50,
        lr: float = 8.7890625e-6,
        token_noise: float = 0.0,
        head_lr_factor: float = 1.0,
        warmup_epochs: float = 5.0,
        weight_decay: float = 0.05,
        drop_path: float = 0.1,
        decoder_channels: int = 512,
        cluster_side: int = 2,
        iterations: int = 3,
        fixed_mixing: float | None = None,
        cam_layers: int = 3,
        scales: Sequence[float] = (1.0, 0.75, 1.25),
        high_threshold: float = 0.5,
        low_threshold: float = 0.3,
        seg_weight: float = 0.1,
        official_compat: bool = False,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, max_steps=max_steps)
        _check_settings(backbone, epochs, drop_path)
        # both would be met late: the warm-up's start is a share of lr, CAMs begin with the decoder
        check_positive(
            lr=lr, scales=scales, head_lr_factor=head_lr_factor, decoder_channels=decoder_channels
        )
        check_not_negative(
            token_noise=token_noise,
            warmup_epochs=warmup_epochs,
            weight_decay=weight_decay,
            seg_weight=seg_weight,
        )
        check_thresholds(low=low_threshold, high=high_threshold)
        _check_clusters(cluster_side, iterations, fixed_mixing, cam_layers)
        self.cam_layers = cam_layers
        self.epochs, self.seg_from_epoch = epochs, seg_from_epoch
        self.lr, self.head_lr_factor = lr, head_lr_factor
        self.warmup_epochs, self.weight_decay = warmup_epochs, weight_decay
        self.scales = tuple(scales)
        self.high_threshold, self.low_threshold = high_threshold, low_threshold
        self.seg_weight = seg_weight
        self.official_compat = official_compat

        prepare_backbone(backbone, num_classes, drop_path, token_noise)
        blocks: Any = backbone.vit.blocks
        self.branches = nn.ModuleList(
            ClusterBranch(block, side=cluster_side, iterations=iterations) for block in blocks
        )
        channels = backbone.dim + num_classes * sum(block.attn.num_heads for block in blocks)
        self.patch_head = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.decoder = LargeFOV(
            in_channels=channels, num_outputs=num_classes + 1, channels=decoder_channels
        )
        self.par = PAR(eps=1e-5)
        if official_compat:
            start_as_official(self)
        if fixed_mixing is not None:
            for index in range(backbone.depth):
                nn.init.constant_(self.branch(index).mixing, fixed_mixing).requires_grad_(False)

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Class logits (B, K) and segmentation logits (B, K+1, h, w) at the patch stride."""
        encoded = self.encode(images)
        return Outputs(encoded.class_logits, self.decoder(encoded.activation))

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Multi-scale CAMs, (B, K, H, W) in [0, 1]; absent classes zero.

        Only classes that some image of the batch has are computed.
        """
        cam = images.new_zeros(*labels.shape, *images.shape[-2:])
        present = (labels > 0).any(dim=0).nonzero()[:, 0]
        if len(present) == 0:
            return cam
        (own,) = multiscale_cam(
            lambda scaled: [self.raw_cam(scaled, present)],
            images,
            scales=self.scales,
            cut_negative=False,
        )
        cam[:, present] = own.to(cam.dtype)
        return cam * labels[..., None, None]

    @torch.no_grad()
    def raw_cam(self, images: Tensor, classes: Tensor, *, refine: bool = True) -> Tensor:
        """ClusterCAM (clustercam.md section 1, "ClusterCAM"), without gating or normalisation.

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
        attention = sum_of_last(encoded.class_maps, self.cam_layers)[:, classes]
        cam = evidence.flatten(2) * attention  # (B, C, N)
        if encoded.affinity is not None:
            cam = cam @ encoded.affinity.transpose(1, 2)
        return cam.unflatten(2, evidence.shape[-2:])

    def evidence(self, activation: Tensor, classes: Tensor) -> Tensor:
        """E (B, C, h, w): ReLU of the patch head without its bias, for C class indices."""
        return F.conv2d(activation, self.patch_head.weight[classes], padding=1).relu()

    @torch.no_grad()
    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the strongest labelled class attends to, and the clusters, each (B, H, W).

        ``class attention`` is R and ``cluster attention`` G of the CAM's blocks, ``mixed``
        what the network makes of them; each map is stretched to [0, 1]. ``clusters`` shows the
        strongest cluster of each patch in the last block, numbered row by row as they began.
        """
        kept: list[BlockOutput] = []
        encoded = self.encode(images, keep=kept)
        size, grid = images.shape[-2:], encoded.activation.shape[-2:]
        main = encoded.class_logits.masked_fill(labels <= 0, -torch.inf).argmax(dim=1)
        maps = {
            "class attention": [block.class_rows for block in kept],
            "cluster attention": [block.clustered.class_map for block in kept],
            "mixed": encoded.class_maps,
        }
        batch = torch.arange(len(images), device=images.device)
        sheet = {}
        for name, values in maps.items():
            own = sum_of_last(values, self.cam_layers)[batch, main].unflatten(1, grid)[:, None]
            full = F.interpolate(own, size, mode="bilinear", align_corners=False)
            sheet[name] = normalise_cam(full)[:, 0]
        assignment = kept[-1].clustered.assignment
        number = assignment.argmax(dim=-1) / max(1, assignment.shape[-1] - 1)
        sheet["clusters"] = F.interpolate(number.unflatten(1, grid)[:, None], size)[:, 0]
        return sheet

    # ---- network -----------------------------------------------------------------------------

    def encode(
        self, images: Tensor, *, with_affinity: bool = False, keep: list[BlockOutput] | None = None
    ) -> Encoded:
        """Run all blocks; the final norm is not applied.

        Args:
            images: (B, 3, H, W), normalised.
            with_affinity: accumulate the patches' attention, for CAMs; not differentiable.
            keep: receives what every block gives.
        """
        if not self.official_compat:
            images = self._whole_patches(images)
        tokens, grid = self.backbone.embed(images)
        count = grid[0] * grid[1]
        affinity = images.new_zeros(len(images), count, count) if with_affinity else None
        class_maps = []
        for index in range(self.backbone.depth):
            output = self.block(index, tokens, grid, affinity)
            tokens = output.tokens
            class_maps.append(output.class_map)
            if keep is not None:
                keep.append(output)
        patches = tokens[:, self.num_classes :].transpose(1, 2)  # (B, D, N)
        channels = [patches, *(maps.flatten(1, 2) for maps in class_maps)]
        activation = torch.cat(channels, dim=1).unflatten(2, grid)
        return Encoded(tokens[:, : self.num_classes], activation, class_maps, affinity)

    def block(
        self, index: int, tokens: Tensor, grid: tuple[int, int], affinity: Tensor | None = None
    ) -> BlockOutput:
        """Both branches, then the MLP, with three independent drop-path draws.

        X' = X + DP(a) + DP(b), X'' = X' + DP(MLP(LN(X'))).
        """
        block: Any = self.backbone.vit.blocks[index]
        branch = self.branch(index)
        plain, class_rows = self._plain_attention(block, tokens, affinity)
        clustered = branch(tokens, grid)
        tokens = tokens + block.drop_path1(block.ls1(plain))
        tokens = tokens + block.drop_path1(block.ls1(clustered.update))
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        class_map = (1 - branch.mixing) * class_rows + branch.mixing * clustered.class_map
        return BlockOutput(tokens, plain, class_rows, clustered, class_map)

    def branch(self, index: int) -> ClusterBranch:
        """The clustering branch of a block."""
        branch = self.branches[index]
        assert isinstance(branch, ClusterBranch)
        return branch

    def _plain_attention(
        self, block: Any, tokens: Tensor, affinity: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Branch A (B, K+N, D) and its class-to-patch attention (B, heads, K, N)."""
        attn = block.attn
        queries, keys, values = split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
        mixed, class_rows = attend(queries * attn.scale, keys, values, self.num_classes, affinity)
        return attn.proj(merge_heads(mixed)), class_rows

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Images whose sides are multiples of the patch, enlarged where they are not (Q14)."""
        patch = self.backbone.patch_size
        size = [-(-side // patch) * patch for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    # ---- training ----------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of clustercam.md sections 2 to 4; see :meth:`compute_losses`."""
        with self.own_draws(batch_idx, enabled=not self.official_compat):
            result = self.compute_losses(batch, self.global_step)
        if not self.official_compat:
            self.require_finite(result.losses, result.total, batch)
        self.log_losses(result.losses, result.total, len(batch["image"]))
        for index in range(self.backbone.depth):
            self.log(f"train/mixing_{index:02d}", self.branch(index).mixing.detach()[0])
        return result.total

    def compute_losses(self, batch: Batch, step: int) -> StepResult:
        """All losses of a batch at a 0-based optimiser step.

        Args:
            batch: ``image`` (B, 3, H, W) and ``labels`` (B, K).
            step: decides whether segmentation is learned.
        """
        images, labels = batch["image"], batch["labels"]
        cam = pseudo_label = None
        if self.learns_segmentation(step):
            # before the forward pass, so that no graph lies in memory meanwhile
            with self.phase("cam"):
                cam = self._training_cams(images, labels)
            with self.phase("pseudo_labels"):
                pseudo_label = self._pseudo_labels(images, cam, labels)

        with self.phase("forward"):
            result = self.losses_of(self.encode(images), labels, pseudo_label)
        return result._replace(cam=cam)

    def losses_of(
        self, encoded: Encoded, labels: Tensor, pseudo_label: Tensor | None
    ) -> StepResult:
        """The losses (clustercam.md section 2): two of classification, one of segmentation.

        Args:
            encoded: of the batch's images.
            labels: (B, K).
            pseudo_label: (B, H, W), or None before segmentation is learned.
        """
        patch_logits = self.patch_logits(encoded.activation)
        losses = {
            "cls_loss": F.multilabel_soft_margin_loss(encoded.class_logits, labels),
            "patch_loss": F.multilabel_soft_margin_loss(patch_logits, labels),
        }
        total = losses["cls_loss"] + losses["patch_loss"]
        seg_logits = None
        if pseudo_label is not None:
            seg_logits = self.decoder(encoded.activation)
            full = F.interpolate(seg_logits, pseudo_label.shape[-2:], mode="bilinear")
            losses["seg_loss"] = balanced_segmentation_loss(full, pseudo_label)
            total = total + self.seg_weight * losses["seg_loss"]
        outputs = Outputs(encoded.class_logits, seg_logits)
        return StepResult(losses, total, outputs, patch_logits, None, pseudo_label)

    def patch_logits(self, activation: Tensor) -> Tensor:
        """Spatial mean of the patch head, (B, K)."""
        return mean_of_convolution(activation, self.patch_head)

    def epoch(self, step: int) -> int:
        """0-based epoch of a step: the run has ``epochs`` of equal length."""
        return step * self.epochs // self.max_steps

    def learns_segmentation(self, step: int) -> bool:
        """Whether the segmentation loss is in force at a 0-based step."""
        return self.seg_weight > 0 and self.epoch(step) >= self.seg_from_epoch

    def _training_cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """CAMs of a training batch; officially every pass draws its own drop paths (Q10)."""
        with nullcontext() if self.official_compat else evaluating(self):
            return self.cams(images, labels)

    @torch.no_grad()
    def _pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """PAR-refined pseudo labels (B, H, W), 255 where undecided."""
        return refine_cam_to_label(
            self.par,
            self._guide(images),
            cam,
            labels,
            high=self.high_threshold,
            low=self.low_threshold,
            share_affinity=self.share_affinity,
        )

    def _guide(self, images: Tensor) -> Tensor:
        """The images as PAR sees them: whole grey levels over 255 (Q12)."""
        pixels = denormalise(images)
        if self.official_compat:  # a cast to uint8: -3 becomes 253, 300 becomes 44
            return pixels.trunc().remainder(256) / 255
        return pixels.round().clamp(0, 255) / 255

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Q9: officially DataParallel turns missing gradients into zeros."""
        if self.official_compat:
            for parameter in self.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def compiled_parts(self) -> list[nn.Module]:
        """Clustering branches and MLPs; the blocks themselves are written out above."""
        blocks: Any = self.backbone.vit.blocks
        return [*self.branches, *(block.mlp for block in blocks)]

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights that are decayed, and vectors (biases, norms, mixing scalars) that are not.

        Class tokens and positions count as vectors; officially they are decayed (Q8).
        """
        tokens = (
            () if self.official_compat else ("backbone.vit.cls_token", "backbone.vit.pos_embed")
        )
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            decay = parameter.ndim > 1 and name not in tokens
            fresh = NOT_PRETRAINED.search(name) is not None
            key = ("" if decay else "not ") + "decayed" + (", new" if fresh else "")
            group = groups.setdefault(
                key,
                {
                    "name": key,
                    "params": [],
                    "lr": self.lr * (self.head_lr_factor if fresh else 1.0),
                    "weight_decay": self.weight_decay if decay else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW (clustercam.md section 4)."""
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def lr_multiplier(self, step: int) -> float:
        """Warm-up from 1e-6, then a cosine; officially by whole epochs, one late (Q6)."""
        if self.official_compat:
            time, floor = max(self.epoch(step) - 1.0, 0.0), OFFICIAL_FLOOR / self.lr
        else:
            time, floor = step * self.epochs / self.max_steps, FLOOR_RATIO
        return cosine_warmup(
            time,
            length=self.epochs,
            warmup=self.warmup_epochs,
            start=WARMUP_START / self.lr,
            floor=floor,
        )


def _check_settings(backbone: Backbone, epochs: int, drop_path: float) -> None:
    if backbone.num_prefix_tokens != 1 or backbone.vit.no_embed_class:
        raise WSSSError(
            "method=clustercam turns the class token into one a class; this backbone has "
            f"{backbone.num_prefix_tokens} prefix tokens, expected 1 that has a position"
        )
    if epochs < 1 or not 0 <= drop_path < 1:
        raise WSSSError(
            f"method: expected epochs >= 1 and 0 <= drop_path < 1, got {epochs} and {drop_path}"
        )


def _check_clusters(
    side: int, iterations: int, fixed_mixing: float | None, cam_layers: int
) -> None:
    if min(side, iterations, cam_layers) < 1:
        raise WSSSError(
            "method: expected cluster_side, iterations and cam_layers of at least 1, got "
            f"{side}, {iterations} and {cam_layers}"
        )
    if fixed_mixing is not None and not 0 <= fixed_mixing <= 1:
        raise WSSSError(f"method.fixed_mixing={fixed_mixing}: expected 0 to 1, or null to learn it")
