"""Score maps that lie in memory, by the counters that runs are scored by."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.evaluation.inference import resized
from wsss.evaluation.protocol import LABEL_MAPS, Protocol
from wsss.evaluation.tally import Tally, Truth
from wsss.maps.pixels import IGNORE_INDEX


def evaluate_maps(
    maps: Iterable[ArrayLike],
    masks: Iterable[ArrayLike],
    class_names: Sequence[str],
    *,
    kind: str = "pseudo_label",
    cam_threshold: float = 0.5,
) -> dict[str, Any]:
    """Score label maps or class maps against ground truth, one image after the other.

    The iterables are read in step, so that generators need no room for a whole data set.

    Args:
        maps: one an image. A label map is (H, W), class ids, at the mask's size; class maps are
            (K, h, w) in [0, 1], resized bilinearly, and scored for the classes in the mask.
        masks: (H, W) class ids each, 0 background, 255 not counted.
        class_names: the K foreground classes.
        kind: what label maps are scored as: ``pseudo_label`` (255 allowed), ``seed``, ``seg``,
            ``seg_ms``, ``seg_crf`` or ``seg_ms_crf``.
        cam_threshold: declared background threshold of class maps, which are scored as ``seed``.

    Returns:
        The metrics of :meth:`wsss.evaluation.tally.Tally.compute`, as ``results.json`` has them.

    Raises:
        WSSSError: no image, another number of maps than of masks, sizes or ids that do not fit.
    """
    if kind not in LABEL_MAPS:
        raise WSSSError(f"kind={kind}: expected one of {', '.join(LABEL_MAPS)}")
    tally = Tally(protocol=Protocol(cam_threshold=cam_threshold), class_names=class_names)
    tally.reset()
    count = 0
    try:
        for count, (single, mask) in enumerate(zip(maps, masks, strict=True), start=1):
            _count(tally, np.asarray(single), np.asarray(mask), kind, count - 1)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise WSSSError("maps and masks differ in number; give one map a mask") from error
    if not count:
        raise WSSSError("there is no map to score")
    return tally.compute() | {"num_images": count, "notes": []}


def _count(tally: Tally, single: Any, mask: Any, kind: str, index: int) -> None:
    """Count the map, or the class maps, of one image."""
    target = torch.from_numpy(mask.astype(np.int64))[None]
    truth = Truth.of(
        {"mask": target, "rgb": torch.empty(1, 0), "index": torch.tensor([index])},
        tally.num_classes,
    )
    if single.ndim == 2:
        tally.count_labels(kind, torch.from_numpy(single.astype(np.int64))[None], truth)
        return
    if single.ndim != 3 or len(single) != len(tally.class_names):
        raise WSSSError(
            f"map {index} is an array {single.shape}; expected class ids (H, W) or class maps "
            f"({len(tally.class_names)}, h, w)"
        )
    cams = resized(torch.from_numpy(single.astype(np.float32))[None], target.shape[-2:])
    labels = _labels_in(target, len(tally.class_names))
    tally.count_cams(cams * labels[..., None, None], labels, labels, truth)


def _labels_in(target: Tensor, num_classes: int) -> Tensor:
    """Give the classes of a mask (1, H, W) as labels (1, K)."""
    labels = torch.zeros(1, num_classes)
    present = target[(target > 0) & (target != IGNORE_INDEX)].unique()
    labels[0, present - 1] = 1
    return labels
