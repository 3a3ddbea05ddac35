"""Paired bootstrap over images: what a difference of two mIoUs is worth.

mIoU is no mean over images, so no t-test fits it. Images are drawn with replacement, the same draw
for every run, and the data set's mIoU is taken of each draw. Where a method has several seeds they
are drawn too, so that the interval also holds what seeds do; with one seed it cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsss.evaluation.per_image import mean_iou

CHUNK = 50  # draws at once: bounds memory to CHUNK x images


@dataclass(frozen=True)
class Difference:
    """How one method stands to another.

    Attributes:
        value: difference of the means over seeds.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Draws:
    """mIoU of every method under common draws.

    Attributes:
        observed: method -> mean over its seeds.
        drawn: method -> (R,) mIoU of each draw.
    """

    observed: Mapping[str, float]
    drawn: Mapping[str, NDArray[np.float64]]

    def interval(self, one: str) -> tuple[float, float]:
        """Give the 95 % percentile interval of a method's mIoU."""
        low, high = np.percentile(self.drawn[one], (2.5, 97.5))
        return float(low), float(high)

    def difference(self, one: str, other: str) -> Difference:
        """Give ``one`` minus ``other``, with its 95 % percentile interval."""
        low, high = np.percentile(self.drawn[one] - self.drawn[other], (2.5, 97.5))
        return Difference(self.observed[one] - self.observed[other], float(low), float(high))


def draw(
    counts: Mapping[str, Sequence[NDArray[np.int64]]], *, resamples: int = 2000, seed: int = 0
) -> Draws:
    """Draw images (and seeds) and take the mIoU of every method.

    Args:
        counts: method -> for each of its runs (N, C, 3) hits, truth and predictions of the same N
            images in the same order.
        resamples: R.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    images = len(next(iter(counts.values()))[0])
    flat = {
        method: np.stack([run.reshape(images, -1) for run in runs]).astype(np.float64)
        for method, runs in counts.items()
    }
    drawn: dict[str, list[NDArray[np.float64]]] = {method: [] for method in counts}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = generator.multinomial(images, np.full(images, 1 / images), size=size)
        for method, runs in flat.items():
            classes = counts[method][0].shape[1]
            # (n, N, 3C) -> (n, size, C, 3) counts of each draw
            summed = (weights.astype(np.float64) @ runs).reshape(len(runs), size, classes, 3)
            seeds = generator.integers(len(runs), size=(size, len(runs)))
            drawn[method].append(mean_iou(summed)[seeds, np.arange(size)[:, None]].mean(axis=1))
    return Draws(
        {
            m: float(np.mean([mean_iou(run.sum(axis=0)) for run in runs]))
            for m, runs in counts.items()
        },
        {method: np.concatenate(parts) for method, parts in drawn.items()},
    )
