"""MoRe's step computed the official way, so that what our step saves can be measured.

Only the benchmark uses this. It is written from our specification (more.md section 8; item numbers
below are of that list; those of toco.md are of its section 7), not from the official code.
Parameters, random draws and losses are those of :class:`wsss.methods.more.MoRe`; only the way to
them differs. Each saving can be switched on by itself (:class:`Savings`).

Where the specification leaves open how much the official code does, the cheaper reading is taken:
images and mirror images of one size are encoded together, attention maps are not kept after a pass
without gradient, PAR's weights, pairs of tokens and the segmentation loss are computed as ours are,
and the energy uses our own lattice filter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wsss.benchmark.one_by_one import best_slots_one_by_one
from wsss.benchmark.one_hot import with_neighbours
from wsss.maps.cams import multiscale_cam
from wsss.maps.pseudo_labels import best_slots, boxes_in_patches, refine_cam_to_label
from wsss.methods.base import Batch, Step
from wsss.methods.more import contrast
from wsss.methods.more.graph import CategoryGraph, Neighbours
from wsss.methods.more.method import LABELS, TOKENS, MoRe
from wsss.models.backbone import Features


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        reuse_scale_one: item 1: the training pass also gives the unmirrored CAM of scale 1.
        aux_blocks_alone: item 2: CAM passes end at the auxiliary block while its CAM alone is
            needed.
        skip_zero_terms: items 3 and 4: terms of zero weight are not computed.
        shared_affinity: item 6 of toco.md: PAR's affinity once, not once an image and threshold.
        sliced_neighbours: PAR diffuses along slices of a padded map, not along convolutions with
            one-hot kernels.
        batched_cle: item 5: CLE in one log-sum-exp, not in loops over images and classes.
        batched_une: item 5: UNE's tokens from one box filter, not in a loop over cells with a sync
            each.
        summed_tails: item 6: the graph module sums a node's channels once, not once a neighbour.
        fused_attention: item 7: attention is never materialised.
        heads_once: item 7: CAM passes run neither decoder nor graph module.
        energy_on_device: item 4 of toco.md: the energy is filtered where the images are, not on the
            CPU.
    """

    reuse_scale_one: bool = False
    aux_blocks_alone: bool = False
    skip_zero_terms: bool = False
    shared_affinity: bool = False
    sliced_neighbours: bool = False
    batched_cle: bool = False
    batched_une: bool = False
    summed_tails: bool = False
    fused_attention: bool = False
    heads_once: bool = False
    energy_on_device: bool = False


class OfficialMoRe(MoRe):
    """MoRe with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the losses of :meth:`MoRe.losses`, those of zero weight too unless saved."""
        own = self.quirks
        always = own.zero_weight_terms or not self.savings.skip_zero_terms
        self.quirks = replace(own, zero_weight_terms=always)
        try:
            return super().losses(batch, step)
        finally:
            self.quirks = own

    # ---- tokens and maps (items 1, 2, 6, 7) ----------------------------------------------------

    def encode(self, images: Tensor) -> Features:
        """Encode images, with attention materialised where the saving is off."""
        self._set_attention()
        return super().encode(images)

    def _set_attention(self) -> None:
        for block in self.backbone.vit.blocks:
            block.attn.fused_attn = self.savings.fused_attention

    def class_tokens(self, features: Features) -> Tensor:
        """Give class tokens, by way of more sums where the saving is off."""
        if self.graph is not None:
            self.graph.__class__ = CategoryGraph if self.savings.summed_tails else GatheringGraph
        return super().class_tokens(features)

    def raw_cams(self, images: Tensor) -> list[Tensor]:
        """Compute raw CAMs, after runs of graph module and decoder that nobody uses."""
        features = self.encode(images)
        if not self.savings.heads_once:
            self.class_tokens(features)
            self.decoder(features.patch_map)
        return self.activations(features)

    def aux_activation(self, images: Tensor) -> list[Tensor]:
        """Compute the raw auxiliary CAM alone, from all blocks where the saving is off."""
        if self.savings.aux_blocks_alone:
            self._set_attention()
            return super().aux_activation(images)
        return self.raw_cams(images)[1:]

    @torch.no_grad()
    def maps(
        self, images: Tensor, features: Features, wanted: set[str], step: int
    ) -> dict[str, Tensor]:
        """Give multi-scale maps, from a further pass of scale 1 where the saving is off."""
        if self.savings.reuse_scale_one:
            return super().maps(images, features, wanted, step)
        final = wanted & LABELS or (wanted & TOKENS and self.settings.masks_are_late(step))
        with self.phase("cam"):
            raw = self.raw_cams if final else self.aux_activation
            found = multiscale_cam(raw, images, scales=self.settings.scales)
        return dict(zip(("cam", "cam_aux")[-len(found) :], found, strict=True))

    # ---- energy (item 4 of toco.md) ------------------------------------------------------------

    def energy(self, images: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the dense energy, on the CPU where the saving is off."""
        if self.savings.energy_on_device:
            return super().energy(images, logits, label, boxes)
        on_cpu = [tensor.cpu() for tensor in (images, logits, label, boxes)]
        return super().energy(*on_cpu).to(images.device)

    # ---- targets (item 5 and PAR) --------------------------------------------------------------

    def certain_tokens(self, seen: dict[str, Any], labels: Tensor) -> Tensor:
        """Give CLE, one image and class at a time where the saving is off."""
        pairs = (labels > 0).nonzero().tolist()
        if self.savings.batched_cle or not pairs:
            return super().certain_tokens(seen, labels)
        tokens, patches = seen["class_tokens"], seen["features"].patch_map
        total = tokens.new_zeros(())
        for image, label in pairs:
            one, only = slice(image, image + 1), torch.zeros_like(labels[:1])
            only[0, label] = 1
            total = total + contrast.cle_loss(
                tokens[one],
                patches[one],
                seen["cle_mask"][one],
                only,
                self.settings.temperature,
                overflowing=self.quirks.overflowing_exponentials,
            )
        return total / len(labels)

    def select_tokens(self, mask: Tensor, boxes: Tensor, batch: Batch, step: int) -> list[Tensor]:
        """Give UNE's tokens, found cell by cell where the saving is off."""
        small = min(mask.shape[1:]) <= contrast.WINDOW
        if self.savings.batched_une or small:
            return super().select_tokens(mask, boxes, batch, step)
        draws: Sequence[torch.Generator | None] = [None] * len(mask)
        if not self.quirks.shared_draws:
            draws = contrast.image_generators(self.seed, step, batch["index"])
        real = boxes_in_patches(boxes, self.backbone.patch_size)
        offset = 0 if self.quirks.corner_token else contrast.WINDOW // 2
        found = map(looped_selection, contrast.uncertainty_map(mask, real), draws)
        return [one + offset for one in found]

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Make pseudo labels; where a saving of PAR is off, it does more work."""
        par = with_neighbours(self.par, sliced=self.savings.sliced_neighbours)
        refine = best_slots if self.savings.shared_affinity else best_slots_one_by_one
        s, guide = self.settings, self.guide(images)
        high, low = s.high_threshold, s.low_threshold
        return refine_cam_to_label(
            par, guide, cam, labels, boxes=boxes, high=high, low=low, refine=refine
        )


class GatheringGraph(CategoryGraph):
    """The graph module that sums channels of the gathered tails (item 6)."""

    def gather(self, heads: Tensor, tails: Tensor, chosen: Neighbours) -> Tensor:
        """Mix the chosen tails as :meth:`CategoryGraph.gather`."""
        if self.gate != "sums":
            return super().gather(heads, tails, chosen)
        batch = torch.arange(len(tails), device=tails.device)[:, None, None]
        near = tails[batch, chosen.nodes]  # (B, K, k, D)
        share = chosen.scores.softmax(dim=2)[..., None]
        joined = torch.tanh((2 - share) * heads[:, :, None] + share * near)
        gate = near.sum(dim=3) * joined.sum(dim=3)
        return (gate.softmax(dim=2)[..., None] * near).sum(dim=2)


def looped_selection(uncertainty: Tensor, generator: torch.Generator | None) -> Tensor:
    """Choose the windows of one image's map (h, w) as :func:`contrast.select_tokens`, cell by cell.

    Returns:
        (n, 2) rows and columns of the windows' upper left corners, on the CPU.
    """
    height, width = uncertainty.shape
    window, wanted = contrast.WINDOW, contrast.WANTED
    half = window // 2
    candidates, classes, every = [], [], []
    for r in range(height - window):
        for c in range(width - window):
            centre = uncertainty[r + half, c + half].item()  # a sync each on a GPU
            every.append((r, c))
            if centre == contrast.CLASS:
                classes.append((r, c))
            if centre != contrast.UNCERTAIN:
                continue
            mean = uncertainty[r : r + window, c : c + window].double().mean()
            if mean.item() >= contrast.RATIO:
                candidates.append((r, c))
    if len(candidates) > wanted:
        order = torch.randperm(len(candidates), generator=generator)[:wanted]
        return torch.tensor([candidates[i] for i in order])
    extra = (wanted - len(candidates)) // 4
    pool = classes if len(classes) >= extra else every
    drawn = torch.randperm(len(pool), generator=generator)[:extra]
    return torch.tensor([*candidates, *(pool[i] for i in drawn)], dtype=torch.long).view(-1, 2)
