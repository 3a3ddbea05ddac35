"""Draws that several methods share: mirrors, places, random resized crops, colour steps."""

import random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.maps.pixels import normalise

if TYPE_CHECKING:  # slow to import, and not every method needs it
    import albumentations as A

LOG_RATIO = (np.log(3 / 4), np.log(4 / 3))  # of random resized crops


class Draws(Protocol):
    """Where random decisions come from; numpy's Generator is one."""

    def random(self) -> float:
        """Draw uniformly from [0, 1)."""

    def integers(self, low: int, high: int) -> Any:
        """Draw an integer uniformly from [low, high)."""


def mirror(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Flip a picture (H, W, ...) from left to right."""
    return np.ascontiguousarray(view[:, ::-1])


def place_on_axis(scaled: int, size: int, rng: Draws) -> tuple[int, int, int]:
    """Pad or crop along one axis of the scaled picture.

    Returns:
        Start and end of the real pixels in the crop, and the scaled picture's first shown pixel.
    """
    if scaled < size:
        start = int(rng.integers(0, size - scaled + 1))
        return start, start + scaled, 0
    return 0, size, int(rng.integers(0, scaled - size + 1))


def random_resized_crop(
    picture: Image.Image, size: int, area: tuple[float, float], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Cut a part of the picture as a square (size, size, 3), bicubic, mirrored with p = 0.5."""
    left, top, width, height = draw_area(picture.width, picture.height, area, rng)
    part = picture.crop((left, top, left + width, top + height))
    view = np.array(part.resize((size, size), Image.Resampling.BICUBIC))
    return mirror(view) if rng.random() < 0.5 else view


def draw_area(
    width: int, height: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) as torchvision's RandomResizedCrop does.

    Args:
        width: of the picture.
        height: of the picture.
        share: bounds of the part's area over the picture's.
        rng: source of the draws.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*share)
        ratio = np.exp(rng.uniform(*LOG_RATIO))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * 4 / 3)))  # too long a picture: the largest central part
    h = min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def augment(steps: "A.Compose", view: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Apply albumentations' steps to a view (H, W, 3), and normalise it: (3, H, W)."""
    # Not set_random_seed: it gives every step the same seed, hence the same first draw, so that
    # for example only jittered views would ever be greyed. Sharing the generators keeps the
    # steps independent.
    steps.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return normalise(steps(image=view)["image"])
