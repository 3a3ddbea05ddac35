"""Image-level classification scores (mAP and F1), exact for any number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from wsss.errors import WSSSError


class ImageScores(NamedTuple):
    """Multi-label classification scores of a data set.

    Attributes:
        average_precision: K values, NaN for a class without a positive image.
        mean_average_precision: Mean of the above over the classes that occur.
        f1: Macro F1 at probability 0.5, over the classes that occur.
        f1_images: F1 of each image's label set at probability 0.5, averaged over images.
        num_images: Number of images.
    """

    average_precision: tuple[float, ...]
    mean_average_precision: float
    f1: float
    f1_images: float
    num_images: int


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Average precision per class, sum of (R_n - R_{n-1}) P_n over distinct scores.

    Images of equal score enter together, so the result does not depend on their order (and
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
    """F1 along one axis, 2 TP / (2 TP + FP + FN); NaN where nothing is labelled along it.

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
        num_classes: Number of foreground classes K.
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
        """Empties the metric."""
        super().reset()
        # A rank without images must still contribute (0, K): torchmetrics would send a
        # one-dimensional empty tensor, which does not gather with the other ranks' matrices.
        empty = torch.empty(0, self.num_classes, device=self.device)
        self.logits.append(empty)
        self.labels.append(empty.bool())

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: (B, K) class logits.
            labels: (B, K) multi-hot.

        Raises:
            WSSSError: If the shapes are not (B, K).
        """
        if logits.shape != labels.shape or logits.shape[1] != self.num_classes:
            raise WSSSError(
                f"class logits {tuple(logits.shape)} and image labels {tuple(labels.shape)} must "
                f"both be (images, {self.num_classes}); the model and the data disagree"
            )
        self.logits.append(logits.detach().to(self.device).float())
        self.labels.append(labels.to(self.device) > 0.5)

    def compute(self) -> ImageScores:
        """Returns the scores over all images of all ranks."""
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
