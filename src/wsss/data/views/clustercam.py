"""ClusterCAM's view of a training image (clustercam.md section 4).

It is timm's ImageNet recipe, whose RandAugment is timm's own table of Pillow operations;
albumentations has other ones under the same names, so timm's are used, fed from the sample's
generator.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.data.views.drawing import random_resized_crop
from wsss.maps.pixels import IMAGENET_MEAN, normalise

IMAGENET_AREA = (0.08, 1.0)
ERASED_AREA = (0.02, 1 / 3)
ERASED_LOG_RATIO = (np.log(0.3), np.log(1 / 0.3))


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
        if not 0 < area[0] <= area[1] <= 1:
            raise WSSSError(
                f"data.train_transform.area={list(area)}: expected two rising shares in (0, 1]"
            )
        self.area = (area[0], area[1])
        self.rand_augment = increasing_rand_augment()

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C), normalised.
        """
        picture = Image.fromarray(rgb)
        view = random_resized_crop(picture, self.crop_size, self.area, rng)
        augmented = Image.fromarray(view)
        operations = self.rand_augment.ops
        with _own_random(rng):
            for index in rng.integers(len(operations), size=self.rand_augment.num_layers):
                augmented = operations[index](augmented)
        return {"image": erase_box(normalise(np.array(augmented)), rng)}


def increasing_rand_augment() -> RandAugment:
    """Make timm's ``rand-m9-mstd0.5-inc1`` on Pillow images, filled with ImageNet's mean colour."""
    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    augment = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    )
    for operation in augment.ops:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterise as timm does; its strongest level keeps no bit: black until Pillow 13 refused."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def erase_box(image: Tensor, rng: np.random.Generator, probability: float = 0.25) -> Tensor:
    """Fill a random box of a normalised image (3, H, W) with N(0, 1) values, in place.

    Source: timm's RandomErasing in ``pixel`` mode with one box.
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = np.exp(rng.uniform(*ERASED_LOG_RATIO))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((3, h, w), dtype=np.float32)
            image[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            break
    return image


@contextmanager
def _own_random(rng: np.random.Generator) -> Iterator[None]:
    """Let code that draws from Python's global generator draw from ours instead."""
    before = random.getstate()
    random.seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(before)
