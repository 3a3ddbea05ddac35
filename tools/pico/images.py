"""What a picture is made of: random backgrounds, places for the objects, distortions."""

from __future__ import annotations

import cv2
import numpy as np
from cutouts import CutOut, Placement


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random coloured texture, float32 ``(size, size, 3)`` in 0..255.

    Smooth noise of two wavelengths and sometimes stripes: it stands in for backgrounds that the
    two dozen photographs do not show.
    """
    image = np.zeros((size, size, 3), np.float32)
    for cells in rng.choice((1, 2, 4, 8, 16, 32), 2, replace=False):
        noise = rng.normal(0, 45, (cells + 1, cells + 1, 3)).astype(np.float32)
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        u, v = rng.normal(0, 0.5, 2)
        phase = u * np.arange(size)[None, :] + v * np.arange(size)[:, None]
        wave = np.sin(phase) if rng.random() < 0.5 else np.sign(np.sin(phase))
        image += wave.astype(np.float32)[..., None] * rng.normal(0, 30, 3).astype(np.float32)
    return np.clip(image + rng.uniform(30, 225, 3).astype(np.float32), 0, 255)


def backdrop(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a random background, uint8 ``(size, size, 3)``: a photo crop, a texture or a blend."""
    kind = rng.random()
    if kind < 0.15 or not photos:
        return texture(size, rng).astype(np.uint8)
    photo = photos[int(rng.integers(len(photos)))]
    height, width = photo.shape[:2]
    side = int(rng.uniform(0.25, 1.0) * min(height, width))
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    crop = cv2.resize(photo[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = crop.astype(np.float32)
    if kind < 0.25:
        crop = crop * 0.6 + texture(size, rng) * 0.4
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    return np.clip(crop * gain + rng.uniform(-25, 25), 0, 255).astype(np.uint8)


def random_place(
    cutout: CutOut, size: int, sides: tuple[float, float], rng: np.random.Generator
) -> Placement:
    """Place one object at random.

    Args:
        cutout: the object.
        size: side of the canvas in pixels.
        sides: range of the object's longer side in pixels.
        rng: source of randomness.
    """
    height, width = cutout.rgba.shape[:2]
    scale = float(np.exp(rng.uniform(*np.log(sides)))) / max(height, width)
    half = np.array((width, height)) * scale / 2
    # An eighth of the object may leave the canvas; an object wider than it hangs over both sides.
    low = np.minimum(half * 0.75, size - half * 0.75)
    centre = rng.uniform(np.minimum(low, size - low), np.maximum(low, size - low))
    return Placement(
        cutout,
        centre=(float(centre[0]), float(centre[1])),
        scale=scale,
        angle=float(rng.uniform(-15, 15)),
        flip=bool(rng.random() < 0.5),
        gain=tuple(rng.uniform(0.8, 1.2) * rng.uniform(0.93, 1.07, 3)),
        offset=float(rng.uniform(-15, 15)),
    )


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey, blur, add noise to or cover a part of an image at random.

    Args:
        image: uint8 ``(s, s, 3)``.
        rng: source of randomness.

    Returns:
        float32 ``(s, s, 3)`` in about 0..255.
    """
    out = image.astype(np.float32)
    chance = rng.random(4)
    size = out.shape[0]
    if chance[0] < 0.03:
        out[:] = out.mean(axis=2, keepdims=True)
    if chance[1] < 0.2:
        out = cv2.GaussianBlur(out, (5, 5), float(rng.uniform(0.4, 1.2)))
    if chance[2] < 0.2:
        out += rng.normal(0, rng.uniform(2, 10), out.shape).astype(np.float32)
    if chance[3] < 0.1:
        h, w = (rng.uniform(0.1, 0.3, 2) * size).astype(int)
        y, x = int(rng.integers(size - h)), int(rng.integers(size - w))
        out[y : y + h, x : x + w] = rng.uniform(0, 255, 3)
    return out
