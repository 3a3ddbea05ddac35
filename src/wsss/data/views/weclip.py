"""WeCLIP's view of a training image (weclip.md section 8): a crop of the scaled picture."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.data.views.drawing import scaled_crop
from wsss.maps.pixels import normalise


class WeCLIPCrops:
    """Make the one view of a WeCLIP training sample.

    1. scale u ~ U(scale_range), bilinear; 2. flip with p = 0.5; 3. pad with zeros (raw pixel
    value) to the crop size at a random offset and crop at random. No colour jitter.

    Args:
        crop_size: side of the view in pixels (320 in the paper).
        scale_range: bounds of u.
    """

    def __init__(
        self, *, crop_size: int = 320, scale_range: tuple[float, float] = (0.5, 2.0)
    ) -> None:
        self.crop_size = crop_size
        self.scale_range = (scale_range[0], scale_range[1])

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C) normalised; ``box``: int64 (4,), rows r0:r1 and columns
            c0:c1 (ends excluded) of real pixels.
        """
        crop, box = scaled_crop(Image.fromarray(rgb), self.crop_size, self.scale_range, rng)
        return {"image": normalise(crop), "box": torch.tensor(box)}
