"""A picture to draw views of, and the way back from a view to pixels."""

import numpy as np
import torch
from PIL import Image

from wsss.maps.pixels import denormalise


def photo(height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture without a black pixel."""
    low = np.random.default_rng(seed).integers(20, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(low).resize((width, height), Image.Resampling.BILINEAR))


def pixels(view: torch.Tensor) -> np.ndarray:
    return denormalise(view).round().permute(1, 2, 0).numpy().astype(int)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
