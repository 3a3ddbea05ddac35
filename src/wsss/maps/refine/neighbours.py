"""What PAR and PAMR share: a pixel's neighbours at several distances, and diffusion along them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = tuple((dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr, dc) != (0, 0))


def shifted(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Shift ``maps`` (..., H, W) to each neighbour: views of one padded copy.

    Eight neighbours at every dilation; the edge is replicated.
    """
    height, width = maps.shape[-2:]
    reach = max(dilations)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    for d in dilations:
        for dr, dc in OFFSETS:
            top, left = reach + d * dr, reach + d * dc
            yield padded[..., top : top + height, left : left + width]


def deviation(values: Tensor) -> Tensor:
    """Take the unbiased standard deviation (B, 1, H, W) along n of (B, n, H, W).

    ``std`` along a dimension that is not the last takes seven times as long on a CPU.
    """
    difference = values - values[:, :1]  # equal values give exactly 0
    difference -= difference.mean(dim=1, keepdim=True)
    return difference.square_().sum(dim=1, keepdim=True).div_(values.shape[1] - 1).sqrt_()


def at_affinity_size(masks: Tensor, affinity: Tensor) -> Tensor:
    """Resize masks (B, C, h, w) bilinearly, corners aligned, to (H, W) of (B, n, H, W)."""
    size = affinity.shape[-2:]
    if masks.shape[-2:] == size:
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=True)


def diffuse(affinity: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Replace masks ``num_iter`` times by the weighted sum over their neighbours.

    Args:
        affinity: (B, n, H, W) weights, in the order of :func:`shifted`.
        masks: (B, C, h, w); another size is first resized bilinearly with aligned corners.
        dilations: distances of the neighbours in pixels.
        num_iter: number of steps.

    Returns:
        (B, C, H, W) refined masks.
    """
    masks = at_affinity_size(masks, affinity)
    weights = affinity.unsqueeze(2).unbind(1)
    for _ in range(num_iter):
        total = torch.zeros_like(masks)
        for weight, neighbour in zip(weights, shifted(masks, dilations), strict=True):
            total.addcmul_(weight, neighbour)
        masks = total
    return masks
