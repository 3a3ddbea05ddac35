"""MoRe's view of a training image (more.md section 4), by the rule of VOC or of COCO."""

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.ranges import Fraction
from wsss.data.views.colours import applied, colour_jitter
from wsss.data.views.drawing import check_area, random_resized_crop, scaled_crop
from wsss.maps.pixels import normalise

VOC_AREA = (0.32, 1.0)


class MoReCrops:
    """Make the one view of a MoRe training sample; the official code's first view is never used.

    VOC (``area``): 1. random resized crop (ratio 3/4-4/3, bicubic); 2. flip with p = 0.5;
    3. colour jitter (0.4, 0.4, 0.2, 0.1). COCO (``scale_range``): 1. the same jitter, of the whole
    picture; 2. scale u ~ U(scale_range), bilinear; 3. flip with p = 0.5; 4. pad with black to the
    crop size at a random offset and crop at random, as ToCo does.

    Args:
        crop_size: side of the view in pixels (448 in the paper).
        area: bounds of the crop's share of the image (0.32-1 on VOC), or None for COCO's rule.
        scale_range: bounds of u (0.32-1 on COCO), or None for VOC's rule.
        jitter: probability of the colour jitter (0.5 on VOC, 0.8 on COCO).

    Raises:
        WSSSError: both or neither of the rules; bounds that are none.
    """

    def __init__(
        self,
        *,
        crop_size: int = 448,
        area: tuple[float, float] | None = VOC_AREA,
        scale_range: tuple[float, float] | None = None,
        jitter: Fraction = 0.5,
    ) -> None:
        if (area is None) == (scale_range is None):
            raise WSSSError(
                "data.train_transform: set either area (VOC's crops) or scale_range (COCO's) and "
                "the other to null"
            )
        if scale_range is not None and not 0 < scale_range[0] <= scale_range[1]:
            raise WSSSError(
                f"data.train_transform.scale_range={list(scale_range)}: expected two rising "
                "numbers above 0"
            )
        self.crop_size = crop_size
        self.area = None if area is None else check_area(area)
        self.scale_range = None if scale_range is None else (scale_range[0], scale_range[1])
        self.jitter = A.Compose([colour_jitter(jitter)])

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C) normalised; ``box``: int64 (4,), rows r0:r1 and columns
            c0:c1 (ends excluded) of real pixels: all of them by VOC's rule.
        """
        size = self.crop_size
        if self.area is not None:
            view = random_resized_crop(Image.fromarray(rgb), size, self.area, rng)
            view, box = applied(self.jitter, view, rng), (0, size, 0, size)
        elif self.scale_range is not None:
            jittered = Image.fromarray(applied(self.jitter, rgb, rng))
            view, box = scaled_crop(jittered, size, self.scale_range, rng)
        return {"image": normalise(view), "box": torch.tensor(box)}
