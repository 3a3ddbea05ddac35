"""MCTformer+'s view of a training image (mctformer.md section 4): timm's ImageNet recipe."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.core.ranges import Fraction
from wsss.data.views.drawing import check_area, random_resized_crop
from wsss.data.views.imagenet import (
    IMAGENET_AREA,
    INCREASING,
    erase_box,
    rand_augment,
    randomly_augmented,
)
from wsss.maps.pixels import normalise


class MCTformerCrops:
    """Make the one view of an MCTformer+ training sample.

    1. random resized crop (ratio 3/4-4/3, bicubic); 2. flip with p = 0.5; 3. RandAugment;
    4. normalisation; 5. random erasing: one box of 2-33 % filled with N(0, 1) values.

    Args:
        crop_size: side of the view in pixels (448 in the paper).
        area: bounds of the crop's share of the image; small shares lose labelled objects.
        auto_augment: RandAugment in timm's short form, or None to leave it out. The paper's is
            two operations of growing strength, each with p = 0.5.
        erasing: probability of random erasing.

    Raises:
        WSSSError: bounds that are no shares, a recipe that is none of timm's.
    """

    def __init__(
        self,
        *,
        crop_size: int = 448,
        area: tuple[float, float] = IMAGENET_AREA,
        auto_augment: str | None = INCREASING,
        erasing: Fraction = 0.25,
    ) -> None:
        self.crop_size = crop_size
        self.area = check_area(area)
        self.rand_augment = rand_augment(auto_augment) if auto_augment else None
        self.erasing = erasing

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C), normalised.
        """
        view = random_resized_crop(Image.fromarray(rgb), self.crop_size, self.area, rng)
        if self.rand_augment is not None:
            view = randomly_augmented(self.rand_augment, view, rng)
        return {"image": erase_box(normalise(view), rng, self.erasing)}
