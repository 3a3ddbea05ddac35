"""The data module of the VOC layout."""

from dataclasses import dataclass
from pathlib import Path

from wsss.data.builtin import minivoc_root
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import Sample, TrainTransform
from wsss.data.voc import LabelSource, VOCDataset, VOCLabels, find_voc_root, voc_samples


@dataclass(kw_only=True, eq=False, repr=False)
class VOCDataModule(ImageDataModule):
    """A data set in the VOC layout; `ImageDataModule` has the batches and the other fields.

    ``root`` is what `wsss.data.voc.find_voc_root` takes, or ``builtin`` for MiniVOC inside the
    package; a split is what `wsss.data.voc.read_split` takes.
    """

    mask_folder: str = "SegmentationClass"  # of the masks, inside data.root
    train_mask_folder: str | None = None  # that of the training split, if it is another one
    label_source: LabelSource = "xml"  # see `VOCDataset`

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.root) == "builtin":
            self.root = minivoc_root()

    def data_root(self) -> Path:
        """Give the folder that holds ``JPEGImages``."""
        return find_voc_root(self.root)

    def _mask_folder(self, split: str) -> str:
        if split == self.train_split and self.train_mask_folder:
            return self.train_mask_folder
        return self.mask_folder

    def _listed(self, split: str) -> list[Sample]:
        """Give the files that a list names."""
        return voc_samples(self.data_root(), split, self._mask_folder(split))[: self.limit]

    def label_reader(self) -> VOCLabels:
        """Give labels from the prepared table, else from annotations or masks."""
        return VOCLabels(self.data_root(), self.class_names, self.label_source)

    def _listed_dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> VOCDataset:
        return VOCDataset(
            root=self.root,
            split=split,
            class_names=self.class_names,
            transform=transform,
            with_mask=with_mask,
            mask_folder=self._mask_folder(split),
            label_source=self.label_source,
            limit=self.limit,
            seed=self.seed,
        )
