"""The data module of a CSV: own images, COCO, exports of annotation tools."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import ImageDataset, Sample, TrainTransform, check_files, multi_hot
from wsss.data.table import FOLDER, Table, holdout, read_table


class TableDataModule(ImageDataModule):
    """Images listed in a CSV (`wsss.data.table`): one's own, COCO, exports of annotation tools.

    Args:
        name: of the data set.
        root: folder to which the table's paths are relative.
        csv: the table, relative to the root or absolute.
        class_names: the K foreground classes; null takes them from the table (a run then stores
            them in its configuration).
        train_split: value of the column ``split``, as the other two.
        val_split: list for validation.
        test_splits: further lists to evaluate.
        train_transform: makes a training sample.
        global_batch_size: images per optimiser step.
        num_workers: worker processes.
        seed: of order and augmentation.
        holdout: share of the images to validate on where the table has no column ``split``.
        label_source: what the labels were made from, for the record.
        eval_batch_size: images of equal size that are evaluated together.
        limit: use only the first so many names of every list.
        saliency_folder: see `ImageDataModule`, as the next two.
        saliency_threshold: what counts as salient.
        train_masks: masks that training sees.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | Path,
        csv: str,
        class_names: Sequence[str] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_splits: Sequence[str] = (),
        train_transform: TrainTransform,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        holdout: float = 0.2,
        label_source: str = "csv",
        eval_batch_size: int = 1,
        limit: int | None = None,
        saliency_folder: str | None = None,
        saliency_threshold: int = 127,
        train_masks: str | None = None,
    ) -> None:
        folder = Path(os.path.normpath(Path(root).expanduser()))
        self.csv = folder / csv
        self.holdout = holdout
        self._table: Table | None = None
        if class_names is None:
            self._table = read_table(self.csv, folder)
            class_names = self._table.class_names
        super().__init__(
            name=name,
            root=folder,
            class_names=class_names,
            train_split=train_split,
            val_split=val_split,
            test_splits=test_splits,
            train_transform=train_transform,
            global_batch_size=global_batch_size,
            label_source=label_source,
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
            limit=limit,
            saliency_folder=saliency_folder,
            saliency_threshold=saliency_threshold,
            train_masks=train_masks,
        )

    @property
    def table(self) -> Table:
        """The rows, read once.

        Raises:
            WSSSError: no such folder or file, or a bad row.
        """
        if self._table is None:
            if not self.root.is_dir():
                raise WSSSError(f"data folder {self.root} is missing; set data.root to it")
            if not self.csv.is_file() and self.csv.parent.name == FOLDER:
                raise WSSSError(
                    f"{self.csv} is missing; `wsss data prepare coco root={self.root}` makes it "
                    "(voc for an export in VOC style)"
                )
            self._table = read_table(self.csv, self.root, self.class_names)
        return self._table

    def samples(self, split: str) -> list[Sample]:
        """Returns the rows of a split, or the holdout and the rest where there is no column."""
        rows = self.table.rows
        if any(row.split is not None for row in rows):
            chosen = [row.sample for row in rows if row.split == split]
            have = ", ".join(sorted({str(row.split) for row in rows}))
        else:
            have = f"{self.train_split}, {self.val_split} (a holdout)"
            held = holdout(rows, self.holdout)
            chosen = [
                row.sample
                for row in rows
                if split == (self.val_split if row.sample.name in held else self.train_split)
            ]
        if not chosen:
            raise WSSSError(
                f"{self.csv} has no row of split {split!r} (it has {have}); name another split or "
                "correct the column"
            )
        return chosen[: self.limit]

    def label_reader(self) -> Callable[[Sample], NDArray[np.float32]]:
        """Returns the labels as the table has them."""
        labels = {row.sample.name: row.labels for row in self.table.rows}
        return lambda sample: multi_hot(labels[sample.name], self.class_names)

    def _dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> ImageDataset:
        samples = self.samples(split)
        check_files("image", [sample.image for sample in samples], self.csv)
        if with_mask:
            check_files("mask", [sample.mask for sample in samples if sample.mask], self.csv)
        labels_of = self.label_reader()
        return ImageDataset(
            samples=samples,
            labels=np.stack([labels_of(sample) for sample in samples]),
            class_names=self.class_names,
            transform=transform,
            with_mask=with_mask,
            seed=self.seed,
        )
