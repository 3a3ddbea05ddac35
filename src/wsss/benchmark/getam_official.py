"""GETAM's step computed the official way, so that what our step saves can be measured.

Only the benchmark and the tests use this. It is written from our specification (getam.md sections
2, 3 and 7), not from the official code. Parameters and losses are those of
:class:`wsss.methods.getam.GETAM`; only the way to them differs. Each saving can be switched on by
itself (:class:`Savings`).

Where the specification leaves open how much the official code does, the cheaper reading is taken:
gradients are asked for and not accumulated, PAMR's weights are computed as ours are, and the energy
uses our own lattice filter.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.benchmark.one_hot import diffuse_by_convolution
from wsss.maps.cams import normalise_maximum
from wsss.maps.refine.neighbours import diffuse
from wsss.methods.base import Batch, Step
from wsss.methods.getam.labels import BACKGROUND_POWER, Labels
from wsss.methods.getam.maps import attention_and_slope, attention_term, by_class, enlarged
from wsss.methods.getam.method import GETAM, Encoded
from wsss.models.backbone import Features
from wsss.models.decoders import Reassemble


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        shared_forward: the forward pass of the maps also serves the losses.
        last_blocks: gradients go down to the last six blocks' attention only, not through the whole
            encoder and into every parameter.
        class_slots: one backward pass a class slot of the batch, not one an image and class.
        fused_attention: only the class token's row of attention and gradient, in closed form; not
            all of both in every block.
        present_classes: PAMR of the present classes of all images at once, not of K channels image
            by image.
        sliced_neighbours: PAMR diffuses along slices of a padded map, not along convolutions with
            one-hot kernels.
        no_graph: maps have no graph, so PAMR keeps nothing for a backward pass that never comes.
        vectorised_labels: labels where the images are, not image by image in NumPy.
        energy_on_device: the energy is filtered where the images are, not on the CPU.
        contiguous_maps: the decoder's maps lie channel by channel; a transposed view of the
            tokens, as DPT's decoder makes it (``act_postprocess`` 1 and 2), passes for
            channels-last, whose convolutions have a slow backward pass on CPUs.
    """

    shared_forward: bool = False
    last_blocks: bool = False
    class_slots: bool = False
    fused_attention: bool = False
    present_classes: bool = False
    sliced_neighbours: bool = False
    no_graph: bool = False
    vectorised_labels: bool = False
    energy_on_device: bool = False
    contiguous_maps: bool = False


class OfficialGETAM(GETAM):
    """GETAM with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the losses of :meth:`GETAM.losses` as :attr:`savings` says."""
        if self.savings.shared_forward or not self.in_phase_two(step):
            return super().losses(batch, step)
        with self.phase("forward"):
            encoded = self.encode(batch["image"], levels=(4,))
        targets = self.targets(encoded, batch)
        with self.phase("forward"):
            encoded = self.encode(batch["image"], levels=tuple(self.taps))
        return self.joint_losses(encoded, batch, targets)

    def level_map(self, features: Features, level: int) -> Tensor:
        """Give the map of :meth:`GETAM.level_map`, a transposed view where the saving is off."""
        if self.savings.contiguous_maps or level not in self.taps:
            return super().level_map(features, level)
        block, part = self.taps[level], self.reassemble[str(level)]
        assert isinstance(part, Reassemble)
        tokens = part.read(features.intermediates[block], features.prefixes[block][:, 0])
        view = tokens.transpose(1, 2).unflatten(2, features.grid)
        level_map: Tensor = part.resize(part.narrow(view))
        return level_map

    # ---- maps --------------------------------------------------------------------------------

    def encode(self, images: Tensor, *, levels: Sequence[int]) -> Encoded:
        """Run one pass as :meth:`GETAM.encode`, for all blocks' attention where savings are off."""
        blocks = self.map_blocks if self.savings.last_blocks else range(self.backbone.depth)
        wanted = {"parts" if self.savings.fused_attention else "attentions": tuple(blocks)}
        taps = [self.taps[level] for level in levels]
        features = self.backbone(images, taps=taps, **wanted)
        coarsest = self.level_map(features, 4)
        return Encoded(features, coarsest, self.classify(coarsest))

    def maps_of_slots(self, encoded: Encoded, ids: Tensor, valid: Tensor) -> Tensor:
        """Compute maps of the slots, (B, S, L, h, w), with a graph unless a saving cuts it."""
        features, logits = encoded.features, encoded.class_logits
        depth, tokens = len(self.map_blocks), features.patch_tokens.shape[1]
        slots: list[list[Tensor]] = [
            [logits.new_zeros(depth, tokens) for _ in range(ids.shape[1])] for _ in ids
        ]
        for chosen, places in self._backward_passes(logits, ids, valid):
            terms = self._terms(features, chosen)  # (B, L, N)
            for image, slot in places:
                slots[image][slot] = terms[image]
        stacked = torch.stack([torch.stack(image) for image in slots])
        if self.savings.no_graph:
            stacked = stacked.detach()
        return stacked.unflatten(3, features.grid)

    def _backward_passes(
        self, logits: Tensor, ids: Tensor, valid: Tensor
    ) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        """Yield what is differentiated, and the (image, slot) pairs that it gives the maps of."""
        pairs = [(int(i), int(s)) for i, s in valid.nonzero()]
        if self.savings.class_slots:
            for slot in range(ids.shape[1]):
                places = [pair for pair in pairs if pair[1] == slot]
                yield torch.stack([logits[i, ids[i, s]] for i, s in places]).sum(), places
            return
        for image, slot in pairs:
            yield logits[image, ids[image, slot]], [(image, slot)]

    def _terms(self, features: Features, chosen: Tensor) -> Tensor:
        """Compute the class token's row of every block's share for one scalar, (B, L, N)."""
        parts, maps = features.parts, features.attentions
        kept = (
            {index: part.output for index, part in parts.items()}
            if self.savings.fused_attention
            else maps
        )
        inputs = list(kept.values())
        if not self.savings.last_blocks:
            inputs += list(self.parameters())
        found = torch.autograd.grad(chosen, inputs, retain_graph=True, allow_unused=True)
        gradients = dict(zip(kept, found, strict=False))
        rows = []
        for block in self.map_blocks:
            if self.savings.fused_attention:
                both = attention_and_slope(parts[block], gradients[block])
            else:
                both = maps[block], gradients[block]
            rows.append(attention_term(*both)[:, 0, self.backbone.num_prefix_tokens :])
        return torch.stack(rows, dim=1)

    # ---- refinement and labels -----------------------------------------------------------------

    def refine(self, maps: Tensor, ids: Tensor, guide: Tensor) -> Tensor:
        """Refine maps of the slots, by way of all K channels where a saving is off."""
        savings = self.savings
        if savings.present_classes and savings.no_graph and savings.sliced_neighbours:
            return super().refine(maps, ids, guide)
        full = enlarged(maps, guide.shape[-2:])
        if not self.savings.present_classes:
            places = ids[:, :, None, None].expand_as(full)
            full = by_class(full, ids, self.num_classes)
        spread = diffuse if savings.sliced_neighbours else diffuse_by_convolution
        one_by_one = []
        for image, one in zip(guide.split(1), full.split(1), strict=True):
            affinity = self.pamr.affinity(image)
            with torch.no_grad() if self.savings.no_graph else nullcontext():
                one_by_one.append(spread(affinity, one, self.pamr.dilations, self.pamr.num_iter))
        refined = normalise_maximum(torch.cat(one_by_one)).detach()
        return refined if self.savings.present_classes else refined.gather(1, places)

    def make_labels(
        self, refined: Tensor, ids: Tensor, labels: Tensor, boxes: Tensor, saliency: Tensor | None
    ) -> Labels:
        """Make labels, image by image in NumPy where a saving is off and there is saliency."""
        if self.savings.vectorised_labels or saliency is None:
            return super().make_labels(refined, ids, labels, boxes, saliency)
        results = [
            self._numpy_labels(maps, classes, salient)
            for maps, classes, salient in zip(
                refined.cpu().numpy(), ids.cpu().numpy(), saliency.cpu().numpy() > 0, strict=True
            )
        ]
        label, completed = (torch.from_numpy(np.stack(each)) for each in zip(*results, strict=True))
        targets = Labels(label.to(refined.device), completed.to(refined.device))
        return self.without_padding(targets, boxes)

    def _numpy_labels(
        self, maps: NDArray[Any], classes: NDArray[Any], salient: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Make labels and completed saliency (H, W) of one image; maps (S, H, W)."""
        quantile, side = self.settings.quantile, self.settings.opening
        best = maps.max(0)
        scores = np.concatenate([((1 - best) ** BACKGROUND_POWER)[None], maps])
        slot = scores.argmax(0)
        label = np.where(slot == 0, 255, classes[slot - 1] + 1).astype(np.int64)
        label[~salient] = 0
        claims = np.zeros(label.shape, np.int64)
        claimed = np.zeros_like(label)
        for one, class_index in zip(maps, classes, strict=True):
            positive = np.sort(one[one > 0])
            index = 0 if quantile is None else int(quantile * len(positive))
            if index == 0:
                continue
            above = (one > positive[index]) & ~salient
            claimed[above & (claims == 0)] = class_index + 1
            claims += above
        if not self.quirks.contested_to_lowest:
            claimed[claims > 1] = 255
        label[claims > 0] = claimed[claims > 0]
        completed = np.where(claims > 0, 255, salient).astype(np.uint8)
        square = np.ones((side, side), np.uint8)
        eroded = cv2.erode((label != 0).astype(np.uint8), square)
        # OpenCV dilates with the erosion's own offsets; the other anchor centres an even square
        anchor = (-1, -1) if self.quirks.shifted_opening else ((side - 1) // 2,) * 2
        opened = cv2.dilate(eroded, square, anchor=anchor) > 0
        label[~opened] = 0
        if not self.quirks.unopened_saliency:
            completed[(claims > 0) & ~opened] = 0
        return label, completed

    def energy(self, guide: Tensor, logits: Tensor, label: Tensor, boxes: Tensor) -> Tensor:
        """Compute the dense energy, on the CPU where the saving is off."""
        if self.savings.energy_on_device:
            return super().energy(guide, logits, label, boxes)
        on_cpu = [tensor.cpu() for tensor in (guide, logits, label, boxes)]
        return super().energy(*on_cpu).to(logits.device)
