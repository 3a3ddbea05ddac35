"""From Grad-CAMs to refined maps and pseudo labels (weclip.md sections 4 and 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.refine.par import PAR
from wsss.methods.losses import full_precision
from wsss.methods.weclip.affinity import Filter, box_mask, learned_base, refine
from wsss.methods.weclip.gradcam import Slots, Texts, grad_cam, unit_range
from wsss.methods.weclip.tower import Encoded


@torch.no_grad()
def refined_maps(
    encoded: Encoded,
    texts: Texts,
    slots: Slots,
    *,
    box_threshold: float,
    layers: int,
    related: Tensor | None = None,
    rfm_filter: Filter = "signed",
    of_probability: bool = False,
    eight_bit: bool = False,
    open_edge: bool = False,
) -> Tensor:
    """Spread each class's Grad-CAM inside its boxes along an affinity of patches, in float32.

    Args:
        encoded: with the attention of the last ``layers`` blocks.
        texts: of classes and background.
        slots: as of :func:`gradcam.class_slots`.
        box_threshold: of :func:`box_mask`.
        layers: last blocks whose mean attention is the affinity, or among which RFM chooses.
        related: the decoder's affinity R (B, N, N), for RFM; None: attention alone.
        rfm_filter: how RFM chooses, of :func:`affinity.kept_maps`.
        of_probability: of :func:`gradcam.grad_cam`.
        eight_bit: of :func:`box_mask`.
        open_edge: of :func:`box_mask`.

    Returns:
        (B, S, h, w), zero in empty slots.
    """
    assert encoded.last is not None
    with full_precision(encoded.last.target):
        maps = grad_cam(encoded.last, texts, slots, of_probability=of_probability)
        cam = maps.cam.unflatten(2, encoded.grid)  # (B, S, h, w)
        boxes = box_mask(cam, box_threshold, eight_bit=eight_bit, open_edge=open_edge)
        attention = encoded.patch_attention(layers)  # (B, layers, N, N)
        if related is None:
            base = attention.mean(1)
        else:
            base = learned_base(attention, related, rfm_filter)
        return refine((cam * boxes).flatten(2), base).unflatten(2, encoded.grid)


def by_class(maps: Tensor, slots: Slots, num_classes: int) -> Tensor:
    """Give maps (B, S, h, w) of the slots as those of all classes, (B, K, h, w); others zero."""
    every = maps.new_zeros(len(maps), num_classes, *maps.shape[-2:])
    return every.scatter(1, slots[0][..., None, None].expand_as(maps), maps)


def class_scores(refined: Tensor, size: tuple[int, int]) -> Tensor:
    """Stretch refined maps to [0, 1], enlarge them, and put first what they leave, the background.

    Args:
        refined: (B, S, h, w).
        size: (H, W) of the scores.

    Returns:
        (B, S+1, H, W).
    """
    maps = F.interpolate(unit_range(refined), size, mode="bilinear", align_corners=False)
    return torch.cat([1 - maps.amax(1, keepdim=True), maps], dim=1)


def propagated(par: PAR, images: Tensor, scores: Tensor) -> Tensor:
    """Propagate scores (B, C, H, W) by PAR along images (B, 3, H', W') at the scores' size."""
    size = scores.shape[-2:]
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=True)
    return par(images, scores)


def label_maps(
    scores: Tensor, slots: Slots, *, margin: float = 0.0, ignore_index: int = 255
) -> Tensor:
    """Label every pixel by its best score.

    Args:
        scores: (B, S+1, H, W), the background first.
        slots: of the classes, as of :func:`gradcam.class_slots`.
        margin: a pixel whose two best scores are nearer is undecided.
        ignore_index: label of undecided pixels.

    Returns:
        (B, H, W) int64: 0 background, class + 1.
    """
    ids, valid = slots
    empty = F.pad(~valid, (1, 0), value=False)[..., None, None]
    scores = scores.masked_fill(empty, -torch.inf)
    best, slot = scores.max(1)
    label = F.pad(ids + 1, (1, 0)).gather(1, slot.flatten(1)).view_as(slot)
    if margin > 0:
        second = scores.scatter(1, slot[:, None], -torch.inf).amax(1)
        label = label.masked_fill(best - second < margin, ignore_index)
    return label
