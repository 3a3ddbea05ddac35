"""ViT-PCM's equivariance term: symmetries, mosaics, the merged label map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError

TILES = 2  # a mosaic is 2 x 2 views


def label_merge(scores: Tensor, targets: Tensor) -> Tensor:
    """Merge as ViT-PCM (tkp_pcl.md 3.2): present maps over their maxima, renormalised.

    Args:
        scores: (B, C, h, w), not negative, background first.
        targets: (B, C) in {0, 1}; absent categories become 0.

    Returns:
        (B, C, h, w), adding up to 1 over the categories wherever any is above 0.
    """
    peaked = over_maximum(scores * targets[..., None, None].to(scores.dtype))
    total = peaked.sum(1, keepdim=True)
    return torch.where(total > 0, peaked / total, 0)


def over_maximum(maps: Tensor) -> Tensor:
    """Divide each map (B, C, h, w) by its maximum."""
    peak = maps.amax((-2, -1), keepdim=True)
    return torch.where(peak > 0, maps / peak, 0)  # 0 / 0 is 0


def apply_symmetry(maps: Tensor, symmetry: Tensor, *, inverse: bool = False) -> Tensor:
    """Give each map its own flips and transposition, or take them back.

    Args:
        maps: (B, C, n, n).
        symmetry: (B, 3), boolean: flip columns, flip rows, then transpose.
        inverse: undo instead.
    """
    turned = []
    for image, (columns, rows, transpose) in zip(maps, symmetry.tolist(), strict=True):
        sides = [side for side, flipped in ((-1, columns), (-2, rows)) if flipped]
        if inverse:
            image = image.mT if transpose else image
            turned.append(image.flip(sides))
        else:
            image = image.flip(sides)
            turned.append(image.mT if transpose else image)
    return torch.stack(turned)


def mosaic(views: Tensor) -> Tensor:
    """Join views (B, 3, s, s), four at a time, as (B/4, 3, 2s, 2s).

    Raises:
        WSSSError: B is no multiple of 4.
    """
    if len(views) % TILES**2:
        raise WSSSError(
            f"method.equivariance_weight: mosaics are made of {TILES**2} views, and a device has "
            f"{len(views)} images; make budget.global_batch_size a multiple"
        )
    tiles = views.unflatten(0, (-1, TILES, TILES))  # (M, row, column, 3, s, s)
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def tiles_of(maps: Tensor) -> Tensor:
    """Undo :func:`mosaic` on maps: (M, C, 2n, 2n) to (4M, C, n, n)."""
    tiles = maps.unflatten(3, (TILES, -1)).unflatten(2, (TILES, -1))  # (M, C, row, n, column, n)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def in_patches(boxes: Tensor, patch_size: int) -> Tensor:
    """Give boxes (B, 4) of pixels as such of patches.

    Raises:
        WSSSError: a box does not lie on whole patches.
    """
    if (boxes % patch_size).any():
        raise WSSSError(
            "data.train_transform.patch_size: second views do not lie on the encoder's "
            f"patches of {patch_size} px; set it to {patch_size}"
        )
    return boxes // patch_size


def seen_as_views(
    maps: Tensor, symmetry: Tensor, view_symmetry: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    """Show maps of whole images as the second views show the images.

    Args:
        maps: (B, C, h, h), turned as the images are.
        symmetry: of the images, (B, 3); see :func:`apply_symmetry`.
        view_symmetry: of the views, (B, 3).
        boxes: of the views within the upright images, in patches, (B, 4): row start, row end,
            column start, column end, ends excluded.
        size: (n, n), patches of a view.

    Returns:
        (B, C, n, n): turned upright, cut, resized, turned as the views.
    """
    upright = apply_symmetry(maps, symmetry, inverse=True)
    parts = [
        F.interpolate(one[None, :, r0:r1, c0:c1], size, mode="bilinear")
        for one, (r0, r1, c0, c1) in zip(upright, boxes.tolist(), strict=True)
    ]
    return apply_symmetry(torch.cat(parts), view_symmetry)
