"""Turns a module into numbers: as a callback while it trains, and in full for `wsss eval`.

An evaluator sees only ``forward`` and ``cams``. Every number comes from counts that are summed
over batches and ranks, so any number of processes gives the same result to the last integer.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric

from wsss.errors import WSSSError
from wsss.evaluation.confusion import (
    IGNORE_INDEX,
    ConfusionMatrix,
    Scores,
    ThresholdConfusion,
    coverage,
    score_pseudo_labels,
    scores,
)
from wsss.evaluation.inference import (
    ModuleLike,
    Prediction,
    evaluating,
    localise,
    predict,
    predicted_labels,
    pseudo_label,
)
from wsss.evaluation.metrics import ImageLevelScores
from wsss.evaluation.protocol import Protocol
from wsss.refine.dense_crf import CRFPool
from wsss.refine.par import PAR

NO_SEGMENTATION = "no segmentation head: segmentation is not scored"
NO_MASKS = "no masks: only image-level scores"
Batch = dict[str, Any]


class CRFQueue:
    """Dense CRFs computed behind the forward pass; nothing is written to disk.

    Results are counted as they arrive, and at most a few images a worker wait, so that memory does
    not grow with the data set.

    Args:
        pool: An entered pool of worker processes.
        per_job: Images that may wait for each worker.
    """

    def __init__(self, pool: CRFPool, *, per_job: int = 2) -> None:
        self.pool = pool
        self.limit = per_job * pool.jobs
        self.waiting: deque[tuple[Future[Any], Tensor, ConfusionMatrix]] = deque()

    def submit(
        self,
        logits: Tensor,
        rgb: Tensor,
        target: Tensor,
        labels: Tensor | None,
        confusion: ConfusionMatrix,
    ) -> None:
        """Queues a batch; counts finished images first where the queue is full.

        Args:
            logits: (B, C, H, W), already merged over scales and flip.
            rgb: (B, H, W, 3) uint8.
            target: (B, H, W) ground truth.
            labels: (B, K) image labels to prune by, or None.
            confusion: Where to count.
        """
        prob = logits.softmax(1).cpu().numpy()
        images = rgb.cpu().numpy()
        for index in range(len(prob)):
            while len(self.waiting) >= self.limit:
                self._count_oldest()
            present = None
            if labels is not None:
                present = (labels[index].nonzero().flatten() + 1).tolist()
            future = self.pool.submit(images[index], prob[index], present)
            self.waiting.append((future, target[index].cpu(), confusion))

    def drain(self) -> None:
        """Counts everything that is still waiting."""
        while self.waiting:
            self._count_oldest()

    def _count_oldest(self) -> None:
        future, target, confusion = self.waiting.popleft()
        confusion.update(torch.from_numpy(future.result().astype(np.int64)), target)


class Tally(nn.Module):
    """All counts of one evaluation under one protocol.

    Args:
        protocol: What is measured.
        class_names: The K foreground classes.
        full: Also score seeds with the module's own labels, beside those with true labels.
    """

    def __init__(
        self, *, protocol: Protocol, class_names: Sequence[str], full: bool = False
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
        self.pseudo = ConfusionMatrix(num_classes=num_classes, allow_ignored_prediction=True)
        self.segmentation = nn.ModuleDict(
            {
                name: ConfusionMatrix(num_classes=num_classes)
                for name in ("seg", "seg_crf", "seg_ms", "seg_ms_crf")
            }
        )
        self.par = PAR() if protocol.refine == "par" else None

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return self.seed.device

    def reset(self) -> None:
        """Forgets all counts."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def update(self, module: ModuleLike, batch: Batch, crf: CRFQueue | None) -> None:
        """Counts one batch.

        Args:
            module: The method, in eval mode, without gradients.
            batch: ``image`` (B, 3, H, W) normalised, ``rgb`` (B, H, W, 3) uint8, ``mask``
                (B, H, W), ``labels`` (B, K).
            crf: Where images go for the dense CRF, or None.

        Raises:
            WSSSError: If the module's classes do not match the data's.
        """
        images = batch["image"].to(self.device)
        target, labels = batch["mask"].to(self.device), batch["labels"].to(self.device)
        size = target.shape[-2:]
        prediction = predict(module, images, size, self.protocol)
        self.image_level.update(prediction.class_logits, labels)
        if bool((target == IGNORE_INDEX).all()):  # images without masks: nothing more to compare
            return
        self._update_segmentation(prediction, batch["rgb"], target, labels, crf)
        guessed = predicted_labels(prediction.class_logits).to(labels)
        allowed = labels if self.protocol.use_image_labels else guessed
        pseudo = self.protocol.cam_high is not None
        # a class's map does not depend on the others', so one call serves every set of labels
        wanted = allowed
        if self.both_labels:
            wanted = torch.maximum(wanted, guessed)
        if pseudo:
            wanted = torch.maximum(wanted, labels)
        cams = localise(module, images, wanted, size, self.protocol)
        self.seed.update(cams * allowed[..., None, None], target)
        if self.both_labels:
            self.seed_predicted.update(cams * guessed[..., None, None], target)
        if pseudo:
            true = cams * labels[..., None, None]
            self.pseudo.update(
                pseudo_label(self.par, batch["rgb"], true, labels, self.protocol), target
            )

    def _update_segmentation(
        self,
        prediction: Prediction,
        rgb: Tensor,
        target: Tensor,
        labels: Tensor,
        crf: CRFQueue | None,
    ) -> None:
        for name, logits in (("seg", prediction.single), ("seg_ms", prediction.merged)):
            if logits is None:
                continue
            if logits.shape[1] != len(self.class_names) + 1:
                raise WSSSError(
                    f"segmentation logits hold {logits.shape[1]} classes, expected "
                    f"{len(self.class_names) + 1} (background and the data's classes)"
                )
            self._confusion(name).update(logits.argmax(1), target)
            if crf is not None:
                prune = labels if self.protocol.crf_prune else None
                crf.submit(logits, rgb, target, prune, self._confusion(f"{name}_crf"))

    def _confusion(self, name: str) -> ConfusionMatrix:
        confusion = self.segmentation[name]
        assert isinstance(confusion, ConfusionMatrix)
        return confusion

    def compute(self) -> dict[str, Any]:
        """All numbers, summed over ranks where several run.

        Returns:
            Flat metrics (fractions, None where a number does not exist), ``seed_curve``,
            ``per_class`` (columns of equal length, background first), ``confusion`` (nested lists,
            rows are ground truth) and ``notes``.
        """
        # A metric without images is expected: no segmentation head, or a rank without a share.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*called before the ``update``.*")
            return self._compute()

    def _compute(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        columns: dict[str, Sequence[Any]] = {"class": ["background", *self.class_names]}
        confusion: dict[str, Any] = {}
        self._seeds(result, columns, confusion)
        self._pseudo_labels(result, columns, confusion)
        self._segmentations(result, columns, confusion)
        image = self.image_level.compute()
        result |= {
            "num_images": image.num_images,
            "image_map": image.mean_average_precision,
            "image_f1": image.f1,
            "image_f1_images": image.f1_images,
        }
        columns["image_ap"] = [math.nan, *image.average_precision]
        # NaN where no pixel of the split has a ground truth
        result = {key: None if _is_nan(value) else value for key, value in result.items()}
        notes = [] if result["seg_miou"] is not None else [NO_SEGMENTATION]
        if result["seed_miou"] is None:
            notes = [NO_MASKS]
        return result | {"per_class": columns, "confusion": confusion, "notes": notes}

    def _seeds(self, result: dict[str, Any], columns: dict[str, Any], confusion: Any) -> None:
        thresholds = self.protocol.curve_thresholds
        matrices = self.seed.compute().cpu()
        curve = [scores(matrix) for matrix in matrices]
        declared = thresholds.index(self.protocol.cam_threshold)
        values = [score.miou for score in curve]
        # the lowest of equally good thresholds; NaN only where the split has no labelled pixel
        oracle = values.index(max(values))
        predicted: float | None = None
        if self.both_labels:
            predicted = scores(self.seed_predicted.compute()[0]).miou
        result |= {
            "seed_miou": curve[declared].miou,
            "seed_threshold": thresholds[declared],
            "seed_precision": _mean(curve[declared].precision),
            "seed_recall": _mean(curve[declared].recall),
            "seed_miou_oracle": curve[oracle].miou,
            "seed_threshold_oracle": thresholds[oracle],
            "seed_miou_predicted_labels": predicted,
            "seed_curve": {"thresholds": list(thresholds), "miou": values},
        }
        columns["seed_iou"] = curve[declared].iou.tolist()
        columns["seed_precision"] = curve[declared].precision.tolist()
        columns["seed_recall"] = curve[declared].recall.tolist()
        columns["seed_over"] = curve[declared].over.tolist()
        columns["seed_iou_oracle"] = curve[oracle].iou.tolist()
        confusion["seed"] = matrices[declared].tolist()

    def _pseudo_labels(
        self, result: dict[str, Any], columns: dict[str, Any], confusion: Any
    ) -> None:
        keys = ("ignored_as_background", "excluded")
        if self.protocol.cam_high is None:
            result |= dict.fromkeys([f"pseudo_label_miou_{key}" for key in keys])
            result["pseudo_label_coverage"] = None
            return
        counts = self.pseudo.compute()
        for key in keys:
            score = score_pseudo_labels(counts, key)  # type: ignore[arg-type]
            result[f"pseudo_label_miou_{key}"] = score.miou
            columns[f"pseudo_label_iou_{key}"] = score.iou.tolist()
        result["pseudo_label_coverage"] = coverage(counts)
        confusion["pseudo_label"] = counts.matrix.tolist()
        confusion["pseudo_label_abstained"] = counts.abstained.tolist()

    def _segmentations(
        self, result: dict[str, Any], columns: dict[str, Any], confusion: Any
    ) -> None:
        for name in self.segmentation:
            matrix = self._confusion(name).compute().matrix
            prefix, _, suffix = name.partition("_")
            key = f"{prefix}_miou_{suffix}" if suffix else f"{prefix}_miou"
            if matrix.sum() == 0:
                result[key] = None
                continue
            score: Scores = scores(matrix)
            result[key] = score.miou
            columns[f"{name}_iou"] = score.iou.tolist()
            confusion[name] = matrix.tolist()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def evaluate(
    module: nn.Module,
    dataloader: Iterable[Batch],
    protocol: Protocol,
    class_names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    crf_jobs: int | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """Evaluates a module in full: one pass over the images gives every number of the protocol.

    Where ``torch.distributed`` is initialised, each rank passes its own share of the images and
    all get the numbers of the whole.

    Args:
        module: A method: ``forward(images) -> Outputs`` and ``cams(images, labels)``. Its training
            mode is restored afterwards.
        dataloader: Batches of evaluation images, each once.
        protocol: What is measured.
        class_names: The K foreground classes.
        device: Where to run; by default where the module's parameters are.
        crf_jobs: Processes of the dense CRF; by default one a core.
        description: Title of a progress bar, or None for no bar.

    Returns:
        The metrics of :meth:`Tally.compute`, with ``seconds``.

    Raises:
        WSSSError: If there is no image, or the module and the data disagree.
    """
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    started = time.perf_counter()
    module.to(device)
    tally = Tally(protocol=protocol, class_names=class_names, full=True).to(device)
    preset = protocol.crf_preset
    pool = nullcontext(None) if preset is None else CRFPool(preset, jobs=crf_jobs)
    batches = dataloader if description is None else track(dataloader, description=description)
    with evaluating(module), pool as entered:
        queue = None if entered is None else CRFQueue(entered)
        for batch in batches:
            tally.update(module, batch, queue)  # type: ignore[arg-type]
        if queue is not None:
            queue.drain()
    result = tally.compute()
    if result["num_images"] == 0:
        raise WSSSError("evaluation got no image; check the split's list")
    return result | {"seconds": time.perf_counter() - started}


class Evaluator(Callback):
    """Scores the module at every validation: CAM seeds, image level, plain segmentation.

    It uses :meth:`Protocol.during_training`, so its numbers are for watching a run; results come
    from :func:`evaluate`. Sanity-check batches never count. One validation data loader.

    Args:
        protocol: The run's protocol.
        class_names: The K foreground classes.

    Attributes:
        last: All metrics of the latest validation.
        history: (optimiser step, metrics) of every validation.
    """

    #: key in the metrics, heading of the table; logged as ``val/<key>``.
    LOGGED = (
        ("seg_miou", "seg mIoU"),
        ("seed_miou", "seed mIoU"),
        ("seed_miou_oracle", "seed oracle"),
        ("image_map", "image mAP"),
        ("image_f1", "image F1"),
    )

    def __init__(self, *, protocol: Protocol, class_names: Sequence[str]) -> None:
        super().__init__()
        self.tally = Tally(protocol=protocol.during_training(), class_names=class_names)
        self.last: dict[str, Any] = {}
        self.history: list[tuple[int, dict[str, Any]]] = []

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Starts from zero, also after sanity checking."""
        self.tally.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts one batch."""
        if not trainer.sanity_checking:
            self.tally.update(pl_module, batch, None)  # type: ignore[arg-type]

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Sums over ranks and logs ``val/...``."""
        if trainer.sanity_checking:
            return
        self.last = self.tally.compute()
        self.history.append((trainer.global_step, self.last))
        for key, _ in self.LOGGED:
            if self.last[key] is not None:
                # the value is the same on every rank already; sync_dist only quiets Lightning
                pl_module.log(f"val/{key}", self.last[key], sync_dist=trainer.world_size > 1)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Prints how the run went, one validation a row."""
        if trainer.is_global_zero and self.history:
            Console().print(self.table())

    def table(self) -> Table:
        """The validations so far, in percent."""
        table = Table(title="validation during training (%)", title_justify="left")
        table.add_column("step", justify="right")
        for _, heading in self.LOGGED:
            table.add_column(heading, justify="right")
        for step, metrics in self.history:
            values = [metrics[key] for key, _ in self.LOGGED]
            table.add_row(str(step), *("-" if v is None else f"{100 * v:.1f}" for v in values))
        return table
