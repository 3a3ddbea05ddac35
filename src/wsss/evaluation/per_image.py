"""Confusion cells of single images: what paired bootstraps and co-occurrence are computed from.

A run keeps, for every kind of label map, the non-zero cells of each image's own confusion matrix.
That is a few integers an image (VOC: about 10), so comparing runs needs no recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.int64]


@dataclass(frozen=True)
class PerImage:
    """Counts of every image.

    Attributes:
        images: (N,) numbers of the images in their split, ascending.
        values: (N, C, 3) int64 hits, truth and predictions of every class.
    """

    images: NDArray[np.int64]
    values: NDArray[np.int64]


def _split(cells: Cells, num_classes: int) -> tuple[NDArray[np.int64], ...]:
    """Give images, their numbers 0..N-1 in each row, truth, prediction (C: 255) and pixels."""
    images, row = np.unique(cells[:, 0], return_inverse=True)
    truth, guess = np.divmod(cells[:, 1], num_classes + 1)
    return images, row, truth, guess, cells[:, 2]


def per_image_counts(cells: Cells, *, num_classes: int, exclude_ignored: bool = False) -> PerImage:
    """Count hits, truth and predictions of each image.

    Args:
        cells: (n, 3) rows (image, truth * (C + 1) + prediction, pixels).
        num_classes: C, with the background.
        exclude_ignored: leave out predictions of 255, instead of counting them as background.
    """
    images, row, truth, guess, pixels = _split(cells, num_classes)
    if exclude_ignored:
        kept = guess < num_classes
        row, truth, guess, pixels = row[kept], truth[kept], guess[kept], pixels[kept]
    else:
        guess = np.where(guess == num_classes, 0, guess)
    values = np.zeros((len(images), num_classes, 3), np.int64)
    hit = truth == guess
    np.add.at(values[..., 0], (row[hit], truth[hit]), pixels[hit])
    np.add.at(values[..., 1], (row, truth), pixels)
    np.add.at(values[..., 2], (row, guess), pixels)
    return PerImage(images, values)


def mean_iou(counts: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Average the IoU of (..., C, 3) hits, truth, predictions over the classes in the truth."""
    hit, truth, predicted = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    occurs = truth > 0
    iou = np.divide(hit, truth + predicted - hit, where=occurs, out=np.zeros_like(hit))
    number = occurs.sum(axis=-1)
    mean: NDArray[np.float64] = np.divide(
        iou.sum(axis=-1), number, where=number > 0, out=np.full(number.shape, np.nan)
    )
    return mean


@dataclass(frozen=True)
class CoOccurrence:
    """Which classes are taken for those that appear beside them (trains and their rails).

    Attributes:
        shares: (C, C) float64; [r, c] is the share of class r's pixels that is called c, over the
            images whose ground truth holds both; NaN where there are none, and on the diagonal.
        hallucinated: share of all foreground predictions whose class the image does not hold.
    """

    shares: NDArray[np.float64]
    hallucinated: float


def co_occurrence(cells: Cells, *, num_classes: int) -> CoOccurrence:
    """Count the confusion among classes of the same image; 255 counts as background.

    Args:
        cells: as in :func:`per_image_counts`.
        num_classes: C, with the background.
    """
    images, row, truth, guess, pixels = _split(cells, num_classes)
    guess = np.where(guess == num_classes, 0, guess)
    area = np.zeros((len(images), num_classes), np.int64)
    np.add.at(area, (row, truth), pixels)
    present = area > 0
    held = present[row, guess]
    taken = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(taken, (truth[held], guess[held]), pixels[held])
    beside = area.T @ present.astype(np.int64)
    shares = np.where(beside > 0, taken / np.maximum(beside, 1), np.nan)
    np.fill_diagonal(shares, np.nan)
    foreground = guess > 0
    claimed = pixels[foreground].sum()
    invented = pixels[foreground & ~held].sum()
    return CoOccurrence(shares, float(invented / claimed) if claimed else float("nan"))
