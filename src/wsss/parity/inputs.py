"""Arrays of a golden file as tensors, and gradients measured."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD
from wsss.parity.tolerances import Array


def as_tensor(array: Array) -> Tensor:
    """Give an array of a file as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))


def unit_images(array: Array) -> Tensor:
    """Turn uint8 (..., H, W, 3) into float (..., 3, H, W) in [0, 1]."""
    return as_tensor(np.moveaxis(array, -1, -3)).float() / 255


def network_images(array: Array) -> Tensor:
    """Turn uint8 (..., H, W, 3) into normalised network input (..., 3, H, W)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (unit_images(array) - mean) / std


def loss_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Give the loss, and its gradient for each leaf."""
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def gradient_norm(gradients: Iterable[Tensor | None]) -> float:
    """Compute the L2 norm of several gradients together, in float64; a missing one is zero."""
    return sum(g.double().square().sum().item() for g in gradients if g is not None) ** 0.5
