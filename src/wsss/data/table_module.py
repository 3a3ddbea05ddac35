"""The data module of a CSV: own images, COCO, exports of annotation tools."""

import difflib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.ranges import Part
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import ImageDataset, Sample, TrainTransform, check_files, multi_hot
from wsss.data.lists import own_list
from wsss.data.table import FOLDER, Table, holdout, read_table

#: split of every row that has a mask, in a table without the column ``split``
MASKED = "masked"


@dataclass(kw_only=True, eq=False, repr=False)
class TableDataModule(ImageDataModule):
    """Images listed in a CSV (`wsss.data.table`): custom data, COCO, exports of annotation tools.

    `ImageDataModule` has the batches and the other fields. A split is a value of the table's
    column ``split``. Without that column there are the training split, the validation split (a
    holdout), and ``masked``, every row that has a mask.
    """

    csv: Path  # the table, relative to the root or absolute
    # None: from the table (a run then stores them in its configuration); never None afterwards
    class_names: tuple[str, ...] | None = None  # type: ignore[assignment]
    train_split: str = "train"
    val_split: str = "val"
    holdout: Part = 0.2  # share of the images to validate on where there is no column ``split``
    label_source: str = "csv"  # what the labels were made from, for the record

    def __post_init__(self) -> None:
        self.root = Path(os.path.normpath(Path(self.root).expanduser()))
        self.csv = self.root / self.csv
        self._table: Table | None = None
        if self.class_names is None:
            self._table = read_table(self.csv, self.root)
            self.class_names = self._table.class_names
        super().__post_init__()

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

    @property
    def has_splits(self) -> bool:
        """Whether the table has the column ``split``."""
        return any(row.split is not None for row in self.table.rows)

    @property
    def scored_split(self) -> str:
        """The validation split; every row with a mask where the table has no column ``split``."""
        return self.val_split if self.has_splits else MASKED

    def _listed(self, split: str) -> list[Sample]:
        """Give the rows of a split, or the holdout and the rest where there is no column."""
        rows = self.table.rows
        if self.has_splits:
            chosen = [row.sample for row in rows if row.split == split]
            have = ", ".join(sorted({str(row.split) for row in rows}))
        elif split == MASKED:
            chosen = [row.sample for row in rows if row.sample.mask]
            if not chosen:
                raise WSSSError(
                    f"{self.csv} names no mask, so there is nothing to score against; add the "
                    "column mask"
                )
        else:
            train = own_list(self.train_split)
            have = f"{train}, {self.val_split} (a holdout)"
            held = holdout(rows, self.holdout)
            chosen = [
                row.sample
                for row in rows
                if split == (self.val_split if row.sample.name in held else train)
            ]
        if not chosen:
            raise WSSSError(
                f"{self.csv} has no row of split {split!r} (it has {have}); name another split or "
                "correct the column"
            )
        return chosen[: self.limit]

    def left_out(self) -> str:
        """Count the rows of splits that are not in use."""
        splits = (self.train_split, self.val_split, *self.test_splits)
        used = list(dict.fromkeys(map(own_list, splits)))
        others = Counter(row.split for row in self.table.rows if row.split not in (None, *used))
        if not others:
            return ""
        shown = ", ".join(f"{split!r} ({count})" for split, count in others.most_common(10))
        near = [near for split in others for near in difflib.get_close_matches(str(split), used)]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return (
            f"{others.total()} of {len(self.table.rows)} rows of {self.csv} are not read, since "
            f"their split is not in use ({', '.join(used)}): {shown}{hint}"
        )

    def label_reader(self) -> Callable[[Sample], NDArray[np.float32]]:
        """Give the labels as the table has them."""
        labels = {row.sample.name: row.labels for row in self.table.rows}
        return lambda sample: multi_hot(labels[sample.name], self.table.class_names)

    def _listed_dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> ImageDataset:
        samples = self._listed(split)
        check_files("image", [sample.image for sample in samples], self.csv)
        if with_mask:
            check_files("mask", [sample.mask for sample in samples if sample.mask], self.csv)
        labels_of = self.label_reader()
        return ImageDataset(
            samples=samples,
            labels=np.stack([labels_of(sample) for sample in samples]),
            class_names=self.table.class_names,
            transform=transform,
            with_mask=with_mask,
            seed=self.seed,
        )
