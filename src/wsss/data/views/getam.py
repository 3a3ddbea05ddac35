"""GETAM's view of a training image (getam.md section 4).

It resizes floats with OpenCV's bilinear interpolation, as officially.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.data.views.drawing import Draws, place_on_axis
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD


class Placement(NamedTuple):
    """How one picture is scaled, mirrored and placed; all that is random about a GETAM view.

    Attributes:
        height: of the scaled picture.
        width: of the scaled picture.
        flip: mirror it.
        rows: (start, end, first shown row) as `place_on_axis` gives them.
        columns: the same along the other axis.
    """

    height: int
    width: int
    flip: bool
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]


class GETAMViews:
    """Make the training sample of GETAM, with the picture's saliency map where there is one.

    1. flip with p = 0.5; 2. long side to a random length, OpenCV's bilinear on floats (saliency
    nearest); 3. crop at random, or place at random on zeros (of the normalised image, so padding
    has the mean colour). No colour jitter.

    Args:
        crop_size: side of the crop in pixels (256 in the paper).
        long_side: bounds of the long side's length over the crop's, both included.
    """

    def __init__(
        self, *, crop_size: int = 256, long_side: tuple[float, float] = (0.9, 8 / 7)
    ) -> None:
        self.crop_size = crop_size
        low, high = long_side
        # a little more, since 8/7 of 56 is 64 and not 63.999
        self.long_side = (int(low * crop_size + 1e-6), int(high * crop_size + 1e-6))
        if not 0 < self.long_side[0] <= self.long_side[1]:
            raise WSSSError(
                f"data.train_transform.long_side=[{low}, {high}]: expected 0 < low <= high"
            )

    def __call__(
        self, rgb: NDArray[np.uint8], rng: Draws, saliency: NDArray[np.uint8] | None = None
    ) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.
            saliency: uint8 (H, W), or None.

        Returns:
            ``image``: float32 (3, C, C) normalised; ``box``: int64 (4,), rows r0:r1 and columns
            c0:c1 (ends excluded) of real pixels; with a saliency map ``saliency``: uint8 (C, C),
            0 in the padding.
        """
        place = self.place(rgb.shape[:2], rng)
        sample = {
            "image": self.render(rgb, place),
            "box": torch.tensor([*place.rows[:2], *place.columns[:2]]),
        }
        if saliency is not None:
            size = (place.width, place.height)
            scaled = cv2.resize(saliency, size, interpolation=cv2.INTER_NEAREST)
            sample["saliency"] = torch.from_numpy(self._placed(scaled, place))
        return sample

    def place(self, size: Sequence[int], rng: Draws) -> Placement:
        """Draw flip, long side, column and row, in this order, for a picture of (H, W)."""
        flip = rng.random() > 0.5
        long_side = int(rng.integers(self.long_side[0], self.long_side[1] + 1))
        height, width = (max(1, round(side * long_side / max(size))) for side in size)
        columns = place_on_axis(width, self.crop_size, rng)
        return Placement(height, width, flip, place_on_axis(height, self.crop_size, rng), columns)

    def render(self, rgb: NDArray[np.uint8], place: Placement) -> Tensor:
        """Give the normalised crop (3, C, C) of a placed picture."""
        size = (place.width, place.height)
        # double precision in the official order: PAMR's guide is cut to integers afterwards
        normal = cv2.resize(rgb.astype(np.float64), size, interpolation=cv2.INTER_LINEAR)
        normal /= 255
        normal -= np.array(IMAGENET_MEAN)
        normal /= np.array(IMAGENET_STD)
        crop = self._placed(normal.astype(np.float32), place)
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))

    def _placed(self, scaled: NDArray[Any], place: Placement) -> NDArray[Any]:
        """Mirror a scaled picture (H, W, ...) if wanted, then crop it or pad it: (C, C, ...)."""
        (r0, r1, row), (c0, c1, column) = place.rows, place.columns
        scaled = scaled[:, ::-1] if place.flip else scaled
        crop = np.zeros((self.crop_size, self.crop_size, *scaled.shape[2:]), scaled.dtype)
        crop[r0:r1, c0:c1] = scaled[row : row + r1 - r0, column : column + c1 - c0]
        return crop
