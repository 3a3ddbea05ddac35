"""The data module of the VOC layout."""

from collections.abc import Sequence
from pathlib import Path

from wsss.data.builtin import minivoc_root
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import Sample, TrainTransform
from wsss.data.voc import LabelSource, VOCDataset, VOCLabels, find_voc_root, voc_samples


class VOCDataModule(ImageDataModule):
    """A data set in the VOC layout (see `ImageDataModule` for batches and other arguments).

    Args:
        name: of the data set.
        root: see `wsss.data.voc.find_voc_root`; ``builtin`` is MiniVOC inside the package.
        class_names: the K foreground classes.
        train_split: see `wsss.data.voc.read_split`, as the other two.
        val_split: list for validation.
        test_splits: further lists to evaluate.
        train_transform: makes a training sample.
        global_batch_size: images per optimiser step.
        num_workers: worker processes.
        seed: of order and augmentation.
        mask_folder: folder of the masks.
        train_mask_folder: that of the training split, if it is another one.
        label_source: of image-level labels, see `VOCDataset`.
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
        class_names: Sequence[str],
        train_split: str,
        val_split: str,
        test_splits: Sequence[str] = (),
        train_transform: TrainTransform,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        mask_folder: str = "SegmentationClass",
        train_mask_folder: str | None = None,
        label_source: LabelSource = "xml",
        eval_batch_size: int = 1,
        limit: int | None = None,
        saliency_folder: str | None = None,
        saliency_threshold: int = 127,
        train_masks: str | None = None,
    ) -> None:
        super().__init__(
            name=name,
            root=minivoc_root() if str(root) == "builtin" else Path(root),
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
        self.mask_folder = mask_folder
        self.train_mask_folder = train_mask_folder or mask_folder

    def data_root(self) -> Path:
        """Returns the folder that holds ``JPEGImages``."""
        return find_voc_root(self.root)

    def _mask_folder(self, split: str) -> str:
        return self.train_mask_folder if split == self.train_split else self.mask_folder

    def samples(self, split: str) -> list[Sample]:
        """Returns the files that a list names."""
        return voc_samples(self.data_root(), split, self._mask_folder(split))[: self.limit]

    def label_reader(self) -> VOCLabels:
        """Returns labels from the prepared table, else from annotations or masks."""
        return VOCLabels(self.data_root(), self.class_names, self.label_source)  # type: ignore[arg-type]

    def _dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> VOCDataset:
        return VOCDataset(
            root=self.root,
            split=split,
            class_names=self.class_names,
            transform=transform,
            with_mask=with_mask,
            mask_folder=self._mask_folder(split),
            label_source=self.label_source,  # type: ignore[arg-type]
            limit=self.limit,
            seed=self.seed,
        )
