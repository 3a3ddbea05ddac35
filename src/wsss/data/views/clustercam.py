"""ClusterCAM's view of a training image (clustercam.md section 4): timm's ImageNet recipe."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.data.views.drawing import check_area, random_resized_crop
from wsss.data.views.imagenet import IMAGENET_AREA, erase_box, rand_augment, randomly_augmented
from wsss.maps.pixels import normalise


class ClusterCAMView:
    """Make the one view of a ClusterCAM training sample (clustercam.md section 4).

    Random resized crop (area 0.08-1 by default, ratio 3/4-4/3, bicubic), flip with
    p = 0.5, RandAugment ``rand-m9-mstd0.5-inc1`` (two of timm's operations, each with p = 0.5),
    normalisation, random erasing with p = 0.25 (one box of 2-33 % filled with N(0, 1) values).

    Args:
        crop_size: side of the view in pixels (448 in the paper).
        area: bounds of the crop's share of the image; small shares lose labelled objects.

    Raises:
        WSSSError: bounds that are no shares.
    """

    def __init__(self, *, crop_size: int = 448, area: tuple[float, float] = IMAGENET_AREA) -> None:
        self.crop_size = crop_size
        self.area = check_area(area)
        self.rand_augment = rand_augment()

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C), normalised.
        """
        view = random_resized_crop(Image.fromarray(rgb), self.crop_size, self.area, rng)
        augmented = randomly_augmented(self.rand_augment, view, rng)
        return {"image": erase_box(normalise(augmented), rng)}
