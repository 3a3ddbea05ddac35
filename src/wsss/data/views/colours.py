"""Colour steps that several methods share; they run in albumentations."""

import random

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wsss.maps.pixels import normalise


def colour_jitter(probability: float) -> A.ColorJitter:
    """Make torchvision's ``ColorJitter(0.4, 0.4, 0.2, 0.1)``, applied with a probability."""
    return A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=probability)


def applied(
    steps: A.Compose, view: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Apply albumentations' steps to a view (H, W, 3) with the draws of ``rng``."""
    # Not set_random_seed: it gives every step the same seed, hence the same first draw, so that
    # for example only jittered views would ever be greyed. Sharing the generators keeps the
    # steps independent.
    steps.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    image: NDArray[np.uint8] = steps(image=view)["image"]
    return image


def augment(steps: A.Compose, view: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Apply albumentations' steps to a view (H, W, 3), and normalise it: (3, H, W)."""
    return normalise(applied(steps, view, rng))
