"""ClusterCAM's step computed the official way, so that what our step saves can be measured.

Only the benchmark uses this. It is written from our specification (clustercam.md section 7,
"Speed-ups"; item numbers below are of that list), not from the official code. Parameters, random
draws and losses are those of :class:`wsss.methods.clustercam.ClusterCAM`; only the way to them
differs. Each saving can be switched on by itself (:class:`Savings`).

Where the specification leaves open how much the official code does, the cheaper reading is taken:
attention maps are stacked in CAM passes only, PAR's weights are computed as ours are, and the
decoder is left out of CAM passes (the page says so).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wsss.benchmark.one_by_one import best_slots_one_by_one
from wsss.benchmark.one_hot import with_neighbours
from wsss.maps.pseudo_labels import best_slots, refine_cam_to_label
from wsss.methods.base import Batch, Step
from wsss.methods.clustercam.method import ClusterCAM
from wsss.methods.clustercam.network import BlockOutput, Encoded
from wsss.models.class_tokens import attend


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        running_affinity: item 1: patch-to-patch attention is summed row by row while the blocks
            run, not kept for all blocks and heads, stacked and then summed.
        fused_attention: item 2: attention is never materialised outside CAM passes.
        cams_first: the page's peak of 6.9 GB is its training graph and its CAM maps together: CAMs
            are made before the graph exists, not beside it.
        present_classes: item 3: CAM, product and refinement of the batch's classes alone.
        shared_affinity: item 4: PAR's affinity once, not once an image and threshold.
        sliced_neighbours: item 4: PAR diffuses along slices of a padded map, not along convolutions
            with one-hot kernels.
        patch_logit_sums: item 5: patch logits from nine sums a channel, not from a convolution.
    """

    running_affinity: bool = False
    fused_attention: bool = False
    cams_first: bool = False
    present_classes: bool = False
    shared_affinity: bool = False
    sliced_neighbours: bool = False
    patch_logit_sums: bool = False


class OfficialClusterCAM(ClusterCAM):
    """ClusterCAM with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the losses of :meth:`ClusterCAM.losses` as :attr:`savings` says."""
        if self.savings.cams_first or not self.learns_segmentation(step):
            return super().losses(batch, step)
        images, labels = batch["image"], batch["labels"]
        with self.phase("forward"):
            encoded = self.encode(images)
        targets = self.targets(images, labels)
        with self.phase("forward"):
            return self.losses_of(encoded, labels, targets)

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Make CAMs, of all classes where item 3 is off."""
        if self.savings.present_classes:
            return super().cams(images, labels)
        return super().cams(images, torch.ones_like(labels)) * labels[..., None, None]

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """Make pseudo labels; where a saving of item 4 is off, PAR does more work."""
        par = with_neighbours(self.par, sliced=self.savings.sliced_neighbours)
        refine = best_slots if self.savings.shared_affinity else best_slots_one_by_one
        s, guide = self.settings, self.guide(images)
        high, low = s.high_threshold, s.low_threshold
        return refine_cam_to_label(par, guide, cam, labels, high=high, low=low, refine=refine)

    def patch_logits(self, activation: Tensor) -> Tensor:
        """Compute patch logits, from a whole map where item 5 is off."""
        if self.savings.patch_logit_sums:
            return super().patch_logits(activation)
        return self.patch_head(activation).mean(dim=(-2, -1))

    def encode(
        self, images: Tensor, *, with_affinity: bool = False, keep: list[BlockOutput] | None = None
    ) -> Encoded:
        """Run all blocks; where item 1 is off their maps are stacked at the end of a CAM pass."""
        self.maps: list[Tensor] = []
        encoded = super().encode(images, with_affinity=with_affinity, keep=keep)
        if self.maps:
            affinity = torch.stack(self.maps).mean(dim=2).sum(dim=0)  # (L, B, heads, N, N)
            encoded = encoded._replace(affinity=affinity)
            self.maps = []
        return encoded

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        num_classes: int,
        affinity: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend in branch A with its whole attention map, unless a saving forbids it."""
        saved = self.savings.fused_attention if affinity is None else self.savings.running_affinity
        if saved:
            return attend(queries, keys, values, num_classes, affinity)
        weights = (queries @ keys.transpose(-2, -1)).softmax(dim=-1)
        if affinity is not None:
            self.maps.append(weights[..., num_classes:, num_classes:])
        return weights @ values, weights[:, :, :num_classes, num_classes:]
