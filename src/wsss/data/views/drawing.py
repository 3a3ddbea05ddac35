"""Draws that several methods share: mirrors, places, crops of scaled pictures."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.core.errors import WSSSError

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


def check_area(area: Sequence[float]) -> tuple[float, float]:
    """Give the bounds of a crop's share of the picture.

    Raises:
        WSSSError: they are no shares.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise WSSSError(
            f"data.train_transform.area={list(area)}: expected two rising shares in (0, 1]"
        )
    return area[0], area[1]


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


def scaled_crop(
    picture: Image.Image, size: int, scale_range: tuple[float, float], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Scale a picture by u ~ U(scale_range), flip it with p = 0.5, pad it with zeros, crop it.

    Only the part that the crop shows is resampled: Pillow's ``box`` takes the support of the
    filter from the whole picture, so the pixels are those of resizing all of it (but for
    rounding).

    Returns:
        The crop (size, size, 3), and the rows r0:r1 and columns c0:c1 of its real pixels.
    """
    scale = rng.uniform(*scale_range)
    width, height = (max(1, int(scale * side)) for side in picture.size)
    r0, r1, y0 = place_on_axis(height, size, rng)
    c0, c1, x0 = place_on_axis(width, size, rng)
    flip = rng.random() < 0.5
    if flip:  # the same columns, counted from the right edge of the unflipped picture
        x0 = width - x0 - (c1 - c0)
    to_x, to_y = picture.width / width, picture.height / height
    source = (
        x0 * to_x,
        y0 * to_y,
        min((x0 + c1 - c0) * to_x, picture.width),  # rounding may pass the edge, Pillow objects
        min((y0 + r1 - r0) * to_y, picture.height),
    )
    part = np.asarray(picture.resize((c1 - c0, r1 - r0), Image.Resampling.BILINEAR, box=source))
    crop = np.zeros((size, size, 3), np.uint8)
    crop[r0:r1, c0:c1] = part[:, ::-1] if flip else part
    return crop, (r0, r1, c0, c1)
