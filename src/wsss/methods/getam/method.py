"""GETAM: gradient-weighted element-wise transformer attention maps (arXiv 2112.02841).

Idea: how much an attention of the class token matters for a class is told by the attention times
its gradient. The maps of the last six blocks, coupled with the gradient once more and added up,
locate the class. They are refined along the image (PAMR), completed with saliency where there is
some, and a DPT-like decoder on the same transformer learns from them. The first half of the run
trains the classifier alone, the second everything, with labels made anew at every step.

Paper: Sun et al., "GETAM: Gradient-weighted Element-wise Transformer Attention Map for
Weakly-supervised Semantic Segmentation".
Official code (read by the authors of our specification, not by us): HEAD ``766dc62``.

Departures (``official_compat=True`` takes each of them back):
    * Positions are resized as for all methods here (bicubic); officially bilinear.
    * SGD's weight decay is a weight decay; officially it lands in the momentum (5e-4).
    * Saliency target: background where nothing is salient; officially salient pixels are told to
      be background, and only pixels that the completion adds are foreground.
    * Pixels outside the saliency that two classes claim are undecided; officially the rule is dead
      and the lower class wins.
    * The opening of labels is centred; officially it moves them by a pixel to the lower right.
      What it removes from completed labels is removed from the completed saliency too.
    * Padding is ignored; officially it is background.
    * A batch without background or without foreground gives that half of the cross-entropy the
      value 0, not NaN.
    * The guide of PAMR and energy is rounded to integers, not truncated.
Settings that ``official_compat`` leaves alone: ``data.saliency_threshold`` (officially 0) and
``eval.crf`` (officially ``getam_bgr``). A run has T steps; the official loop makes one more, at the
last one's rate.
Ours, since the official code has no such thing: without saliency maps a pixel is background up to
``low_threshold`` of its refined maps, foreground above ``high_threshold``, undecided between; runs
whose size is not a multiple of two patches; encoders of any depth (taps after each quarter of the
blocks, maps of the last six at most). In parallel runs all gradients are averaged in both phases.
Several processes: the classification loss, and so the first phase, and the energy are means over
images. Cross-entropy and saliency loss divide by pixels of one forward pass, and the decoder's
batch norms see the images of one; ``trainer.sync_batchnorm=true`` lets them see those of all
processes (on GPUs). Without it their running statistics are averaged after each step.
Same numbers, less work (always): one forward pass for maps and losses; one backward pass a class
*slot* of the batch, through activations of the last blocks only; the class token's row of attention
and gradient in closed form, so that attention stays fused; PAMR of present classes alone, batched;
labels where the images are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.cams import normalise_maximum
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise
from wsss.maps.pseudo_labels import cam_to_label_with_ignore, ignore_outside_boxes, inside_boxes
from wsss.maps.refine.pamr import PAMR
from wsss.methods.base import (
    Batch,
    Outputs,
    WSSSModule,
    check_not_negative,
    check_positive,
    check_thresholds,
)
from wsss.methods.getam.labels import (
    Labels,
    complete_labels,
    open_region,
    saliency_loss,
    split_cross_entropy,
)
from wsss.methods.getam.maps import GradientForm, class_slots, slot_maps
from wsss.methods.losses import dense_energy_loss
from wsss.methods.schedules import poly_warmup
from wsss.models.backbone import Backbone, Features
from wsss.models.decoders import DPTDecoder, Reassemble


class LossWeights(NamedTuple):
    """Weights of the terms beside the classification loss in the second phase."""

    seg: float
    energy: float
    saliency: float


class Targets(NamedTuple):
    """What the second phase learns from.

    Attributes:
        maps: maps of the slots on the token grid, summed over blocks, (B, S, h, w).
        refined: the same at image size, refined and normalised, (B, S, H, W).
        guide: pixels in 0..255, (B, 3, H, W).
        labels: made from all that.
    """

    maps: Tensor
    refined: Tensor
    guide: Tensor
    labels: Labels


class StepResult(NamedTuple):
    """Losses of a step and the targets behind them; None in the first phase.

    Attributes:
        losses: named terms, without their weights (but the energy's).
        total: weighted sum.
        outputs: class logits (B, K), segmentation logits (B, K+1, H, W) or None.
        targets: of the second phase.
    """

    losses: dict[str, Tensor]
    total: Tensor
    outputs: Outputs
    targets: Targets | None = None


class GETAM(WSSSModule):
    """Gradient-weighted attention maps and a DPT decoder on the shared transformer.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> GETAM(backbone=backbone, num_classes=20, max_steps=52900).map_blocks
        (6, 7, 8, 9, 10, 11)

    Args:
        backbone: shared encoder, plain or hybrid; one prefix token, or two of a distilled DeiT.
        num_classes: K, foreground classes.
        max_steps: optimiser steps of the run.
        lr: SGD's learning rate of everything.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay; ``official_compat`` uses it as momentum instead.
        phase_one: fraction of the run that trains the classifier alone.
        phase_two_lr_scale: factor on the learning rate afterwards.
        step_decay: let that factor fall to a tenth after every sixth of the run.
        tap_channels: widths of the four maps, finest first; None: D/8, D/4, D/2, D.
        decoder_channels: width of the decoder.
        gradient_form: how attention and its gradient make the maps; see :func:`attention_term`.
        map_layers: last blocks whose maps are summed; all where there are fewer.
        quantile: a class completes labels with pixels above this quantile of its map; COCO 0.95;
            None: labels stay within the saliency.
        opening: side in pixels of the square that opens the labels.
        low_threshold: without saliency: background up to it.
        high_threshold: without saliency: foreground above it.
        seg_weight: of the split cross-entropy.
        energy_weight: of the dense energy.
        saliency_weight: of the saliency loss, where the data has saliency maps.
        official_compat: reproduce the official numerics, bugs included.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        max_steps: int,
        lr: float = 0.04,
        momentum: float = 0.0,
        weight_decay: float = 5e-4,
        phase_one: float = 0.5,
        phase_two_lr_scale: float = 0.1,
        step_decay: bool = False,
        tap_channels: Sequence[int] | None = None,
        decoder_channels: int = 256,
        gradient_form: GradientForm = "coupled",
        map_layers: int = 6,
        quantile: float | None = 0.9,
        opening: int = 10,
        low_threshold: float = 0.077,
        high_threshold: float = 0.2,
        seg_weight: float = 1.0,
        energy_weight: float = 1e-7,
        saliency_weight: float = 1.0,
        official_compat: bool = False,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, max_steps=max_steps)
        if backbone.num_prefix_tokens == 0:
            raise WSSSError("method=getam reads the class token, and this backbone has none")
        if backbone.depth < 4:
            raise WSSSError(
                f"method=getam taps four blocks, and this backbone has {backbone.depth}"
            )
        check_positive(lr=lr, decoder_channels=decoder_channels)
        check_not_negative(
            weight_decay=weight_decay,
            seg_weight=seg_weight,
            energy_weight=energy_weight,
            saliency_weight=saliency_weight,
        )
        check_thresholds(low=low_threshold, high=high_threshold)
        if quantile is not None and not 0 <= quantile < 1:
            raise WSSSError(f"method.quantile={quantile}: expected 0 to below 1, or null")
        if not 0 <= phase_one <= 1 or min(opening, map_layers) < 1:
            raise WSSSError(
                "method: expected 0 <= phase_one <= 1, and opening and map_layers of at least 1, "
                f"got {phase_one}, {opening} and {map_layers}"
            )
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.phase_one, self.phase_two_lr_scale = phase_one, phase_two_lr_scale
        self.step_decay, self.quantile, self.opening = step_decay, quantile, opening
        self.gradient_form = gradient_form
        self.low_threshold, self.high_threshold = low_threshold, high_threshold
        self.weights = LossWeights(seg_weight, energy_weight, saliency_weight)
        self.official_compat = official_compat
        if official_compat:
            backbone.position_mode = "bilinear"

        depth, dim = backbone.depth, backbone.dim
        self.map_blocks = tuple(range(max(0, depth - map_layers), depth))
        stem = list(backbone.stem_channels[:2])  # a hybrid's first two maps, as they are
        widths = list(tap_channels or (dim // 8, dim // 4, dim if stem else dim // 2, dim))
        if len(widths) != 4 or min(widths) < 1:
            raise WSSSError(f"method.tap_channels={widths}: expected four positive widths")
        # level 1 (finest) to 4 -> the block that it reads
        self.taps = {level: depth * level // 4 - 1 for level in range(len(stem) + 1, 5)}
        self.reassemble = nn.ModuleDict(
            {
                str(level): Reassemble(
                    dim=dim, channels=widths[level - 1], factor=2.0 ** (3 - level)
                )
                for level in self.taps
            }
        )
        self.classifier = nn.Linear(widths[3], num_classes)
        self.decoder = DPTDecoder(
            in_channels=[*stem, *widths[len(stem) :]],
            num_outputs=num_classes + 1,
            channels=decoder_channels,
        )
        self.pamr = PAMR()

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Class logits (B, K) and segmentation logits (B, K+1, H, W) of the whole patches."""
        features = self.backbone(images, taps=tuple(self.taps.values()))
        coarsest = self.level_map(features, 4)
        return Outputs(self.classify(coarsest), self.segment(features, coarsest))

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Maps at image size over their maximum, not refined, (B, K, H, W); absent classes zero."""
        maps, _, ids = self._maps_of(images, labels)
        full = normalise_maximum(self._enlarged(maps.sum(dim=2), images.shape[-2:]))
        cams = full.new_zeros(*labels.shape, *full.shape[-2:])
        return cams.scatter(1, ids[:, :, None, None].expand_as(full), full)

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The share of every block in the map of the image's strongest present class."""
        maps, logits, ids = self._maps_of(images, labels)
        scores = logits.masked_fill(labels <= 0, -torch.inf).gather(1, ids)  # (B, S)
        main = scores.argmax(dim=1)
        chosen = maps[torch.arange(len(maps)), main]  # (B, L, h, w)
        full = self._enlarged(chosen, images.shape[-2:])
        shown = full / full.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(full.dtype).tiny)
        return {f"block {block}": shown[:, i] for i, block in enumerate(self.map_blocks)}

    @torch.enable_grad()  # the evaluator switches gradients off
    def _maps_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, S, L, h, w), class logits (B, K), class indices (B, S); without a graph."""
        features, _, logits = self.encode_and_classify(images, levels=(4,))
        ids, valid = class_slots(labels)
        return self.maps_of_slots(features, logits, ids, valid), logits.detach(), ids

    # ---- training ----------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of getam.md section 3; see :meth:`compute_losses`."""
        with self.own_draws(batch_idx, enabled=not self.official_compat):
            result = self.compute_losses(batch, self.global_step)
        if not self.official_compat:
            self.require_finite(result.losses, result.total, batch)
        self.log_losses(result.losses, result.total, len(batch["image"]))
        return result.total

    def compute_losses(self, batch: Batch, step: int) -> StepResult:
        """All losses of a batch at a 0-based optimiser step.

        Args:
            batch: ``image`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end) and, where the data has saliency maps,
                ``saliency`` (B, H, W), salient above 0.
            step: decides the phase.
        """
        images, labels = batch["image"], batch["labels"]
        second = self.in_phase_two(step)
        with self.phase("forward"):
            levels = tuple(self.taps) if second else (4,)
            features, coarsest, class_logits = self.encode_and_classify(images, levels=levels)
        if not second:
            losses = {"cls_loss": F.multilabel_soft_margin_loss(class_logits, labels)}
            return StepResult(losses, losses["cls_loss"], Outputs(class_logits, None))
        targets = self.make_targets(features, class_logits, batch)
        return self.joint_losses(features, coarsest, class_logits, batch, targets)

    def make_targets(self, features: Features, class_logits: Tensor, batch: Batch) -> Targets:
        """Maps of the present classes, and labels from them."""
        labels = batch["labels"]
        with self.phase("cam"):
            ids, valid = class_slots(labels)
            maps = self.maps_of_slots(features, class_logits, ids, valid).sum(dim=2)
        with self.phase("pseudo_labels"):
            guide = self.guide(batch["image"])
            refined = self.refine(maps, ids, guide)
            made = self.make_labels(refined, ids, labels, batch["box"], batch.get("saliency"))
        return Targets(maps.detach(), refined, guide, made)

    def joint_losses(
        self,
        features: Features,
        coarsest: Tensor,
        class_logits: Tensor,
        batch: Batch,
        targets: Targets,
    ) -> StepResult:
        """All terms of the second phase: L = L_cls + L_ce + L_dense (+ L_sal)."""
        images, boxes, labels = batch["image"], batch["box"], targets.labels
        compat = self.official_compat
        with self.phase("forward"):
            seg_logits = self.segment(features, coarsest)  # (B, K+1, h * patch, w * patch)
            if seg_logits.shape[-2:] != images.shape[-2:]:  # no whole number of patches
                seg_logits = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
            losses = {"cls_loss": F.multilabel_soft_margin_loss(class_logits, batch["labels"])}
            total = losses["cls_loss"]
            if self.weights.seg > 0:
                losses["seg_loss"] = split_cross_entropy(seg_logits, labels.label, guard=not compat)
                total = total + self.weights.seg * losses["seg_loss"]
            if self.weights.saliency > 0 and labels.saliency is not None:
                inside = inside_boxes(boxes.to(images.device), *images.shape[-2:])
                losses["sal_loss"] = saliency_loss(
                    seg_logits,
                    labels.saliency,
                    None if compat else inside,
                    official_compat=compat,
                )
                total = total + self.weights.saliency * losses["sal_loss"]
        if self.weights.energy > 0:
            with self.phase("energy"):
                losses["reg_loss"] = self.energy(targets.guide, seg_logits, labels.label, boxes)
                total = total + losses["reg_loss"]
        return StepResult(losses, total, Outputs(class_logits, seg_logits), targets)

    def in_phase_two(self, step: int) -> bool:
        """Whether a 0-based step trains everything (getam.md section 4, "Steps")."""
        return step - 1 >= self.phase_one * self.max_steps

    def compiled_parts(self) -> list[nn.Module]:
        """The blocks; of those whose attention is read, their MLPs."""
        blocks: Any = self.backbone.vit.blocks
        return [b.mlp if i in self.map_blocks else b for i, b in enumerate(blocks)]

    def param_groups(self) -> list[dict[str, Any]]:
        """One group of everything."""
        return [{"name": "all", "params": list(self.parameters()), "lr": self.lr}]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """SGD; the official slip is getam.md section 4, "Optimiser"."""
        if self.official_compat:
            return torch.optim.SGD(groups, momentum=self.weight_decay)
        return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """(1 - step/max)^0.9 times the phase's factor; the value of the last step is kept."""
        return poly_warmup(step, max_steps=self.max_steps, warmup_steps=0) * self.lr_scale(step)

    def lr_scale(self, step: int) -> float:
        """Factor of the phase: 1, then ``phase_two_lr_scale``, falling with ``step_decay``."""
        if not self.in_phase_two(step):
            return 1.0
        drops = 0
        if self.step_decay:
            sixth = max(1, self.max_steps // 6)
            drops = int((step - self.phase_one * self.max_steps) // sixth)
        return self.phase_two_lr_scale * 0.1**drops

    # ---- pieces ------------------------------------------------------------------------------

    def encode_and_classify(
        self, images: Tensor, *, levels: Sequence[int]
    ) -> tuple[Features, Tensor, Tensor]:
        """Features for the maps and the given levels, the fourth map, class logits (B, K)."""
        features = self._encode(images, levels=levels)
        coarsest = self.level_map(features, 4)
        return features, coarsest, self.classify(coarsest)

    def _encode(self, images: Tensor, *, levels: Sequence[int]) -> Features:
        """Features with the taps of the levels and the parts of the blocks that give maps."""
        taps = [self.taps[level] for level in levels]
        return self.backbone(images, taps=taps, parts=self.map_blocks)

    def level_map(self, features: Features, level: int) -> Tensor:
        """Map of a level, 1 (finest) to 4: (B, C_level, h * f, w * f) with f = 4, 2, 1, 1/2."""
        if level not in self.taps:
            return features.stem_maps[level - 1]
        block = self.taps[level]
        patches, cls_token = features.intermediates[block], features.prefixes[block][:, 0]
        reassembled: Tensor = self.reassemble[str(level)](patches, cls_token, features.grid)
        return reassembled

    def classify(self, coarsest: Tensor) -> Tensor:
        """Class logits (B, K) from the mean of the fourth map."""
        logits: Tensor = self.classifier(coarsest.mean((2, 3)))
        return logits

    def segment(self, features: Features, coarsest: Tensor) -> Tensor:
        """Segmentation logits (B, K+1, h * patch, w * patch)."""
        maps = [*(self.level_map(features, level) for level in (1, 2, 3)), coarsest]
        size = [side * self.backbone.patch_size for side in features.grid]
        logits: Tensor = self.decoder(maps, size)
        return logits

    def maps_of_slots(
        self, features: Features, logits: Tensor, ids: Tensor, valid: Tensor
    ) -> Tensor:
        """Maps of the slots (B, S) by block, without a graph: (B, S, L, h, w)."""
        maps = slot_maps(
            logits,
            features.parts,
            ids,
            valid,
            num_prefix_tokens=self.backbone.num_prefix_tokens,
            form=self.gradient_form,
        )
        return maps.unflatten(3, features.grid)

    @staticmethod
    def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)

    def guide(self, images: Tensor) -> Tensor:
        """The pixels (B, 3, H, W) in 0..255 behind normalised images."""
        if not self.official_compat:
            return denormalise(images).round().clamp(0, 255)
        # the order of these operations decides which pixels truncation lowers by one
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images * std + mean) * 255).trunc().clamp(0, 255)

    def refine(self, maps: Tensor, ids: Tensor, guide: Tensor) -> Tensor:
        """Maps (B, S, h, w) of classes (B, S) enlarged, refined and normalised: (B, S, H, W)."""
        return normalise_maximum(self.pamr(guide, self._enlarged(maps, guide.shape[-2:])))

    @torch.no_grad()
    def make_labels(
        self, refined: Tensor, ids: Tensor, labels: Tensor, boxes: Tensor, saliency: Tensor | None
    ) -> Labels:
        """Targets of a batch, with saliency (B, H, W) where there is some; see :class:`Labels`."""
        if saliency is not None:
            targets = complete_labels(
                refined,
                ids,
                saliency > 0,
                quantile=self.quantile,
                opening=self.opening,
                official_compat=self.official_compat,
            )
        else:
            targets = Labels(self._labels_from_maps(refined, ids, labels), None)
        return self._without_padding(targets, boxes)

    def _without_padding(self, targets: Labels, boxes: Tensor) -> Labels:
        """Labels that ignore what lies outside the boxes (B, 4)."""
        if self.official_compat:
            return targets
        return targets._replace(label=ignore_outside_boxes(targets.label, boxes))

    def _labels_from_maps(self, refined: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Our rule without saliency: two thresholds on the best map, then the opening."""
        cam = refined.new_zeros(*labels.shape, *refined.shape[-2:])
        cam = cam.scatter(1, ids[:, :, None, None].expand_as(refined), refined)
        label = cam_to_label_with_ignore(
            cam, labels, high=self.high_threshold, low=self.low_threshold
        )
        return torch.where(open_region(label != 0, self.opening), label, 0)

    def energy(self, guide: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Gated dense energy of the prediction, its weight included (getam.md section 3)."""
        return dense_energy_loss(
            guide,
            logits,
            label,
            boxes,
            weight=self.weights.energy,
            # the guide holds pixels already
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255),
        )
