"""Training crops with their masks, for the second stage (methods/tkp_pcl.md section 3)."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.data.views.drawing import place_on_axis
from wsss.maps.pixels import IGNORE_INDEX, normalise


class LabelledCrops:
    """Scales, flips and crops an image together with its mask.

    Scale u ~ U(scale_range), bilinear (the mask: nearest); flip with p = 0.5; crop at random, or
    place at random where the scaled image is smaller: 0, the mean colour, and 255 in the mask.

    Args:
        crop_size: side of the crop in pixels (321 in DeepLab).
        scale_range: bounds of u.
    """

    def __init__(
        self, *, crop_size: int = 321, scale_range: tuple[float, float] = (0.5, 1.5)
    ) -> None:
        self.crop_size = crop_size
        self.scale_range = (scale_range[0], scale_range[1])

    def __call__(
        self, rgb: NDArray[np.uint8], rng: np.random.Generator, mask: NDArray[np.uint8]
    ) -> dict[str, Tensor]:
        """Draw the crop of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.
            mask: uint8 (H, W) class ids, 255 ignored.

        Returns:
            ``image``: float32 (3, C, C) normalised; ``target``: int64 (C, C); ``box``: int64 (4,),
            the real pixels as row start, row end, column start, column end.
        """
        scale = rng.uniform(*self.scale_range)
        height, width = (max(1, round(scale * side)) for side in mask.shape)
        r0, r1, top = place_on_axis(height, self.crop_size, rng)
        c0, c1, left = place_on_axis(width, self.crop_size, rng)
        shown = np.s_[top : top + r1 - r0, left : left + c1 - c0]
        scaled = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)
        # "exact": plain INTER_NEAREST takes a pixel's corner for its middle
        labels = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        image = torch.zeros(3, self.crop_size, self.crop_size)
        target = torch.full((self.crop_size, self.crop_size), IGNORE_INDEX)
        image[:, r0:r1, c0:c1] = normalise(scaled[shown])
        target[r0:r1, c0:c1] = torch.from_numpy(labels[shown].astype(np.int64))
        if rng.random() < 0.5:
            image, target = image.flip(-1), target.flip(-1)
            c0, c1 = self.crop_size - c1, self.crop_size - c0
        return {"image": image, "target": target, "box": torch.tensor([r0, r1, c0, c1])}
