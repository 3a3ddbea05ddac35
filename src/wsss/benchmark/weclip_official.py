"""WeCLIP's step computed the official way, so that what our step saves can be measured.

Only the benchmark uses this. It is written from our specification (weclip.md section 9; item
numbers below are of that list), not from the official code. Parameters, random draws and losses are
those of :class:`wsss.methods.weclip.WeCLIP`; only the way to them differs. Each saving can be
switched on by itself (:class:`Savings`). Every image shows a class: one without stops the official
code (Q3).

Where the specification leaves open how much the official code does, the cheaper reading is taken:
the first blocks run on the whole batch and average their attention head by head, gradients of the
last block's weights are asked for and not accumulated, the affinity of patches is normalised for
the whole batch, and PAR's weights are computed as ours are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from wsss.benchmark.one_hot import with_neighbours
from wsss.methods.losses import full_precision, widened
from wsss.methods.weclip import tower
from wsss.methods.weclip.affinity import box_mask, learned_base, refine, transition
from wsss.methods.weclip.gradcam import (
    LastBlock,
    Slots,
    Texts,
    grad_cam,
    text_logits,
    unit_range,
)
from wsss.methods.weclip.method import WeCLIP
from wsss.methods.weclip.tower import Encoded
from wsss.models.vit import block_with_attention


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What our step saves, one switch an item; False computes it the official way.

    Attributes:
        shared_forward: item 1: one forward pass of the last block for all images and classes, not
            one an image and class.
        closed_form: items 1 and 2: channel weights of all classes in closed form, from sums before
            the weights; not a whole backward pass an image and class, into the block's weights too.
        two_products: item 3: T T v as T (T v), not from the square of T.
        needed_attention: item 5: attention maps of the blocks that the refinement reads; fused
            attention elsewhere.
        boxes_together: item 7: boxes of all maps at once where the maps are, not map by map on the
            CPU by OpenCV.
        batched_par: item 7: PAR of the whole batch, not image by image.
        sliced_neighbours: PAR diffuses along slices of a padded map, not along convolutions with
            one-hot kernels.
    """

    shared_forward: bool = False
    closed_form: bool = False
    two_products: bool = False
    needed_attention: bool = False
    boxes_together: bool = False
    batched_par: bool = False
    sliced_neighbours: bool = False


class OfficialWeCLIP(WeCLIP):
    """WeCLIP with every saving switched off; :attr:`savings` switches single ones on."""

    savings = Savings()

    # ---- encoder (item 5) ----------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor, *, layers: int = 0) -> Encoded:
        """Run the blocks before the last, with attention of all of them unless saved.

        The last one belongs to the CAM.
        """
        if not layers:
            return super().encode(images)
        backbone = self.backbone
        images = tower.whole_patches(images, backbone.patch_size, cut=self.quirks.dropped_remainder)
        images = tower.renormalised(images, self.settings.normalisation)
        before = backbone.depth - 1
        first = max(0, backbone.depth - layers) if self.savings.needed_attention else 0
        wanted = range(first, before)
        features = backbone(images, taps=range(before), mean_attentions=wanted, blocks=before)
        tokens = [
            torch.cat([features.prefixes[index], features.intermediates[index]], dim=1)
            for index in range(before)
        ]
        attentions = [features.mean_attentions[index] for index in wanted]
        return Encoded(tokens, attentions, None, backbone.num_prefix_tokens, features.grid)

    # ---- maps (items 1, 2, 3, 7) ---------------------------------------------------------------

    @torch.no_grad()
    def refined_maps(self, encoded: Encoded, slots: Slots, related: Tensor | None) -> Tensor:
        """Refine maps as :meth:`WeCLIP.refined_maps`, as :attr:`savings` says."""
        layers, prefix = self.layers(related is not None), encoded.num_prefix
        with full_precision(encoded.tokens[-1]):
            cam, last = self._grad_cams(widened(encoded.tokens[-1]), slots)
            cam = cam.unflatten(2, encoded.grid)  # (B, S, h, w)
            boxed = (cam * self._boxes(cam)).flatten(2)
            every = [*map(widened, encoded.attentions), last][-layers:]
            attention = torch.stack(every, dim=1)[:, :, prefix:, prefix:]
            base = attention.mean(1)
            if related is not None:
                base = learned_base(attention, related, self.settings.rfm_filter)
            return self._spread(boxed, base, slots).unflatten(2, encoded.grid)

    def _spread(self, maps: Tensor, base: Tensor, slots: Slots) -> Tensor:
        if self.savings.two_products:
            return refine(maps, base)
        step = transition(base)
        spread = torch.zeros_like(maps)
        for image, square in enumerate(step @ step):  # N x N x N each
            for slot in slots[1][image].nonzero()[:, 0].tolist():
                spread[image, slot] = square @ maps[image, slot]
        return spread

    def _boxes(self, cam: Tensor) -> Tensor:
        """Mark boxes (B, S, h, w) of maps."""
        threshold, quirks = self.settings.box_threshold, self.quirks
        kinds = {"eight_bit": quirks.eight_bit_boxes, "open_edge": quirks.open_boxes}
        if self.savings.boxes_together:
            return box_mask(cam, threshold, **kinds)
        one_by_one = [boxes_by_opencv(one, threshold, **kinds) for one in cam.flatten(0, 1)]
        return torch.stack(one_by_one).view_as(cam)

    def _grad_cams(self, tokens: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Compute the Grad-CAM of every slot, its range stretched twice, and the last attention.

        Args:
            tokens: into the last block, (B, L, D).
            slots: class indices and validity, each (B, S).

        Returns:
            (B, S, N), zero in empty slots, and the head-mean attention (B, L, L).
        """
        cams_of = self._closed_cams if self.savings.closed_form else self._backward_cams
        if self.savings.shared_forward:
            return cams_of(tokens, self.texts(), slots)
        ids, valid = slots
        count = tokens.shape[1]
        cam = tokens.new_zeros(*ids.shape, count - self.backbone.num_prefix_tokens)
        attention = tokens.new_zeros(len(tokens), count, count)
        single = ids.new_zeros(1, 1), valid.new_ones(1, 1)
        for image, slot in valid.nonzero().tolist():
            one, classes = slice(image, image + 1), ids[image, valid[image]]
            found, attention[one] = cams_of(tokens[one], self._texts_of(classes, slot), single)
            cam[image, slot] = found[0, 0]
        return cam, attention

    def _texts_of(self, classes: Tensor, slot: int) -> Texts:
        """Give texts of one of an image's classes; the others stand with the backgrounds."""
        texts = self.texts()
        own, others = classes[slot], torch.cat([classes[:slot], classes[slot + 1 :]])
        rest = torch.cat([texts.foreground[others], texts.background])
        return Texts(texts.foreground[own][None], rest, texts.scale)

    def _closed_cams(self, tokens: Tensor, texts: Texts, slots: Slots) -> tuple[Tensor, Tensor]:
        """Compute :meth:`_grad_cams` of images whose slots share a pass, in closed form."""
        vit, prefix = self.backbone.vit, self.backbone.num_prefix_tokens
        last = LastBlock.run(vit.blocks[-1], vit.norm, self.backbone.projection, tokens, prefix)
        maps = grad_cam(last, texts, slots, of_probability=self.quirks.vanishing_gradient)
        return maps.cam, last.attention.mean(1)

    def _backward_cams(self, tokens: Tensor, texts: Texts, slots: Slots) -> tuple[Tensor, Tensor]:
        """Compute :meth:`_grad_cams` of images whose slots share a pass, a backward pass a slot."""
        backbone, block = self.backbone, self.backbone.vit.blocks[-1]
        patches = slice(backbone.num_prefix_tokens, None)
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            # a = LN1(x), of which the residual is no function
            kept.append(output.requires_grad_())

        raw = []
        with self._graph(block, keep):
            tokens, attention = block_with_attention(block, tokens)
            embedding = backbone.vit.norm(tokens)[:, patches].mean(1)
            if backbone.projection is not None:
                embedding = embedding @ backbone.projection
            logits, _ = text_logits(embedding, texts, slots)
            wanted = [*kept, *block.parameters()]
            for slot, shown in enumerate(slots[1].unbind(1)):
                score = self._scores(logits[shown], slot).sum()
                gradient, *_ = torch.autograd.grad(score, wanted, retain_graph=True)
                alpha = gradient[:, patches].mean(1)  # (B, D)
                raw.append((kept[0].detach()[:, patches] @ alpha[..., None])[..., 0])
        cam = torch.stack(raw, dim=1).relu()[:, :, None]
        return unit_range(unit_range(cam))[:, :, 0], attention.detach().mean(1)

    def _scores(self, logits: Tensor, slot: int) -> Tensor:
        """Give what is differentiated (b,) of logits (b, S+G): log-odds, or the probability."""
        if self.quirks.vanishing_gradient:
            return logits.softmax(1)[:, slot]
        others = logits.index_fill(1, torch.tensor([slot], device=logits.device), -torch.inf)
        return logits[:, slot] - others.logsumexp(1)

    @staticmethod
    @contextmanager
    def _graph(block: Any, keep: Callable[..., None]) -> Iterator[None]:
        """Let gradients reach the weights of a block, and hand the output of its LN1 over."""
        hook = block.norm1.register_forward_hook(keep)
        block.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            block.requires_grad_(False)
            hook.remove()

    # ---- labels (item 7) -----------------------------------------------------------------------

    @torch.no_grad()
    def pseudo_labels(self, images: Tensor, refined: Tensor, slots: Slots, boxes: Tensor) -> Tensor:
        """Give pseudo labels, with more work in PAR where a saving of it is off."""
        self.par = with_neighbours(self.par, sliced=self.savings.sliced_neighbours)
        if self.savings.batched_par:
            return super().pseudo_labels(images, refined, slots, boxes)
        labels = []
        for image, count in enumerate(slots[1].sum(1).tolist()):
            one = slice(image, image + 1)
            own = slots[0][one, :count], slots[1][one, :count]
            labels.append(super().pseudo_labels(images[one], refined[one, :count], own, boxes[one]))
        return torch.cat(labels)


def boxes_by_opencv(cam: Tensor, threshold: float, *, eight_bit: bool, open_edge: bool) -> Tensor:
    """Mark the boxes of one map (h, w) as :func:`wsss.methods.weclip.affinity.box_mask` does."""
    scores = cam.cpu().numpy()
    if eight_bit:
        scores = np.floor(scores * 255)
        bright = scores > np.floor(scores.max().astype(np.float64) * threshold)
    else:
        bright = scores > np.float32(threshold)
    _, _, regions, _ = cv2.connectedComponentsWithStats(bright.astype(np.uint8), connectivity=8)
    mask = np.zeros(bright.shape, bool)
    bottom, right = (side - open_edge for side in bright.shape)
    for x, y, width, height, _ in regions[1:]:  # the first is the background
        mask[y : min(y + height, bottom), x : min(x + width, right)] = True
    return torch.from_numpy(mask).to(cam.device)
