"""MCTformer+'s localisation maps: fusion, refinement by patch affinity, the multi-scale export."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.cams import normalise_cam
from wsss.maps.pixels import denormalise, normalise

Pictures = NDArray[np.uint8]  # (B, H, W, 3), RGB
EPS = 1e-8  # of the division by the largest value


def refine(maps: Tensor, affinity: Tensor) -> Tensor:
    """Spread maps along what patches attend to: sum_j Omega[i, j] G_k[j] (section 3, 4).

    Args:
        maps: G, (B, C, h, w).
        affinity: Omega, (B, N, N), rows are queries; not renormalised.
    """
    return (maps.flatten(2) @ affinity.transpose(1, 2)).view_as(maps)


def pictures_of(images: Tensor) -> Pictures:
    """Recover the 8-bit pixels (B, H, W, 3) of normalised images (B, 3, H, W).

    Images that were resized after they were normalised are rounded to whole grey levels.
    """
    pixels = denormalise(images.float()).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def scaled_size(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """Give the height and width of an image at a scale, each rounded, half to even.

    Args:
        size: height and width of the image.
        scale: factor of both.
        multiple: both are then raised to multiples of it; 1 leaves them.

    Raises:
        WSSSError: no pixel is left.
    """
    height, width = (round(side * scale) for side in size)
    if min(height, width) < 1:
        raise WSSSError(f"method.scales: scale {scale:g} of a {size[0]}x{size[1]} image is empty")
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def resized_images(pictures: Pictures, size: tuple[int, int]) -> Tensor:
    """Resize the 8-bit pixels by Pillow's bicubic filter, then normalise: (B, 3, h, w)."""
    shape = size[::-1]
    views = [Image.fromarray(one).resize(shape, Image.Resampling.BICUBIC) for one in pictures]
    return torch.stack([normalise(np.asarray(view)) for view in views])


@torch.no_grad()
def multiscale_maps(
    raw_maps: Callable[[Tensor], Tensor],
    pictures: Pictures,
    *,
    scales: Sequence[float],
    multiple: int,
    first_size: bool,
    like: Tensor,
) -> Tensor:
    """Sum maps over scales and mirror images, then normalise them (section 3, "export").

    At each scale image and mirror image go through ``raw_maps`` in one batch; their maps are summed
    at token resolution, which is the same as after the upsampling, a linear and symmetric one.

    Args:
        raw_maps: gives maps (2B, C, h', w') of images (2B, 3, H', W').
        pictures: (B, H, W, 3).
        scales: factors of the image size.
        multiple: see :func:`scaled_size`.
        first_size: give maps of the size of the first scale; otherwise of the pictures.
        like: a tensor whose type and device the network's input shall have.

    Returns:
        (B, C, H, W), each map from 0 to 1 / (1 + something tiny); a map without any range is 0.

    Raises:
        WSSSError: a scale leaves no pixel.
    """
    sizes = [scaled_size(pictures.shape[1:3], scale, multiple) for scale in scales]
    full = sizes[0] if first_size else pictures.shape[1:3]
    total: Tensor | None = None
    for size in sizes:
        scaled = resized_images(pictures, size).to(like)
        plain, mirrored = raw_maps(torch.cat([scaled, scaled.flip(-1)])).chunk(2)
        pair = plain + mirrored.flip(-1)
        own = F.interpolate(pair, full, mode="bilinear", align_corners=False)
        total = own if total is None else total + own
    assert total is not None  # settings have at least one scale
    return normalise_cam(total, EPS)
