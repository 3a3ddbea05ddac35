"""Parts of timm's ImageNet recipe, on which MCTformer+ and ClusterCAM train.

RandAugment is timm's own table of Pillow operations; albumentations has other ones under the same
names, so timm's are used, fed from the sample's generator.
"""

import random
import re
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
from wsss.maps.pixels import IMAGENET_MEAN

IMAGENET_AREA = (0.08, 1.0)
INCREASING = "rand-m9-mstd0.5-inc1"
# magnitude, its deviation, number and probability of operations, which of them; timm's mmax is left
# out, for above magnitude 10 Pillow refuses to posterise
RECIPE = re.compile(
    r"rand(-(m(\d|10)|mstd\d+(\.\d+)?|n[1-9]|p(0(\.\d+)?|1)|inc[01]|t(weights|3aw?)))*"
)
ERASED_AREA = (0.02, 1 / 3)
ERASED_LOG_RATIO = (np.log(0.3), np.log(1 / 0.3))


def rand_augment(recipe: str = INCREASING) -> RandAugment:
    """Make timm's RandAugment on Pillow images, filled with ImageNet's mean colour.

    Args:
        recipe: timm's short form, such as ``rand-m9-mstd0.5-inc1``: magnitude 9 with deviation
            0.5, the operations that grow with it, two of them, each with p = 0.5.

    Raises:
        WSSSError: the recipe is none of timm's.
    """
    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    if not RECIPE.fullmatch(recipe):  # timm passes over what it does not know
        raise WSSSError(
            f"data.train_transform.auto_augment={recipe}: expected a recipe of timm's RandAugment "
            f"such as {INCREASING}, or null"
        )
    augment = rand_augment_transform(
        recipe, {"img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    )
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterise as timm does; its strongest level keeps no bit: black until Pillow 13 refused."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def randomly_augmented(
    augment: RandAugment, view: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply RandAugment to a view (H, W, 3) with the draws of ``rng``, not the global ones."""
    picture, weights = Image.fromarray(view), augment.choice_weights
    with _own_random(rng):
        for index in rng.choice(  # as RandAugment draws from numpy's global generator
            len(augment.ops), augment.num_layers, replace=weights is None, p=weights
        ):
            picture = augment.ops[index](picture)
    return np.array(picture)


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
