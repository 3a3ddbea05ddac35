"""All counts of one evaluation, and the numbers that they give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from wsss.core.errors import WSSSError
from wsss.core.stopwatch import Stopwatch
from wsss.evaluation.confusion import (
    ThresholdConfusion,
    check_target,
    coverage,
    score_pseudo_labels,
    scores,
)
from wsss.evaluation.crf_queue import CRFQueue
from wsss.evaluation.inference import (
    HasFurtherMaps,
    ModuleLike,
    Prediction,
    localise,
    localise_further,
    predict,
    predicted_labels,
    pseudo_label,
    refinement,
)
from wsss.evaluation.label_maps import LabelMapCounts, Regions, label_map_scores
from wsss.evaluation.metrics import ImageLevelScores, PixelAveragePrecision
from wsss.evaluation.protocol import LABEL_MAPS, Protocol
from wsss.maps.pixels import IGNORE_INDEX
from wsss.maps.pseudo_labels import cam_to_label

NO_SEGMENTATION = "no segmentation head: segmentation is not scored"
NO_MASKS = "no masks: only image-level scores"
NO_CLASS_PIXELS = (
    "no mask has a pixel of a class (0 is background, 255 is ignored): only image-level scores"
)
Batch = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """Ground truth of a batch, analysed once for all that is counted on it.

    Attributes:
        mask: (B, H, W) class ids and 255.
        rgb: (B, H, W, 3) uint8.
        regions: of each mask.
        indices: numbers of the images in their split.
    """

    mask: Tensor
    rgb: Tensor
    regions: list[Regions]
    indices: list[int]

    @classmethod
    def of(cls, batch: Batch, num_classes: int) -> Self:
        """Take the ground truth of an evaluation batch.

        Raises:
            WSSSError: a mask holds ids outside 0..``num_classes`` - 1 and 255.
        """
        check_target(batch["mask"], num_classes)
        regions = [Regions.of(mask, num_classes) for mask in batch["mask"]]
        return cls(batch["mask"], batch["rgb"], regions, batch["index"].tolist())


class Tally(nn.Module):
    """All counts of one evaluation under one protocol.

    Args:
        protocol: what is measured.
        class_names: the K foreground classes.
        full: also score seeds with the module's own labels, beside those with true labels.
        further: names of the module's further maps that are scored as seeds.
    """

    def __init__(
        self,
        *,
        protocol: Protocol,
        class_names: Sequence[str],
        full: bool = False,
        further: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.both_labels = full and protocol.use_image_labels
        self.class_names = list(class_names)
        num_classes = len(self.class_names) + 1
        thresholds = protocol.curve_thresholds
        self.image_level = ImageLevelScores(num_classes=num_classes - 1)
        self.seed = ThresholdConfusion(num_classes=num_classes, thresholds=thresholds)
        self.seed_predicted = ThresholdConfusion(
            num_classes=num_classes, thresholds=(protocol.cam_threshold,)
        )
        self.seed_pixels = PixelAveragePrecision(num_classes=num_classes - 1)
        self.further = nn.ModuleDict(
            {
                name: ThresholdConfusion(num_classes=num_classes, thresholds=thresholds)
                for name in further
            }
        )
        self.maps = nn.ModuleDict(
            {
                name: LabelMapCounts(
                    num_classes=num_classes, allow_ignored_prediction=name == "pseudo_label"
                )
                for name in LABEL_MAPS
            }
        )
        self.refine = refinement(protocol)
        self.watch = Stopwatch(torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self.seed.device

    def reset(self) -> None:
        """Forget all counts."""
        self.watch = Stopwatch(self.device)
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def update(self, module: ModuleLike, batch: Batch, crf: CRFQueue | None) -> None:
        """Count one batch.

        Args:
            module: the method, in eval mode, without gradients.
            batch: ``image`` (B, 3, H, W) normalised, ``rgb`` (B, H, W, 3) uint8, ``mask``
                (B, H, W), ``labels`` (B, K), ``index`` (B,).
            crf: where images go for the dense CRF, or None.

        Raises:
            WSSSError: the module's classes do not match the data's.
        """
        images, target, labels = (
            batch[name].to(self.device, non_blocking=True) for name in ("image", "mask", "labels")
        )
        size = target.shape[-2:]
        with self.watch("segmentation"):
            prediction = predict(module, images, size, self.protocol)
        self.image_level.update(prediction.class_logits, labels)
        if bool((target == IGNORE_INDEX).all()):  # images without masks: nothing more to compare
            return
        guessed = predicted_labels(prediction.class_logits).to(labels)
        with self.watch("counting"):
            truth = Truth.of(batch, self.num_classes)
        self.count_segmentation(prediction, truth, labels, crf)
        allowed = labels if self.protocol.use_image_labels else guessed
        wanted = {"allowed": allowed}
        if self.both_labels:
            wanted["guessed"] = guessed
        if self.protocol.cam_high is not None:
            wanted["labels"] = labels
        with self.watch("cams"):
            cams = self.class_maps(module, images, size, wanted)
        self.count_cams(cams["allowed"], allowed, labels, truth, cams.get("labels"))
        if self.both_labels:
            with self.watch("counting"):
                self.seed_predicted.update(cams["guessed"] * guessed[..., None, None], target)
        if self.further:
            assert isinstance(module, HasFurtherMaps)
            with self.watch("further_maps"):
                further = localise_further(module, images, allowed, size, self.protocol)
            with self.watch("counting"):
                for name, maps in further.items():
                    self.further_counts(name).update(maps, target)

    def class_maps(
        self, module: ModuleLike, images: Tensor, size: Sequence[int], wanted: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute CAMs (B, K, H, W) for several sets of labels (B, K), by name.

        A class's map does not depend on the others', so one call serves every set; where classes
        compete (``module.classes_compete``), every set has a call of its own.
        """
        if not getattr(module, "classes_compete", False):
            union = torch.stack(list(wanted.values())).amax(0)
            cams = localise(module, images, union, size, self.protocol)
            return dict.fromkeys(wanted, cams)
        found: dict[str, Tensor] = {}
        for name, labels in wanted.items():
            same = [one for one in found if torch.equal(wanted[one], labels)]
            own = found[same[0]] if same else localise(module, images, labels, size, self.protocol)
            found[name] = own
        return found

    @property
    def num_classes(self) -> int:
        """C, with the background."""
        return len(self.class_names) + 1

    def count_cams(
        self,
        cams: Tensor,
        allowed: Tensor,
        labels: Tensor,
        truth: Truth,
        of_labels: Tensor | None = None,
    ) -> None:
        """Count class maps: the threshold curve, pixel AP, seeds and pseudo labels.

        Args:
            cams: (B, K, H, W) in [0, 1] at mask size.
            allowed: (B, K), classes that seeds may show.
            labels: (B, K) image labels, by which pseudo labels are made.
            truth: of the same images.
            of_labels: as ``cams``, for the image labels; None: the same.
        """
        target = truth.mask.to(cams.device, non_blocking=True)
        with self.watch("counting"):
            seeds = cams * allowed[..., None, None]
            self.seed.update(seeds, target)
            self.seed_pixels.update(seeds, allowed, target)
            declared = cam_to_label(seeds, allowed, bg_threshold=self.protocol.cam_threshold)
            self.count_labels("seed", declared, truth)
        if self.protocol.cam_high is None:
            return
        with self.watch("pseudo_labels"):
            true = (cams if of_labels is None else of_labels) * labels[..., None, None]
            pseudo = pseudo_label(self.refine, truth.rgb, true, labels, self.protocol)
        self.count_labels("pseudo_label", pseudo, truth)

    def count_labels(self, name: str, pred: Tensor, truth: Truth) -> None:
        """Count label maps (B, H, W) under one of the names ``LABEL_MAPS``."""
        with self.watch("counting"):
            for b, one in enumerate(pred.cpu()):
                self.counts(name).update(one, truth.regions[b], truth.indices[b])

    def count_segmentation(
        self, prediction: Prediction, truth: Truth, labels: Tensor, crf: CRFQueue | None
    ) -> None:
        """Count segmentations, and queue them for the CRF."""
        for name, logits in (("seg", prediction.single), ("seg_ms", prediction.merged)):
            if logits is None:
                continue
            if logits.shape[1] != self.num_classes:
                raise WSSSError(
                    f"segmentation logits hold {logits.shape[1]} classes, expected "
                    f"{self.num_classes} (background and the data's classes)"
                )
            self.count_labels(name, logits.max(dim=1).indices, truth)  # sooner than argmax
            if crf is not None:
                prune = labels if self.protocol.crf_prune else None
                counts = self.counts(f"{name}_crf")
                with self.watch("crf"):
                    crf.submit(logits, truth.rgb, truth.regions, truth.indices, prune, counts)

    def counts(self, name: str) -> LabelMapCounts:
        """Give the counts of one kind of label map."""
        counts = self.maps[name]
        assert isinstance(counts, LabelMapCounts)
        return counts

    def further_counts(self, name: str) -> ThresholdConfusion:
        """Give the counts of one further map."""
        counts = self.further[name]
        assert isinstance(counts, ThresholdConfusion)
        return counts

    def compute(self) -> dict[str, Any]:
        """Compute all numbers, summed over ranks where several run.

        Returns:
            Flat metrics (fractions, None where a number does not exist), ``seed_curve``, ``maps``
            (:func:`label_map_scores` by kind of label map), ``per_class`` (columns of equal length,
            background first), ``confusion`` (nested lists, rows are ground truth), ``cells``
            (arrays, see `wsss.evaluation.per_image`) and ``notes``.
        """
        # A metric without images is expected: no segmentation head, or a rank without a share.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*called before the ``update``.*")
            return self._compute()

    def _compute(self) -> dict[str, Any]:
        result: dict[str, Any] = {"maps": {}}
        columns: dict[str, Any] = {"class": ["background", *self.class_names]}
        result |= {"per_class": columns, "confusion": {}, "cells": {}}
        image = self.image_level.compute()
        self._seeds(result)
        for name in self.further:
            self._further_map(name, result)
        for name in LABEL_MAPS:
            self._label_maps(name, result)
        scored = bool(image.num_images)
        result |= {
            "num_images": image.num_images,
            "image_map": image.mean_average_precision if scored else None,
            "image_f1": image.f1 if scored else None,
            "image_f1_images": image.f1_images if scored else None,
        }
        columns["image_ap"] = [math.nan, *image.average_precision]
        # NaN where no image has a label to compare with
        result = {key: None if _is_nan(value) else value for key, value in result.items()}
        if not result["maps"]:
            counted = any(len(self.counts(name).compute().cells) for name in LABEL_MAPS)
            return result | {"notes": [NO_CLASS_PIXELS if counted else NO_MASKS]}
        return result | {"notes": [] if result["seg_miou"] is not None else [NO_SEGMENTATION]}

    def _seeds(self, result: dict[str, Any]) -> None:
        thresholds = self.protocol.curve_thresholds
        matrices = self.seed.compute().cpu()
        result |= {"seed_miou_oracle": None, "seed_miou_predicted_labels": None}
        predicted: float | None = None
        if self.both_labels:
            predicted = scores(self.seed_predicted.compute()[0]).miou
        if not matrices[0][1:].sum():  # label maps alone were counted, or no class is anywhere
            return
        curve = [scores(matrix) for matrix in matrices]
        declared = thresholds.index(self.protocol.cam_threshold)
        values = [score.miou for score in curve]
        # the lowest of equally good thresholds; NaN only where the split has no labelled pixel
        oracle = values.index(max(values))
        pixel_ap = self.seed_pixels.compute().reshape(-1)  # torchmetrics squeezes that of one class
        result |= {
            "seed_miou": curve[declared].miou,
            "seed_threshold": thresholds[declared],
            "seed_precision": _mean(curve[declared].precision),
            "seed_recall": _mean(curve[declared].recall),
            "seed_miou_oracle": curve[oracle].miou,
            "seed_threshold_oracle": thresholds[oracle],
            "seed_miou_predicted_labels": predicted,
            "seed_pixel_map": _mean(pixel_ap),
            "seed_curve": {
                "thresholds": list(thresholds),
                "miou": values,
                "precision": [_mean(score.precision) for score in curve],
                "recall": [_mean(score.recall) for score in curve],
            },
        }
        result["per_class"]["seed_iou_oracle"] = curve[oracle].iou.tolist()
        result["per_class"]["seed_pixel_ap"] = [math.nan, *pixel_ap.tolist()]

    def _further_map(self, name: str, result: dict[str, Any]) -> None:
        """Compute the seed mIoU of a further map at the declared and at the oracle threshold."""
        matrices = self.further_counts(name).compute().cpu()
        if not matrices[0][1:].sum():
            return
        thresholds = self.protocol.curve_thresholds
        values = [scores(matrix).miou for matrix in matrices]
        oracle = values.index(max(values))
        result |= {
            f"{name}_miou": values[thresholds.index(self.protocol.cam_threshold)],
            f"{name}_miou_oracle": values[oracle],
            f"{name}_threshold_oracle": thresholds[oracle],
        }

    def _label_maps(self, name: str, result: dict[str, Any]) -> None:
        """Compute the numbers of one kind of label map; None where there is none to compute.

        Where no pixel is of a class, a map of nothing but background would be perfect.
        """
        totals = self.counts(name).compute()
        abstains = name == "pseudo_label"
        result[LABEL_MAPS[name]] = None
        if abstains:
            result |= {"pseudo_label_miou_excluded": None, "pseudo_label_coverage": None}
        if not (totals.counts.matrix[1:].any() or totals.counts.abstained[1:].any()):
            return
        values, columns = label_map_scores(totals)
        result["maps"][name] = values
        result[LABEL_MAPS[name]] = values["miou"]
        result["per_class"] |= {f"{name}_{key}": column for key, column in columns.items()}
        result["confusion"][name] = totals.counts.matrix.tolist()
        result["cells"][name] = totals.cells.numpy()
        if abstains:
            excluded = score_pseudo_labels(totals.counts, "excluded")
            result["pseudo_label_miou_excluded"] = excluded.miou
            result["pseudo_label_coverage"] = coverage(totals.counts)
            result["per_class"]["pseudo_label_iou_excluded"] = excluded.iou.tolist()
            result["confusion"]["pseudo_label_abstained"] = totals.counts.abstained.tolist()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _mean(values: Tensor) -> float:
    return values.nanmean().item()
