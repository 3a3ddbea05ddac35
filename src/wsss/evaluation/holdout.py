"""A declared holdout of the training data, on which thresholds and CRFs may be chosen.

Thresholds searched on the reported split are oracles. The honest way, taken over from weakly
supervised localisation, is a small number of images a class whose masks are declared to be used:
a budget that everybody can have (field.md D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import hash_names
from wsss.data.lists import choose_names
from wsss.evaluation.confusion import ThresholdConfusion, scores
from wsss.evaluation.inference import localise, predict, predicted_labels
from wsss.evaluation.protocol import Protocol


class Holdout(Dataset[dict[str, Any]]):
    """The holdout of a data module as an evaluation data set.

    Args:
        data: the data module.
        protocol: its ``holdout_per_class`` and ``holdout_split``.

    Raises:
        WSSSError: the list or the masks of its images are missing.
    """

    def __init__(self, data: ImageDataModule, protocol: Protocol) -> None:
        self.source = protocol.holdout_split or data.train_split
        dataset = data.eval_dataset(self.source)
        indices = choose_names(dataset.names, dataset.labels, protocol.holdout_per_class)
        self.names = [dataset.names[i] for i in indices]
        self.labels = dataset.labels[indices]
        self._subset = Subset(dataset, indices.tolist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._subset[index], "index": index}

    @property
    def list_hash(self) -> str:
        """SHA-256 of the names, one a line, as of a split's list."""
        return hash_names(self.names)

    def loader(self) -> DataLoader[dict[str, Any]]:
        """Give this process's share, one image a batch."""
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        share = range(rank, len(self), processes)
        return DataLoader(Subset(self, list(share)), batch_size=1)


def choose_threshold(
    module: nn.Module, holdout: Holdout, protocol: Protocol, *, device: torch.device
) -> dict[str, Any]:
    """Choose the CAM threshold of the best seed mIoU on the holdout.

    Args:
        module: the method.
        holdout: images and masks to choose on.
        protocol: candidate thresholds and the size at which CAMs are computed.
        device: where to run.

    Returns:
        ``threshold`` (the lowest of equally good ones), its ``miou`` and the whole curve, with
        what identifies the holdout.
    """
    thresholds = protocol.curve_thresholds
    counts = ThresholdConfusion(num_classes=holdout.labels.shape[1] + 1, thresholds=thresholds)
    counts.to(device)
    module.to(device)
    with evaluating(module):
        for batch in holdout.loader():
            images, target = batch["image"].to(device), batch["mask"].to(device)
            labels, size = batch["labels"].to(device), target.shape[-2:]
            if not protocol.use_image_labels:
                plain = predict(module, images, size, protocol.during_training())  # type: ignore[arg-type]
                labels = predicted_labels(plain.class_logits).to(labels)
            counts.update(localise(module, images, labels, size, protocol), target)  # type: ignore[arg-type]
    values = [scores(matrix).miou for matrix in counts.compute()]
    if math.isnan(values[0]):
        raise WSSSError(
            f"holdout of {holdout.source}: its masks show no class, so no threshold can be chosen "
            "on it; look at them with `wsss data check`, or give eval.holdout_per_class=0"
        )
    best = values.index(max(values))
    return {
        "threshold": thresholds[best],
        "miou": values[best],
        "thresholds": list(thresholds),
        "curve": values,
        "source": holdout.source,
        "per_class": protocol.holdout_per_class,
        "num_images": len(holdout),
        "list_sha256": holdout.list_hash,
    }
