"""Dataset-level confusion matrices: the one source of every IoU that this package prints.

Counts are int64 and summed over batches and ranks, so a result does not depend on how the images
were split. IoU is computed once from the total, never averaged over images (torchmetrics'
``MeanIoU`` averages per image and is not the field's mIoU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IGNORE_INDEX

IgnoredPrediction = Literal["ignored_as_background", "excluded"]


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says; NaN marks a class that the ground truth never shows.

    Attributes:
        iou: (C,) float64, TP / (TP + FP + FN).
        precision: (C,) float64, TP / (TP + FP); NaN also where nothing was predicted.
        recall: (C,) float64, TP / (TP + FN); under-activation is ``1 - recall``.
        over: (C,) float64, FP / (TP + FN), over-activation.
        miou: mean of ``iou`` over the classes that occur in the ground truth; NaN where that is
            at most the background, for which no prediction is needed.
        pixel_accuracy: share of counted pixels that are right.
    """

    iou: Tensor
    precision: Tensor
    recall: Tensor
    over: Tensor
    miou: float
    pixel_accuracy: float


class Counts(NamedTuple):
    """Pixel counts of a :class:`ConfusionMatrix`.

    Attributes:
        matrix: (C, C) int64, rows are ground truth, columns are predictions.
        abstained: (C,) int64, ground-truth pixels whose prediction was 255.
    """

    matrix: Tensor
    abstained: Tensor


def scores(matrix: Tensor) -> Scores:
    """Turn a confusion matrix into scores.

    Args:
        matrix: (C, C) integer counts, rows are ground truth, columns are predictions.

    Returns:
        The scores, in float64 on the CPU.
    """
    counts = matrix.detach().cpu().double()
    truth, predicted, hit = counts.sum(1), counts.sum(0), counts.diagonal()
    nan = torch.full_like(truth, torch.nan)
    occurs = truth > 0
    iou = torch.where(occurs, hit / (truth + predicted - hit), nan)
    return Scores(
        iou=iou,
        precision=torch.where(occurs & (predicted > 0), hit / predicted, nan),
        recall=torch.where(occurs, hit / truth, nan),
        over=torch.where(occurs, (predicted - hit) / truth, nan),
        miou=iou.nanmean().item() if occurs[1:].any() else float("nan"),
        pixel_accuracy=(hit.sum() / counts.sum()).item(),
    )


def score_pseudo_labels(counts: Counts, ignored: IgnoredPrediction) -> Scores:
    """Score label maps that may abstain (255), under a stated policy.

    Leaving abstentions out of the score rewards a method for labelling little, so this number is
    only meaningful beside the other policy and :func:`coverage` (field.md D.3).

    Args:
        counts: result of :meth:`ConfusionMatrix.compute`.
        ignored: ``ignored_as_background`` counts 255 as background, ``excluded`` leaves it out.

    Returns:
        The scores under that policy.
    """
    if ignored == "excluded":
        return scores(counts.matrix)
    matrix = counts.matrix.clone()
    matrix[:, 0] += counts.abstained
    return scores(matrix)


def coverage(counts: Counts) -> float:
    """Give the share of counted pixels with a label other than 255; NaN without pixels."""
    labelled, abstained = counts.matrix.sum().item(), counts.abstained.sum().item()
    total = labelled + abstained
    return labelled / total if total else float("nan")


def check_target(target: Tensor, num_classes: int) -> Tensor:
    """Check a target, and give the boolean mask of the pixels that count.

    Raises:
        WSSSError: an id is neither a class nor 255.
    """
    valid = target != IGNORE_INDEX
    wrong = valid & ((target < 0) | (target >= num_classes))
    if wrong.any():
        raise WSSSError(
            f"ground truth holds class id {int(target[wrong][0])}, expected 0..{num_classes - 1} "
            f"or {IGNORE_INDEX}; check the masks and the class list of the data configuration"
        )
    return valid


def _same_shape(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape:
        raise WSSSError(
            f"prediction {tuple(pred.shape)} and ground truth {tuple(target.shape)} differ in "
            "size; resize the prediction to the mask first"
        )


class ConfusionMatrix(Metric):
    """Confusion matrix over pixels, exact for any number of ranks.

    Pixels whose ground truth is 255 never count. A prediction of 255 is an error unless
    ``allow_ignored_prediction`` is set; then it is counted apart and
    :func:`score_pseudo_labels` says what it is worth.

    Args:
        num_classes: number of classes C with the background.
        allow_ignored_prediction: whether predictions may abstain with 255.
    """

    full_state_update = False
    matrix: Tensor
    abstained: Tensor

    def __init__(self, *, num_classes: int, allow_ignored_prediction: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.allow_ignored_prediction = allow_ignored_prediction
        shape = (num_classes, num_classes)
        self.add_state("matrix", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state(
            "abstained", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            pred: (..., H, W) integer class ids, on any device.
            target: same shape, class ids or 255.

        Raises:
            WSSSError: the shapes differ or an id is neither a class nor an allowed 255.
        """
        _same_shape(pred, target)
        pred, target = pred.to(self.device).long(), target.to(self.device).long()
        valid = check_target(target, self.num_classes)
        pred, target = pred[valid], target[valid]
        abstain = pred == IGNORE_INDEX
        wrong = (pred < 0) | (pred >= self.num_classes)
        if self.allow_ignored_prediction:
            wrong &= ~abstain
        if wrong.any():
            raise WSSSError(
                f"prediction holds class id {int(pred[wrong][0])}, expected "
                f"0..{self.num_classes - 1}; the model and the data disagree on the classes"
            )
        columns = self.num_classes + 1
        column = torch.where(abstain, self.num_classes, pred)
        counts = torch.bincount(
            target * columns + column, minlength=self.num_classes * columns
        ).view(self.num_classes, columns)
        self.matrix += counts[:, : self.num_classes]
        self.abstained += counts[:, self.num_classes]

    def compute(self) -> Counts:
        """Give the counts summed over batches (and ranks, where several run)."""
        return Counts(self.matrix, self.abstained)


class ThresholdConfusion(Metric):
    """Confusion matrices of "class if its CAM value exceeds the threshold, else background".

    The strongest class of a pixel does not depend on the threshold, so one histogram of
    (threshold bucket, ground truth, strongest class) gives the exact matrix at every threshold;
    the maps are read once instead of once per threshold.

    Args:
        num_classes: number of classes C with the background.
        thresholds: T strictly ascending thresholds in [0, 1].

    Raises:
        WSSSError: the thresholds are empty, unsorted or outside [0, 1].
    """

    full_state_update = False
    histogram: Tensor

    def __init__(self, *, num_classes: int, thresholds: Sequence[float]) -> None:
        super().__init__()
        ascending = all(low < high for low, high in pairwise(thresholds))
        if not thresholds or not ascending or thresholds[0] < 0 or thresholds[-1] > 1:
            raise WSSSError(
                f"CAM thresholds must be ascending values in [0, 1], got {list(thresholds)}"
            )
        self.num_classes = num_classes
        self.thresholds = tuple(float(t) for t in thresholds)
        shape = (len(thresholds) + 1, num_classes, num_classes - 1)
        self.add_state("histogram", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, cam: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            cam: (B, C-1, H, W) values in [0, 1]; classes not to be considered are zero.
            target: (B, H, W) class ids or 255.

        Raises:
            WSSSError: sizes disagree, a CAM value is NaN or a ground-truth id is unknown.
        """
        if cam.shape[1] != self.num_classes - 1:
            raise WSSSError(
                f"cams hold {cam.shape[1]} classes, expected {self.num_classes - 1} foreground "
                "classes; the model and the data disagree on the classes"
            )
        value, strongest = cam.to(self.device).max(dim=1)
        _same_shape(value, target)
        if value.isnan().any():
            raise WSSSError("a CAM holds NaN: the model has diverged or its weights are damaged")
        target = target.to(self.device).long()
        valid = check_target(target, self.num_classes)
        # right=False: the bucket is the number of thresholds strictly below the value, so that
        # `value > threshold[j]` is exactly `bucket > j`, equality included.
        boundaries = torch.tensor(self.thresholds, dtype=value.dtype, device=self.device)
        bucket = torch.bucketize(value, boundaries)
        foreground = self.num_classes - 1
        flat = (bucket * self.num_classes + target) * foreground + strongest
        counts = torch.bincount(flat[valid], minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def compute(self) -> Tensor:
        """Give (T, C, C) int64: the confusion matrix at each threshold."""
        # [j] holds the pixels whose bucket is at most j, i.e. background at threshold j.
        below = self.histogram.cumsum(0)[:-1]
        above = self.histogram.sum(0, keepdim=True) - below
        return torch.cat([below.sum(-1, keepdim=True), above], dim=-1)
