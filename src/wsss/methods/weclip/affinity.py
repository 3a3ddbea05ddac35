"""Affinity in WeCLIP: box mask, refinement by attention, the affinity loss (weclip.md 4, 7)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: how the maps that the refinement keeps are found; arguments as of :func:`kept_maps`
Filter = Literal["signed", "absolute"]
TIE = 1e-12  # equal masses are not above their rounded mean


# ---- box mask ------------------------------------------------------------------------------------


def connected(mask: Tensor) -> Tensor:
    """Give numbers to the 8-connected components of masks (M, h, w) by their last pixel.

    Returns:
        (M, h*w) int64: one number a component, -1 outside.
    """
    index = torch.arange(mask[0].numel(), device=mask.device).expand(len(mask), -1)
    label = index.masked_fill(~mask.flatten(1), -1)
    while True:
        grid = label.view_as(mask).float()  # exact below 2^24 pixels
        grown = F.max_pool2d(grid[:, None], 3, stride=1, padding=1).long().flatten(1)
        grown = grown.masked_fill(label < 0, -1)
        # what a pixel points to points further: long shapes take few rounds
        further = torch.maximum(grown, grown.gather(1, grown.clamp_min(0))).masked_fill(
            label < 0, -1
        )
        if torch.equal(further, label):
            return label
        label = further


def rectangles(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Give each component's bounds.

    Args:
        label: (M, N) of :func:`connected`.
        size: (h, w).

    Returns:
        (M, N, 4): first row, last row, first column, last column of the component that a pixel
        numbers; of other pixels the first lies behind the last.
    """
    height, width = size
    index = torch.arange(height * width, device=label.device).expand_as(label)
    inside = label >= 0
    bounds = []
    for axis in (index.div(width, rounding_mode="floor"), index % width):
        for value, how, start in ((axis, "amin", max(size)), (axis, "amax", -1)):
            value = value.masked_fill(~inside, start)
            bound = torch.full_like(label, start)
            bounds.append(bound.scatter_reduce(1, label.clamp_min(0), value, how))
    return torch.stack(bounds, dim=2)


def box_mask(
    cam: Tensor, threshold: float, *, eight_bit: bool = False, open_edge: bool = False
) -> Tensor:
    """Mark the rectangles around each map's connected regions above a threshold.

    Args:
        cam: (..., h, w) in [0, 1].
        threshold: a pixel above it belongs to a region.
        eight_bit: compare floor(255 C) with floor(threshold x its maximum) instead.
        open_edge: no rectangle reaches the last row and column.

    Returns:
        (..., h, w), boolean.
    """
    size = (cam.shape[-2], cam.shape[-1])
    maps = cam.reshape(-1, *size)
    if eight_bit:  # Q6
        maps = (maps * 255).floor()
        level = (maps.amax((1, 2), keepdim=True).double() * threshold).floor()
        bright = maps > level
    else:
        bright = maps > threshold
    y0, y1, x0, x1 = rectangles(connected(bright), size).unbind(2)
    y1, x1 = y1 + 1, x1 + 1
    if open_edge:  # Q5
        y1, x1 = y1.clamp_max(size[0] - 1), x1.clamp_max(size[1] - 1)
    exists = (y1 > y0) & (x1 > x0)
    # corners of all rectangles; the sums along both axes count those that cover a pixel
    corners = maps.new_zeros(len(maps), (size[0] + 1) * (size[1] + 1), dtype=torch.int32)
    for rows, columns, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        place = (rows * (size[1] + 1) + columns).masked_fill(~exists, 0)
        corners.scatter_add_(1, place, sign * exists.int())
    corners = corners.unflatten(1, (size[0] + 1, size[1] + 1))
    cover = corners.cumsum(1).cumsum(2)[:, :-1, :-1]
    return (cover > 0).view_as(cam)


# ---- refinement ----------------------------------------------------------------------------------


def kept_maps(attention: Tensor, affinity: Tensor, how: Filter) -> Tensor:
    """Tell which attention maps resemble the decoder's affinity R enough: (B, l), boolean.

    ``signed``: sum(R - A_l) <= its mean over l, as officially. R is the same for all l and cancels,
    so the kept maps are those of at least mean mass (Q7). ``absolute``: the same of sum|R - A_l|.

    Args:
        attention: patch-to-patch maps A_l, (B, l, N, N).
        affinity: R, (B, N, N).
        how: one of the two.
    """
    if how == "signed":
        mass = attention.sum((2, 3), dtype=torch.float64)
        return mass >= mass.mean(1, keepdim=True) * (1 - TIE)
    distance = (affinity[:, None] - attention).abs().sum((2, 3), dtype=torch.float64)
    return distance <= distance.mean(1, keepdim=True) * (1 + TIE)


def learned_base(attention: Tensor, affinity: Tensor, how: Filter) -> Tensor:
    """Give S = (sum of kept A_l) / (#kept + 1e-5) * R, (B, N, N); see :func:`kept_maps`."""
    kept = kept_maps(attention, affinity, how).to(attention.dtype)
    chosen = torch.einsum("bl,blij->bij", kept, attention)
    return chosen / (kept.sum(1) + 1e-5)[:, None, None] * affinity


def transition(base: Tensor, rounds: int = 3) -> Tensor:
    """Normalise columns, then rows, three times, and symmetrise: T' (B, N, N), not yet squared."""
    least = torch.finfo(base.dtype).tiny  # a column of zeros stays one
    for _ in range(rounds):
        base = base / base.sum(1, keepdim=True).clamp_min(least)
        base = base / base.sum(2, keepdim=True).clamp_min(least)
    return (base + base.transpose(1, 2)) / 2


def refine(maps: Tensor, base: Tensor) -> Tensor:
    """Spread maps (B, S, N) along the base S (B, N, N): T v with T = T' T', as T' (T' v)."""
    step = transition(base)
    return maps @ step @ step  # T' is symmetric


# ---- affinity loss -------------------------------------------------------------------------------


def near_pairs(
    label: Tensor, grid: tuple[int, int], radius: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Compare the labels of near-by patches, a patch and itself among them.

    Args:
        label: (B, H, W), of which a patch has its first pixel's.
        grid: (h, w).
        radius: largest distance in rows and in columns.
        ignore_index: label of patches in no pair.

    Returns:
        Two (B, N, N) boolean masks: pairs of one label, pairs of two.
    """
    small = F.interpolate(label[:, None].float(), size=grid)[:, 0].flatten(1)  # nearest
    index = torch.arange(grid[0] * grid[1], device=label.device)
    rows, columns = index.div(grid[1], rounding_mode="floor"), index % grid[1]
    far = [(axis[:, None] - axis).abs() for axis in (rows, columns)]
    near = torch.maximum(*far) <= radius
    valid = small != ignore_index
    usable = near & valid[:, :, None] & valid[:, None, :]
    equal = small[:, :, None] == small[:, None, :]
    return usable & equal, usable & ~equal


def affinity_loss(affinity: Tensor, same: Tensor, different: Tensor) -> Tensor:
    """Compute 1/2 sum_same (1 - R) / (#same + 1) + 1/2 sum_different R / (#different + 1).

    Args:
        affinity: R, (B, N, N).
        same: pairs of one label, (B, N, N).
        different: pairs of two labels, (B, N, N).
    """
    alike = ((1 - affinity) * same).sum() / (same.sum() + 1)
    unlike = (affinity * different).sum() / (different.sum() + 1)
    return 0.5 * alike + 0.5 * unlike
