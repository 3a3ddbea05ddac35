"""ToCo's three views of a training image (toco.md section 4).

The photometric part runs in albumentations, whose ColorJitter, ToGray and Solarize agree with the
official torchvision and Pillow ones within the rounding that tests/data/views/test_toco_views.py
states. Two operations are not the same there and follow Pillow here: resampling (OpenCV's does not
filter when it shrinks) and the Gaussian blur (`PillowBlur`).
"""

from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.data.views.colours import augment, colour_jitter
from wsss.data.views.drawing import mirror, random_resized_crop, scaled_crop

GLOBAL2_AREA = (0.4, 1.0)


def pillow_blur_kernel(radius: float) -> NDArray[np.float64]:
    """Give the 1-D kernel (taps,) of Pillow's Gaussian blur: three equal box filters.

    A box of half-width l + a (its two outer taps weigh less) has a third of the variance
    radius^2. A sampled Gaussian hardly blurs below radius 0.5, a fifth of ToCo's draws, where this
    kernel still has the wanted variance.
    """
    variance = radius**2 / 3
    inner = int((np.sqrt(12 * variance + 1) - 1) / 2)
    outer = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    outer /= 6 * (variance - (inner + 1) ** 2)
    box = np.r_[outer, np.ones(2 * inner + 1), outer] / (2 * (inner + outer) + 1)
    return np.convolve(np.convolve(box, box), box)


class PillowBlur(A.ImageOnlyTransform):
    """Blurs like ``ImageFilter.GaussianBlur`` with a random radius, but some ten times as fast.

    Args:
        radius: bounds of the uniform draw, in pixels.
        p: probability.
    """

    def __init__(self, radius: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.radius = radius

    def get_params(self) -> dict[str, float]:
        """Draw the radius from the generator that albumentations shares."""
        return {"radius": self.py_random.uniform(*self.radius)}

    def apply(self, img: NDArray[np.uint8], radius: float, **_: Any) -> NDArray[np.uint8]:
        """Filter rows and columns of a uint8 image (H, W, 3), repeating its border."""
        kernel = pillow_blur_kernel(radius)
        return cv2.sepFilter2D(img, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def photometric(*, blur: float, radius: tuple[float, float], solarise: float = 0.0) -> A.Compose:
    """Apply J without its flip, then blur and solarisation with the given probabilities."""
    return A.Compose(
        [
            colour_jitter(0.8),
            A.ToGray(p=0.2),
            PillowBlur(radius=radius, p=blur),
            A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarise),
        ]
    )


class ToCoViews:
    """Make the three views of one ToCo training sample.

    1. scale u ~ U(scale_range), bilinear; 2. flip with p = 0.5; 3. pad with zeros (raw pixel
    value) to the crop size at a random offset and crop at random; ``box`` is where real pixels
    are. 4. from that crop ``image`` (the network's input and global view 1; always blurred) and
    ``local_view`` (blurred with p = 0.5); 5. from the original image ``view2`` (global view 2):
    RandomResizedCrop of 0.4-1 of the area, bicubic, blur p = 0.1, solarise p = 0.2. Every view
    has its own colour jitter and greying, and J's second flip.

    Args:
        crop_size: side of all three views in pixels (448 in the paper).
        official_compat: True flips ``image`` and ``local_view`` independently and leaves the box
            where it was before that (toco.md Q2, Q3). False, the default, draws one flip for the
            two and moves the box with it. All other draws are the same.
        scale_range: bounds of u.
        blur_radius: bounds of the blur's radius in pixels, meant for crops of 448.
    """

    def __init__(
        self,
        *,
        crop_size: int = 448,
        official_compat: bool = False,
        scale_range: tuple[float, float] = (0.5, 2.0),
        blur_radius: tuple[float, float] = (0.1, 2.0),
    ) -> None:
        self.crop_size = crop_size
        self.official_compat = official_compat
        self.scale_range = (scale_range[0], scale_range[1])
        radius = (blur_radius[0], blur_radius[1])
        self.input_steps = photometric(blur=1.0, radius=radius)
        self.local_steps = photometric(blur=0.5, radius=radius)
        self.view2_steps = photometric(blur=0.1, radius=radius, solarise=0.2)

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the views of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``, ``view2``, ``local_view``: float32 (3, C, C) normalised; ``box``: int64
            (4,), rows r0:r1 and columns c0:c1 (ends excluded) of real pixels in ``image``.
        """
        picture = Image.fromarray(rgb)
        crop, (r0, r1, c0, c1) = scaled_crop(picture, self.crop_size, self.scale_range, rng)
        flip_image, flip_local = rng.random(2) < 0.5
        if not self.official_compat:
            flip_local = flip_image
            if flip_image:
                c0, c1 = self.crop_size - c1, self.crop_size - c0
        mirrored = mirror(crop)
        view2 = random_resized_crop(picture, self.crop_size, GLOBAL2_AREA, rng)
        return {
            "image": augment(self.input_steps, mirrored if flip_image else crop, rng),
            "local_view": augment(self.local_steps, mirrored if flip_local else crop, rng),
            "view2": augment(self.view2_steps, view2, rng),
            "box": torch.tensor([r0, r1, c0, c1]),
        }
