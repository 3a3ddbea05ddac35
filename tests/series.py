"""The closed-form inputs of toco.md section 8: S(shape; a, f) = f(a k) over the flat index k."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "toco"


def series(shape: Sequence[int], step: float, function: Callable = np.sin) -> Tensor:
    flat = function(step * np.arange(np.prod(shape), dtype=np.float64))
    return torch.from_numpy(flat.reshape(shape).astype(np.float32))


def refine_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, CAMs, labels and boxes of check 10."""
    images = 0.5 * series((2, 3, 64, 64), 0.021) + 0.5
    cam = series((2, 20, 64, 64), 0.0031).abs()
    labels = torch.zeros(2, 20)
    labels[0, [0, 6]] = 1
    labels[1, 14] = 1
    boxes = torch.tensor([[0, 64, 0, 64], [8, 56, 0, 64]])
    return images, cam, labels, boxes
