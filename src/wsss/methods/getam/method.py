"""GETAM: gradient-weighted element-wise transformer attention maps (arXiv 2112.02841).

Idea: an attention of the class token matters for a class as far as the class's score depends on it,
which is the attention times its gradient. The maps of the last six blocks, coupled with the
gradient once more and added up, locate the class. They are refined along the image (PAMR),
completed with saliency where there is some, and a DPT-like decoder on the same transformer learns
from them. The first half of the run trains the classifier alone, the second everything, with labels
made anew at every step.

Paper: Sun et al., "GETAM: Gradient-weighted Element-wise Transformer Attention Map for
Weakly-supervised Semantic Segmentation".
Official code (read by the authors of our specification, getam.md, not by us): HEAD ``766dc62``.
Departures: official.py, one switch each.
Ours, since the official code has no such thing: without saliency maps a pixel is background up to
``low_threshold`` of its refined maps, foreground above ``high_threshold``, undecided between; runs
whose size is not a multiple of two patches; encoders of any depth (taps after each quarter of the
blocks, maps of the last six at most).
Several processes: all gradients are averaged in both phases. The classification loss, and so the
first phase, and the energy are means over images. Cross-entropy and saliency loss divide by pixels
of one forward pass, and the decoder's batch norms see the images of one;
``trainer.sync_batchnorm=true`` lets them see those of all processes (on GPUs). Without it their
running statistics are averaged after each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor, nn

from wsss.core.ranges import BelowOne, Count, Fraction, NotNegative, Positive, Width
from wsss.maps.cams import normalise_maximum
from wsss.maps.pseudo_labels import ignore_outside_boxes, inside_boxes
from wsss.maps.refine.pamr import PAMR
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.getam.labels import (
    Labels,
    Targets,
    complete_labels,
    saliency_loss,
    split_cross_entropy,
    threshold_labels,
)
from wsss.methods.getam.maps import (
    GradientForm,
    by_class,
    class_slots,
    enlarged,
    guide_pixels,
    slot_maps,
)
from wsss.methods.getam.official import CORRECTED, Quirks
from wsss.methods.losses import dense_energy_loss
from wsss.methods.schedules import poly_warmup
from wsss.methods.settings import ThresholdSettings
from wsss.models.backbone import Backbone, Features
from wsss.models.decoders import DPTDecoder, dpt_levels, level_map, reassembly


@dataclass(frozen=True, kw_only=True)
class GETAMSettings(ThresholdSettings):
    """Settings of GETAM; the defaults are those of the official VOC command."""

    # optimiser
    lr: Positive = 0.04  # SGD's, of everything
    momentum: BelowOne = 0.0  # SGD's
    weight_decay: NotNegative = 5e-4  # SGD's
    phase_one: Fraction = 0.5  # share of the run that trains the classifier alone
    phase_two_lr_scale: NotNegative = 0.1  # on the learning rate afterwards
    step_decay: bool = False  # a further tenth after every sixth of the run

    # network
    # widths of the four levels, finest first; None: D/8, D/4, D/2, D
    tap_channels: Annotated[tuple[Count, ...], Len(4, 4)] | None = None
    decoder_channels: Width = 256  # width of the decoder

    # maps and labels
    gradient_form: GradientForm = "coupled"  # how attention and gradient make a map
    map_layers: Count = 6  # last blocks whose maps are summed; all where there are fewer
    quantile: BelowOne | None = 0.9  # of a map, completes above it; COCO 0.95; None: no completion
    opening: Width = 10  # side in pixels of the square that opens the labels
    low_threshold: Fraction = 0.077  # without saliency: background up to it
    high_threshold: Fraction = 0.2  # without saliency: foreground above it

    # losses
    seg_weight: NotNegative = 1.0  # of the split cross-entropy
    energy_weight: NotNegative = 1e-7  # of the dense energy
    saliency_weight: NotNegative = 1.0  # of the saliency loss, where the data has saliency maps


class Encoded(NamedTuple):
    """What one pass through the encoder gives."""

    features: Features  # taps of the wanted levels, attention parts of the blocks with maps
    coarsest: Tensor  # map of level 4, (B, C, h/2, w/2)
    class_logits: Tensor  # (B, K)


class GETAM(WSSSModule):
    """Gradient-weighted attention maps and a DPT decoder on the shared transformer.

    Example:
        >>> backbone = Backbone(name="vit_tiny_patch16_224", weights="random")
        >>> settings = GETAMSettings(max_steps=52900)
        >>> GETAM(backbone=backbone, num_classes=20, settings=settings).map_blocks
        (6, 7, 8, 9, 10, 11)

    Args:
        backbone: shared encoder, plain or hybrid; one prefix token, or two of a distilled DeiT.
        num_classes: K, foreground classes.
        settings: see :class:`GETAMSettings`.
        quirks: which of the official code's departures to keep.

    Raises:
        WSSSError: the backbone has no class token, or fewer than four blocks.
    """

    settings: GETAMSettings

    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        settings: GETAMSettings,
        quirks: Quirks = CORRECTED,
    ) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        s, depth = settings, backbone.depth
        levels = dpt_levels(backbone, s.tap_channels)
        self.quirks = self.follow(quirks)
        if quirks.bilinear_positions:
            backbone.position_mode = "bilinear"

        self.map_blocks = tuple(range(max(0, depth - s.map_layers), depth))
        self.taps = levels.taps  # level 1 (finest) to 4 -> the block that it reads
        self.reassemble = reassembly(backbone.dim, levels)
        self.classifier = nn.Linear(levels.widths[3], num_classes)
        self.decoder = DPTDecoder(
            in_channels=levels.widths, num_outputs=num_classes + 1, channels=s.decoder_channels
        )
        self.pamr = PAMR()

    # ---- what an evaluator sees -------------------------------------------------------------

    def forward(self, images: Tensor) -> Outputs:
        """Give class logits (B, K) and segmentation logits (B, K+1, H, W) of the whole patches."""
        features = self.backbone(images, taps=tuple(self.taps.values()))
        coarsest = self.level_map(features, 4)
        return Outputs(self.classify(coarsest), self.segment(features, coarsest))

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give maps over their maximum, not refined, (B, K, H, W); absent classes are zero."""
        maps, _, ids = self._maps_of(images, labels)
        full = normalise_maximum(enlarged(maps.sum(dim=2), images.shape[-2:]))
        return by_class(full, ids, labels.shape[1])

    def gallery_maps(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Show the share of every block in the map of the image's strongest present class."""
        maps, logits, ids = self._maps_of(images, labels)
        scores = logits.masked_fill(labels <= 0, -torch.inf).gather(1, ids)  # (B, S)
        chosen = maps[torch.arange(len(maps)), scores.argmax(dim=1)]  # (B, L, h, w)
        full = enlarged(chosen, images.shape[-2:])
        shown = full / full.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(full.dtype).tiny)
        return {f"block {block}": shown[:, i] for i, block in enumerate(self.map_blocks)}

    @torch.enable_grad()  # the evaluator switches gradients off
    def _maps_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give maps (B, S, L, h, w), class logits (B, K), class indices (B, S); without a graph."""
        encoded = self.encode(images, levels=(4,))
        ids, valid = class_slots(labels)
        return self.maps_of_slots(encoded, ids, valid), encoded.class_logits.detach(), ids

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute L_cls in the first phase, all terms of getam.md section 3 in the second.

        Args:
            batch: ``image`` (B, 3, H, W), ``labels`` (B, K), ``box`` (B, 4: real pixels as row
                start, row end, column start, column end) and, where the data has saliency maps,
                ``saliency`` (B, H, W), salient above 0.
            step: decides the phase.
        """
        second = self.in_phase_two(step)
        with self.phase("forward"):
            encoded = self.encode(batch["image"], levels=tuple(self.taps) if second else (4,))
        if second:
            return self.joint_losses(encoded, batch, self.targets(encoded, batch))
        loss = F.multilabel_soft_margin_loss(encoded.class_logits, batch["labels"])
        return Step({"cls_loss": loss}, loss, Outputs(encoded.class_logits, None))

    def targets(self, encoded: Encoded, batch: Batch) -> Targets:
        """Make maps of the present classes, refine them, and make labels from them."""
        labels = batch["labels"]
        with self.phase("cam"):
            ids, valid = class_slots(labels)
            maps = self.maps_of_slots(encoded, ids, valid).sum(dim=2)
        with self.phase("pseudo_labels"):
            guide = self.guide(batch["image"])
            refined = self.refine(maps, ids, guide)
            made = self.make_labels(refined, ids, labels, batch["box"], batch.get("saliency"))
        return Targets(maps.detach(), refined, guide, made)

    def joint_losses(self, encoded: Encoded, batch: Batch, targets: Targets) -> Step:
        """Compute all terms of the second phase: L = L_cls + L_ce (+ L_sal) + L_dense.

        A term without weight is not computed; the energy's weight is in its term.
        """
        s, quirks, images, boxes = self.settings, self.quirks, batch["image"], batch["box"]
        class_logits, made = encoded.class_logits, targets.labels
        with self.phase("forward"):
            seg_logits = self.segment(encoded.features, encoded.coarsest)
            if seg_logits.shape[-2:] != images.shape[-2:]:  # no whole number of patches
                seg_logits = F.interpolate(seg_logits, images.shape[-2:], mode="bilinear")
            losses = {"cls_loss": F.multilabel_soft_margin_loss(class_logits, batch["labels"])}
            total = losses["cls_loss"]
            if s.seg_weight > 0:
                guard = not quirks.nan_without_pixels
                losses["seg_loss"] = split_cross_entropy(seg_logits, made.label, guard=guard)
                total = total + s.seg_weight * losses["seg_loss"]
            if s.saliency_weight > 0 and made.saliency is not None:
                inside = inside_boxes(boxes.to(images.device), *images.shape[-2:])
                counted = None if quirks.padding_in_saliency_loss else inside
                losses["sal_loss"] = saliency_loss(
                    seg_logits, made.saliency, counted, inverted=quirks.inverted_saliency
                )
                total = total + s.saliency_weight * losses["sal_loss"]
        if s.energy_weight > 0:
            with self.phase("energy"):
                losses["reg_loss"] = self.energy(targets.guide, seg_logits, made.label, boxes)
                total = total + losses["reg_loss"]
        return Step(losses, total, Outputs(class_logits, seg_logits), targets._asdict())

    def in_phase_two(self, step: int) -> bool:
        """Say whether a 0-based step trains everything (getam.md section 4, "Steps")."""
        return step - 1 >= self.settings.phase_one * self.settings.max_steps

    def compiled_parts(self) -> list[nn.Module]:
        """Give the blocks; of those whose attention is read, their MLPs."""
        blocks: Any = self.backbone.vit.blocks
        return [b.mlp if i in self.map_blocks else b for i, b in enumerate(blocks)]

    def param_groups(self) -> list[dict[str, Any]]:
        """Put everything into one group."""
        return [{"name": "all", "params": list(self.parameters()), "lr": self.settings.lr}]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build SGD; the official slip is getam.md section 4, "Optimiser"."""
        s = self.settings
        if self.quirks.decay_in_momentum:
            return torch.optim.SGD(groups, momentum=s.weight_decay)
        return torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """Compute (1 - step/max)^0.9 times the phase's factor; the last step's value is kept."""
        decay = poly_warmup(step, max_steps=self.settings.max_steps, warmup_steps=0)
        return decay * self.lr_scale(step)

    def lr_scale(self, step: int) -> float:
        """Give the phase's factor: 1, then ``phase_two_lr_scale``, falling with ``step_decay``."""
        s, sixth = self.settings, max(1, self.settings.max_steps // 6)
        if not self.in_phase_two(step):
            return 1.0
        drops = int((step - s.phase_one * s.max_steps) // sixth) if s.step_decay else 0
        return s.phase_two_lr_scale * 0.1**drops

    # ---- network -----------------------------------------------------------------------------

    def encode(self, images: Tensor, *, levels: Sequence[int]) -> Encoded:
        """Run one pass with what the maps and the given levels need, level 4 among them."""
        taps = [self.taps[level] for level in levels]
        features = self.backbone(images, taps=taps, parts=self.map_blocks)
        coarsest = self.level_map(features, 4)
        return Encoded(features, coarsest, self.classify(coarsest))

    def level_map(self, features: Features, level: int) -> Tensor:
        """Give the map of a level, 1 (finest) to 4: (B, C, h * f, w * f) with f = 4, 2, 1, 1/2."""
        return level_map(features, level, self.taps, self.reassemble)

    def classify(self, coarsest: Tensor) -> Tensor:
        """Compute class logits (B, K) from the mean of the fourth map."""
        return self.classifier(coarsest.mean((2, 3)))

    def segment(self, features: Features, coarsest: Tensor) -> Tensor:
        """Compute segmentation logits (B, K+1, h * patch, w * patch)."""
        maps = [*(self.level_map(features, level) for level in (1, 2, 3)), coarsest]
        size = [side * self.backbone.patch_size for side in features.grid]
        return self.decoder(maps, size)

    # ---- targets -----------------------------------------------------------------------------

    def maps_of_slots(self, encoded: Encoded, ids: Tensor, valid: Tensor) -> Tensor:
        """Compute maps of the slots (B, S) by block, without a graph: (B, S, L, h, w)."""
        features, logits, form = encoded.features, encoded.class_logits, self.settings.gradient_form
        first = self.backbone.num_prefix_tokens
        maps = slot_maps(logits, features.parts, ids, valid, num_prefix_tokens=first, form=form)
        return maps.unflatten(3, features.grid)

    def guide(self, images: Tensor) -> Tensor:
        """Give the pixels (B, 3, H, W) in 0..255 behind normalised images."""
        return guide_pixels(images, truncated=self.quirks.truncated_guide)

    def refine(self, maps: Tensor, ids: Tensor, guide: Tensor) -> Tensor:
        """Enlarge, refine and normalise maps (B, S, h, w) of classes (B, S): (B, S, H, W)."""
        return normalise_maximum(self.pamr(guide, enlarged(maps, guide.shape[-2:])))

    @torch.no_grad()
    def make_labels(
        self, refined: Tensor, ids: Tensor, labels: Tensor, boxes: Tensor, saliency: Tensor | None
    ) -> Labels:
        """Make labels of a batch, completed with saliency (B, H, W) where there is some."""
        s, quirks = self.settings, self.quirks
        if saliency is None:
            low, high, side = s.low_threshold, s.high_threshold, s.opening
            made = threshold_labels(refined, ids, labels, low=low, high=high, opening=side)
            return self.without_padding(made, boxes)
        made = complete_labels(
            refined,
            ids,
            saliency > 0,
            quantile=s.quantile,
            opening=s.opening,
            contested_to_lowest=quirks.contested_to_lowest,
            shifted_opening=quirks.shifted_opening,
            unopened_saliency=quirks.unopened_saliency,
        )
        return self.without_padding(made, boxes)

    def without_padding(self, made: Labels, boxes: Tensor) -> Labels:
        """Ignore what lies outside the boxes (B, 4)."""
        if self.quirks.padding_as_background:
            return made
        return made._replace(label=ignore_outside_boxes(made.label, boxes))

    def energy(self, guide: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the gated dense energy, its weight included (getam.md section 3)."""
        # the guide holds pixels already
        mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
        weight = self.settings.energy_weight
        return dense_energy_loss(guide, logits, label, boxes, weight=weight, mean=mean, std=std)
