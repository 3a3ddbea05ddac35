"""Pixels as the encoder sees them, and the label that says nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE_INDEX = 255
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def squash_pixels(images: Tensor, side: int) -> Tensor:
    """Squash normalised images (B, 3, H, W) to a square, on their 8-bit pixels, with OpenCV.

    The resized pixels are rounded, as when a stored image is resized before it is normalised.
    """
    import cv2

    pixels = denormalise(images).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    squashed = [cv2.resize(one, (side, side), interpolation=cv2.INTER_LINEAR) for one in pixels]
    return torch.stack([normalise(one) for one in squashed]).to(images)


def normalise(rgb: NDArray[np.uint8]) -> Tensor:
    """Turn uint8 RGB (H, W, 3) into a float32 tensor (3, H, W) with ImageNet mean and std."""
    planes = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return planes.float().div_(255).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def denormalise(images: Tensor) -> Tensor:
    """Invert `normalise`: (..., 3, H, W) to floats in 0..255, neither rounded nor clipped.

    The factors are multiplied by 255 before the image is, which is the arithmetic that decides
    *which* pixels ToCo's truncation lowers by one (golden ``i_train_step``).
    """
    mean = numbers_beside(images, [255 * value for value in IMAGENET_MEAN]).view(3, 1, 1)
    std = numbers_beside(images, [255 * value for value in IMAGENET_STD]).view(3, 1, 1)
    return images * std + mean


def numbers_beside(tensor: Tensor, values: Sequence[float]) -> Tensor:
    """Make a tensor of numbers, of the type and on the device of another one.

    Unlike ``tensor.new_tensor(values)`` this does not wait for what a GPU has still to compute.
    """
    return torch.tensor(values, dtype=tensor.dtype).to(tensor.device, non_blocking=True)
