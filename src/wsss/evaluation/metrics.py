"""Ranking scores of images and of pixels (mAP, F1), exact for any number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IGNORE_INDEX


class ImageScores(NamedTuple):
    """Multi-label classification scores of a data set.

    Attributes:
        average_precision: K values, NaN for a class without a positive image.
        mean_average_precision: mean of the above over the classes that occur.
        f1: macro F1 at probability 0.5, over the classes that occur.
        f1_images: F1 of each image's label set at probability 0.5, averaged over images.
        num_images: number of images.
    """

    average_precision: tuple[float, ...]
    mean_average_precision: float
    f1: float
    f1_images: float
    num_images: int


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute average precision per class, the sum of (R_n - R_{n-1}) P_n over distinct scores.

    Images of equal score count together, so the result does not depend on their order (and
    hence not on how ranks shared them).

    Args:
        logits: (M, K) scores, higher means present.
        labels: (M, K) in {0, 1}.

    Returns:
        (K,) float64; NaN for a class without a positive image.
    """
    result = torch.full((logits.shape[1],), torch.nan, dtype=torch.float64)
    for k in range(logits.shape[1]):
        positives = int(labels[:, k].sum())
        if positives == 0:
            continue
        score, order = logits[:, k].sort(descending=True)
        hits = labels[order, k].long().cumsum(0)
        last = torch.ones_like(score, dtype=torch.bool)  # last image of each group of equal score
        last[:-1] = score[1:] != score[:-1]
        hits = hits[last].double()
        taken = torch.nonzero(last).flatten().double() + 1
        gained = hits.diff(prepend=hits.new_zeros(1))
        result[k] = (gained / positives * (hits / taken)).sum()
    return result


def f1_per_axis(predicted: Tensor, labels: Tensor, dim: int) -> Tensor:
    """Compute F1 along one axis, 2 TP / (2 TP + FP + FN); NaN where nothing is labelled along it.

    Args:
        predicted: (M, K) bool.
        labels: (M, K) bool.
        dim: 0 for one value a class, 1 for one value an image.

    Returns:
        (K,) or (M,) float64.
    """
    hit = (predicted & labels).sum(dim).double()
    total = predicted.sum(dim) + labels.sum(dim)
    return torch.where(labels.any(dim), 2 * hit / total, torch.nan)


class ImageLevelScores(Metric):
    """Collects class logits and image labels; computes mAP and F1 over the whole data set.

    Args:
        num_classes: number of foreground classes K.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Empty the metric."""
        super().reset()
        # A rank without images must still contribute (0, K): torchmetrics would send a
        # one-dimensional empty tensor, which does not gather with the other ranks' matrices.
        empty = torch.empty(0, self.num_classes, device=self.device)
        self.logits.append(empty)
        self.labels.append(empty.bool())

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K) class logits.
            labels: (B, K) multi-hot.

        Raises:
            WSSSError: the shapes are not (B, K).
        """
        if logits.shape != labels.shape or logits.shape[1] != self.num_classes:
            raise WSSSError(
                f"class logits {tuple(logits.shape)} and image labels {tuple(labels.shape)} must "
                f"both be (images, {self.num_classes}); the model and the data disagree"
            )
        self.logits.append(logits.detach().to(self.device).float())
        self.labels.append(labels.to(self.device) > 0.5)

    def compute(self) -> ImageScores:
        """Give the scores over all images of all ranks."""
        logits = dim_zero_cat(self.logits).cpu()
        labels = dim_zero_cat(self.labels).cpu()
        ap = average_precision(logits, labels)
        predicted = logits > 0
        return ImageScores(
            average_precision=tuple(ap.tolist()),
            mean_average_precision=ap.nanmean().item(),
            f1=f1_per_axis(predicted, labels, 0).nanmean().item(),
            f1_images=f1_per_axis(predicted, labels, 1).nanmean().item(),
            num_images=len(logits),
        )


class PixelAveragePrecision(Metric):
    """Average precision of class maps over all pixels: the quality of seeds without a threshold.

    A pixel's score is its map value in steps of 1/``LEVELS`` (rounded down); pixels of equal score
    enter together. Two histograms a class hold all there is to know, so maps are read once.

    Args:
        num_classes: number of foreground classes K.
    """

    LEVELS = 1000

    full_state_update = False
    histogram: Tensor

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        shape = (num_classes, 2, self.LEVELS + 1)
        self.add_state("histogram", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, cam: Tensor, active: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            cam: (B, K, H, W) values in [0, 1]; maps that are not active are zero.
            active: (B, K), non-zero where there is a map.
            target: (B, H, W) class ids or 255.
        """
        steps = self.LEVELS + 1
        for maps, allowed, truth in zip(cam, active > 0, target.to(cam.device), strict=True):
            valid = truth != IGNORE_INDEX
            truth = truth[valid]
            # a class without a map scores zero everywhere, which needs no pass over its pixels
            held = torch.bincount(truth, minlength=self.num_classes + 1)[1:]
            self.histogram[:, 1, 0] += torch.where(allowed, 0, held).to(self.device)
            self.histogram[:, 0, 0] += torch.where(allowed, 0, len(truth) - held).to(self.device)
            for k in allowed.nonzero().flatten().tolist():
                level = (maps[k][valid] * self.LEVELS).long().clamp(0, self.LEVELS)
                cell = (truth == k + 1).long() * steps + level
                counts = torch.bincount(cell, minlength=2 * steps)
                self.histogram[k] += counts.view(2, steps).to(self.device)

    def compute(self) -> Tensor:
        """Give (K,) float64; NaN for a class that the ground truth never shows."""
        # descending scores; the formula of `average_precision` on groups of equal score
        histogram = self.histogram.cpu().flip(-1)
        gained = histogram[:, 1].double()
        hits, taken = gained.cumsum(-1), histogram.sum(1).double().cumsum(-1)
        positives = hits[:, -1:]
        precision = hits / taken.clamp(min=1)
        found = (gained / positives.clamp(min=1) * precision).sum(-1)
        return torch.where(positives[:, 0] > 0, found, torch.nan)
