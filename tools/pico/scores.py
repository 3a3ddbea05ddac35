"""Measures: average precision of image labels, mIoU of CAMs."""

from __future__ import annotations

import cv2
import numpy as np
from cutouts import CLASSES


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Average over classes the area under precision and recall.

    Args:
        scores: ``(n, c)``.
        truth: ``(n, c)`` of 0 and 1.
    """
    values = []
    for s, t in zip(scores.T, truth.T, strict=True):
        if t.any():
            hit = t[np.argsort(-s, kind="stable")]
            precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
            values.append(float((precision * hit).sum() / hit.sum()))
    return float(np.mean(values))


def cam_miou(cams: np.ndarray, masks: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Measure the mIoU of the CAMs of the classes an image is labelled with, and background.

    Args:
        cams: ``(n, 8, h, w)``; negative values are cut and each map is scaled to a maximum of 1.
        masks: ``(n, s, s)``; 255 does not count.
        labels: ``(n, 8)``.
        threshold: background where no map reaches it.
    """
    counts = np.zeros((len(CLASSES) + 1,) * 2, np.int64)
    for cam, mask, label in zip(cams, masks, labels, strict=True):
        cam = np.maximum(cam, 0) * label[:, None, None]
        cam = cam / np.maximum(cam.max((1, 2), keepdims=True), 1e-6)
        full = np.stack([cv2.resize(c, mask.shape, interpolation=cv2.INTER_LINEAR) for c in cam])
        guess = np.where(full.max(0) >= threshold, full.argmax(0) + 1, 0)
        known = mask != 255
        np.add.at(counts, (mask[known], guess[known]), 1)
    hit = np.diag(counts)
    return float((hit / np.maximum(counts.sum(0) + counts.sum(1) - hit, 1)).mean())
