"""Counts on whole label maps: confusion, boundary, trimap, object size, and each image's own cells.

What the ground truth alone decides (:class:`Regions`) is computed once an image and shared by all
label maps of that image. All states are int64 sums or lists of integers, so any number of ranks
gives the same result to the last integer.

Definitions (they are part of every protocol card):

* *Boundary IoU* (Cheng et al., CVPR 2021): each region is reduced to its pixels within d px
  (Chebyshev) of its contour, d = 2 % of the image diagonal, the image frame being a contour; then
  IoU per class over the data set. Void is copied into the prediction first, so that both sides
  see the same contour there.
* *Trimap IoU at w*: IoU over the pixels within w px (Chebyshev) of a label change of the ground
  truth; void is a label for finding the change and never counted.
* *IoU by size*: an object is an 8-connected component of a class in the ground truth, its size its
  share of the image: small below 1 %, large from 10 %. A predicted pixel belongs to the size of
  the nearest object of its class; where the image has none, to no size.
* Abstentions (255) are background in all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from wsss.core.errors import WSSSError
from wsss.evaluation.confusion import (
    ConfusionMatrix,
    Counts,
    score_pseudo_labels,
    scores,
)
from wsss.evaluation.per_image import co_occurrence, mean_iou, per_image_counts
from wsss.maps.pixels import IGNORE_INDEX

BOUNDARY_RATIO = 0.02
TRIMAP_WIDTHS = (3, 5, 10)
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (0.01, 0.1)
NO_SIZE = len(SIZES)
HIT, TRUTH, PREDICTED = range(3)

#: what a protocol card says about the above
DEFINITIONS = {
    "boundary_ratio": BOUNDARY_RATIO,
    "trimap_widths_px": list(TRIMAP_WIDTHS),
    "size_limits": list(SIZE_LIMITS),
}

LabelMap = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def _label_changes(labels: LabelMap, radius: int) -> Mask:
    """Mark the pixels (H, W) whose (2 radius + 1)^2 window, cut at the frame, has two labels."""
    kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    changes: Mask = cv2.erode(labels, kernel) != cv2.dilate(labels, kernel)
    return changes


def _contour_band(labels: LabelMap, reach: int) -> Mask:
    """Mark the pixels (H, W) within ``reach`` px of their region's contour or of the frame."""
    band = _label_changes(labels, reach)
    band[:reach] = band[-reach:] = True
    band[:, :reach] = band[:, -reach:] = True
    return band


@dataclass(frozen=True)
class Regions:
    """What one ground-truth mask says about where pixels lie.

    Attributes:
        target: (H, W) class ids and 255.
        valid: (H, W), not void.
        truth: (n,) int64 class ids of the valid pixels.
        reach: width d of the boundary band in pixels.
        band: (H, W), within d of the contour of its own region.
        near: which of the n valid pixels lie in some trimap.
        ring: (n',) number of trimaps, narrowest first, that do not hold these pixels.
        slot: (C,) row of ``size`` for every class.
        size: (S, H, W) size of the nearest object of a class; row 0 is all ``NO_SIZE``.
        size_truth: (4, C) int64 foreground pixels of every size and class.
    """

    target: LabelMap
    valid: Mask
    truth: NDArray[np.int64]
    reach: int
    band: Mask
    near: NDArray[np.intp]
    ring: NDArray[np.int64]
    slot: NDArray[np.intp]
    size: LabelMap
    size_truth: NDArray[np.int64]

    @classmethod
    def of(cls, mask: Tensor, num_classes: int) -> Regions:
        """Analyse a mask.

        Args:
            mask: (H, W) integer class ids or 255.
            num_classes: C, with the background.
        """
        target: LabelMap = mask.cpu().numpy().astype(np.uint8)
        height, width = target.shape
        valid: Mask = target != IGNORE_INDEX
        reach = max(1, round(BOUNDARY_RATIO * float(np.hypot(height, width))))
        ring = np.zeros(target.shape, np.uint8)
        for pixels in TRIMAP_WIDTHS:
            ring += ~_label_changes(target, pixels)
        ring = ring[valid]
        near = np.flatnonzero(ring < len(TRIMAP_WIDTHS))
        slot, size = _size_of_nearest_object(target, num_classes)
        foreground = valid & (target > 0)
        classes = target[foreground].astype(np.intp)
        bins = size[slot[classes], *np.nonzero(foreground)]
        truth = np.bincount(bins * num_classes + classes, minlength=(NO_SIZE + 1) * num_classes)
        return cls(
            target=target,
            valid=valid,
            truth=target[valid].astype(np.int64),
            reach=reach,
            band=_contour_band(target, reach),
            near=near,
            ring=ring[near].astype(np.int64),
            slot=slot,
            size=size,
            size_truth=truth.reshape(NO_SIZE + 1, num_classes),
        )


def _size_of_nearest_object(
    target: LabelMap, num_classes: int
) -> tuple[NDArray[np.intp], LabelMap]:
    """Give at every pixel, for each present class, the size of its nearest object."""
    counts = np.bincount(target.ravel(), minlength=num_classes)[:num_classes]
    present = np.flatnonzero(counts[1:]) + 1
    slot = np.zeros(num_classes, np.intp)
    slot[present] = np.arange(1, len(present) + 1)
    size = np.full((len(present) + 1, *target.shape), NO_SIZE, np.uint8)
    for row, class_id in enumerate(present, start=1):
        inside = target == class_id
        # components of the zeros, spread to all pixels by distance (5 x 5 chamfer)
        _, nearest = cv2.distanceTransformWithLabels(
            (~inside).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
        )
        areas = np.bincount(nearest[inside]) / target.size
        size[row] = np.digitize(areas, SIZE_LIMITS).astype(np.uint8)[nearest]
    return slot, size


class LabelMapTotals(NamedTuple):
    """Result of :class:`LabelMapCounts`.

    Attributes:
        counts: confusion matrix and abstentions.
        trimap: (W, C, C) int64 confusion inside each trimap.
        boundary: (C, 3) int64 hits, truth and predictions in the contour bands.
        size: (4, C, 3) int64 the same by size; the last is "the image has no object of the class".
        cells: (n, 3) int64 rows (image, truth * (C + 1) + prediction, pixels), sorted; a
            prediction of C means 255.
    """

    counts: Counts
    trimap: Tensor
    boundary: Tensor
    size: Tensor
    cells: Tensor


class LabelMapCounts(ConfusionMatrix):
    """A confusion matrix that also knows where its errors lie, and in which image.

    Args:
        num_classes: number of classes C with the background.
        allow_ignored_prediction: whether predictions may abstain with 255.
    """

    trimap: Tensor
    boundary: Tensor
    size: Tensor
    cells: list[Tensor]

    def __init__(self, *, num_classes: int, allow_ignored_prediction: bool = False) -> None:
        super().__init__(num_classes=num_classes, allow_ignored_prediction=allow_ignored_prediction)
        for name, shape in (
            ("trimap", (len(TRIMAP_WIDTHS), num_classes, num_classes)),
            ("boundary", (num_classes, 3)),
            ("size", (NO_SIZE + 1, num_classes, 3)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cells", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Empty the metric."""
        super().reset()
        # a rank without images must still contribute rows of the right width, see ImageLevelScores
        self.cells.append(torch.empty(0, 3, dtype=torch.int64, device=self.device))

    def update(self, pred: Tensor, regions: Regions, index: int) -> None:  # type: ignore[override]
        """Count one image.

        Args:
            pred: (H, W) integer class ids.
            regions: of its ground truth.
            index: number of the image in its split.

        Raises:
            WSSSError: the shapes differ or an id is neither a class nor an allowed 255.
        """
        labels = self._checked(pred, regions)
        settled = np.where(labels == IGNORE_INDEX, 0, labels).astype(np.uint8)
        cells = self._cells(labels[regions.valid], regions)
        self.matrix += self._on_device(cells[:, : self.num_classes])
        self.abstained += self._on_device(cells[:, self.num_classes])
        cell = np.flatnonzero(cells)
        rows = np.stack([np.full_like(cell, index), cell, cells.ravel()[cell]], axis=1)
        self.cells.append(self._on_device(rows))
        self.trimap += self._on_device(self._trimap(settled[regions.valid], regions))
        self.boundary += self._on_device(self._boundary(settled, regions))
        self.size += self._on_device(self._size(settled, regions))

    def _checked(self, pred: Tensor, regions: Regions) -> LabelMap:
        """Give the prediction as uint8; ids are checked where they count."""
        if pred.shape != regions.target.shape:
            raise WSSSError(
                f"prediction {tuple(pred.shape)} and ground truth {regions.target.shape} differ in "
                "size; resize the prediction to the mask first"
            )
        ids = pred.cpu().numpy()
        wrong = (ids < 0) | (ids >= self.num_classes)
        if wrong.any():
            if self.allow_ignored_prediction:
                wrong &= ids != IGNORE_INDEX
            if (wrong & regions.valid).any():
                raise WSSSError(
                    f"prediction holds class id {int(ids[wrong & regions.valid][0])}, expected "
                    f"0..{self.num_classes - 1}; the model and the data disagree on the classes"
                )
        return ids.astype(np.uint8)

    def compute(self) -> LabelMapTotals:  # type: ignore[override]
        """Give the counts summed over images (and ranks, where several run)."""
        cells = dim_zero_cat(self.cells).cpu()
        order = np.lexsort((cells[:, 1].numpy(), cells[:, 0].numpy()))
        return LabelMapTotals(
            super().compute(), self.trimap, self.boundary, self.size, cells[torch.from_numpy(order)]
        )

    def _on_device(self, counts: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(counts).to(self.device, non_blocking=True)

    def _cells(self, guess: LabelMap, regions: Regions) -> NDArray[np.int64]:
        """Count the (C, C + 1) confusion of the valid pixels, abstentions last."""
        columns = self.num_classes + 1
        column = np.where(guess == IGNORE_INDEX, self.num_classes, guess)
        cell = np.bincount(regions.truth * columns + column, minlength=columns * self.num_classes)
        return cell.reshape(self.num_classes, columns)

    def _trimap(self, guess: LabelMap, regions: Regions) -> NDArray[np.int64]:
        """Count the (W, C, C) confusion inside each trimap, of the valid pixels."""
        classes, widths = self.num_classes, len(TRIMAP_WIDTHS)
        cell = (regions.ring * classes + regions.truth[regions.near]) * classes
        cell += guess[regions.near]
        rings = np.bincount(cell, minlength=widths * classes**2).reshape(widths, classes, classes)
        # a wider trimap holds the narrower ones
        return rings.cumsum(axis=0)

    def _boundary(self, settled: LabelMap, regions: Regions) -> NDArray[np.int64]:
        visible = np.where(regions.valid, settled, IGNORE_INDEX).astype(np.uint8)
        truth = regions.band & regions.valid
        guess = _contour_band(visible, regions.reach) & regions.valid
        hit = truth & guess & (visible == regions.target)
        return np.stack(
            [self._per_class(regions.target[hit]), self._per_class(regions.target[truth]),
             self._per_class(visible[guess])], axis=1,
        )  # fmt: skip

    def _per_class(self, labels: LabelMap) -> NDArray[np.int64]:
        return np.bincount(labels, minlength=self.num_classes)

    def _size(self, settled: LabelMap, regions: Regions) -> NDArray[np.int64]:
        foreground = regions.valid & (settled > 0)
        classes = settled[foreground].astype(np.intp)
        bins = regions.size[regions.slot[classes], *np.nonzero(foreground)]
        cell = bins * self.num_classes + classes
        length = (NO_SIZE + 1) * self.num_classes
        hits = cell[classes == regions.target[foreground]]
        flat = [
            np.bincount(hits, minlength=length),
            regions.size_truth.ravel(),
            np.bincount(cell, minlength=length),
        ]
        return np.stack(flat, axis=1).reshape(NO_SIZE + 1, self.num_classes, 3)


def _iou(counts: Tensor) -> Tensor:
    """Divide (..., 3) hits, truth, predictions to (...) float64 IoU; NaN without truth."""
    hit, truth, predicted = counts.detach().cpu().double().unbind(-1)
    return torch.where(truth > 0, hit / (truth + predicted - hit), torch.nan)


def label_map_scores(totals: LabelMapTotals) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Give all scores of one kind of label map; 255 counts as background.

    Args:
        totals: result of :meth:`LabelMapCounts.compute`.

    Returns:
        Numbers of the data set (fractions, means over the classes that occur), and columns per
        class.

    Raises:
        WSSSError: nothing was counted.
    """
    if not len(totals.cells):
        raise WSSSError("no label map was counted")
    plain = score_pseudo_labels(totals.counts, "ignored_as_background")
    boundary, sizes = _iou(totals.boundary), _iou(totals.size[:NO_SIZE])
    counts = per_image_counts(totals.cells.numpy(), num_classes=len(plain.iou))
    together = co_occurrence(totals.cells.numpy(), num_classes=len(plain.iou))
    columns = {
        "iou": plain.iou,
        "precision": plain.precision,
        "recall": plain.recall,
        "over": plain.over,
        "under": 1 - plain.recall,
        "boundary_iou": boundary,
    }
    values: dict[str, Any] = {
        "miou": plain.miou,
        "pixel_accuracy": plain.pixel_accuracy,
        "image_miou": float(np.nanmean(mean_iou(counts.values))),
        **{name: columns[name].nanmean().item() for name in columns if name != "iou"},
        "trimap_iou": {
            str(width): scores(matrix).miou
            for width, matrix in zip(TRIMAP_WIDTHS, totals.trimap, strict=True)
        },
        "size_iou": {name: sizes[row, 1:].nanmean().item() for row, name in enumerate(SIZES)},
        "size_pixels": totals.size[:NO_SIZE, :, TRUTH].sum(1).tolist(),
        "hallucinated": together.hallucinated,
        "co_occurrence": together.shares.tolist(),
    }
    return values, {name: column.tolist() for name, column in columns.items()}
