"""Class activation maps: from features to normalised multi-scale maps (toco.md section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError


def class_activation(features: Tensor, weight: Tensor) -> Tensor:
    """Apply a bias-free linear classifier at every position.

    Args:
        features: (B, D, h, w) feature map.
        weight: (K, D) or (K, D, 1, 1) classifier weight.

    Returns:
        (B, K, h, w) raw activations, no ReLU, no normalisation.
    """
    return F.conv2d(features, weight.reshape(weight.shape[0], -1, 1, 1))


def detached_activation(features: Tensor, weight: Tensor) -> Tensor:
    """Apply :func:`class_activation` without gradient to either of its arguments."""
    return class_activation(features.detach(), weight.detach())


def normalise_cam(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """Map every single class map to [0, 1): subtract its minimum, divide by its maximum + eps.

    Args:
        cam: (B, K, H, W) activations.
        eps: keeps a constant map at zero instead of dividing by zero.

    Returns:
        (B, K, H, W) normalised maps.
    """
    cam = cam - cam.amin(dim=(-2, -1), keepdim=True)
    return cam / (cam.amax(dim=(-2, -1), keepdim=True) + eps)


def normalise_maximum(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide each map (..., H, W) by its maximum plus ``eps``; no minimum is subtracted."""
    return maps / (maps.amax((-2, -1), keepdim=True) + eps)


def _upsampled_maximum(
    plain: Sequence[Tensor], mirrored: Sequence[Tensor], size: tuple[int, int], cut_negative: bool
) -> list[Tensor]:
    """Take the maximum of each map and its un-mirrored twin, both resized to ``size``."""
    merged = []
    for cam, flip in zip(plain, mirrored, strict=True):
        # At least float32: under autocast the raw maps are bfloat16, too coarse for thresholds.
        kind = torch.promote_types(cam.dtype, torch.float32)
        up, up_flip = (
            F.interpolate(c.to(kind), size=size, mode="bilinear", align_corners=False)
            for c in (cam, flip)
        )
        # Mirrored back at full size, where the reference does it.
        best = torch.maximum(up, up_flip.flip(-1))
        merged.append(best.relu_() if cut_negative else best)
    return merged


@torch.no_grad()
def multiscale_cam(
    raw_cams: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    *,
    scales: Sequence[float],
    scale_one: Sequence[Tensor] | None = None,
    cut_negative: bool = True,
) -> list[Tensor]:
    """Sum the class activation maps over scales and mirror images, then normalise.

    Scale 1 always comes first, even when ``scales`` lacks it, and is not used twice. At each
    scale the images and their mirror images go through ``raw_cams`` in one batch; their maps are
    resized to the image size, the maximum of the two is taken, negative values are cut (in ToCo),
    and the scales are summed.

    Args:
        raw_cams: returns one raw map (b, K, h', w') per head for images (b, 3, H', W').
        images: (B, 3, H, W) network input.
        scales: factors of the image size; scaled sizes are truncated to integers.
        scale_one: raw maps of the unscaled, unmirrored images, one per head, where the caller
            already has them (training shares its forward pass); then only the mirror image is run
            at scale 1.
        cut_negative: False keeps negative values, as ClusterCAM does.

    Returns:
        One (B, K, H, W) normalised map per head.

    Raises:
        WSSSError: a scale is so small that no pixel is left.
    """
    batch, _, height, width = images.shape
    total: list[Tensor] = []
    for scale in [1.0, *(s for s in scales if s != 1.0)]:
        size = (int(scale * height), int(scale * width))
        if min(size) < 1:
            raise WSSSError(f"scale {scale} of a {height}x{width} image leaves no pixel")
        if scale == 1.0 and scale_one is not None:
            plain, mirrored = list(scale_one), list(raw_cams(images.flip(-1)))
        else:
            scaled = images
            if scale != 1.0:
                scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            pairs = raw_cams(torch.cat([scaled, scaled.flip(-1)]))
            plain, mirrored = [p[:batch] for p in pairs], [p[batch:] for p in pairs]
        merged = _upsampled_maximum(plain, mirrored, (height, width), cut_negative)
        total = merged if not total else [t + m for t, m in zip(total, merged, strict=True)]
    return [normalise_cam(t) for t in total]
