"""What every data module shares: splits, batches, their order, resuming, a fingerprint."""

import inspect
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.ranges import Count, FolderName, GreyLevel, Seed, Side, Together, Workers
from wsss.core.ranks import is_first_process
from wsss.core.schema import check_fields
from wsss.core.supervision import IMAGE_LABELS
from wsss.data.dataset import (
    Guide,
    ImageDataset,
    Sample,
    TrainTransform,
    check_class_names,
    hash_names,
    saliency_guide,
)
from wsss.data.images import read_mask
from wsss.data.lists import cut_of, is_few_shot
from wsss.data.loader import OneLineErrorLoader, make_loader
from wsss.data.samplers import SizeBuckets, TrainSampler, UnpaddedDistributedSampler
from wsss.data.train_masks import GROUND_TRUTH, check_train_masks, supervision_of

TRAINING_LIST = "training list (sha256)"  # in a checkpoint


def takes_saliency(transform: TrainTransform) -> bool:
    """Say whether a training transform has a place for a saliency map."""
    return "saliency" in inspect.signature(transform).parameters


@dataclass(kw_only=True, eq=False, repr=False)
class ImageDataModule(L.LightningDataModule, ABC):
    """Splits of one data set: one to train on, others to evaluate. A layout is a subclass.

    A subclass is a dataclass too: it adds fields of its own, and gives defaults to those below.
    Fields are keyword arguments and the keys of ``data:`` in a configuration. A split may be cut
    from another one (`wsss.data.lists`): ``train:holdout:3`` is a declared holdout as a list.

    Training batches hold the tensors of `train_transform` plus ``labels`` (B, K) float32, ``name``
    (list of B) and ``index`` (B,) int64. Evaluation batches are images at native size: ``image``
    (B, 3, H, W) normalised, ``rgb`` (B, H, W, 3) uint8, ``mask`` (B, H, W) int64 (255 all over
    where there is no mask), ``labels`` (B, K), ``name`` (list of B), ``index`` (B,).

    A sample depends only on (seed, epoch, index) and the order only on (seed, epoch): neither on
    the number of workers nor on that of the processes. The position is part of a checkpoint, so a
    run that resumes in the middle of an epoch goes on with the images it had not seen yet.

    Raises:
        WSSSError: a value is not of its field's type and range, or two contradict each other; it
            names the key as YAML does, ``data.limit``.
    """

    name: FolderName = field()  # of the data set; field(): Lightning's class has a name too
    root: Path  # folder of the data; a string is taken too
    class_names: tuple[str, ...]  # the K foreground classes
    # training never opens the masks of this list, unless image labels are taken from them
    train_split: str
    val_split: str  # list for validation during and after training
    test_splits: tuple[str, ...] = ()  # further lists to evaluate
    # makes a training sample from a uint8 image; None: for evaluation alone
    train_transform: TrainTransform | None
    global_batch_size: Count  # images per optimiser step, all processes and accumulated batches
    label_source: str  # where image-level labels come from; part of every result
    num_workers: Workers = 0  # worker processes per loader and process
    seed: Seed = 0  # of order and augmentation
    eval_batch_size: Together = 1  # images of equal size that are evaluated together; 1: singly
    limit: Count | None = None  # use only the first so many names of every list
    # side to which the longer side of training pictures is resized before their views; None:
    # their own size. Evaluation has its own, ``eval.resize_long``
    long_side: Side | None = None
    # grey PNGs of the training split for methods that use saliency, relative to the root or
    # absolute; None: image-level labels are all there is
    saliency_folder: str | None = None
    saliency_threshold: GreyLevel = 127  # grey level above which a pixel is salient
    # masks that training sees, for a second stage: a folder of pseudo labels, or
    # ``ground_truth``; None: image-level labels are all there is
    train_masks: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self, "data")
        check_class_names(self.class_names)
        transform = self.train_transform
        if self.saliency_folder and transform and not takes_saliency(transform):
            raise WSSSError(
                f"data.saliency_folder={self.saliency_folder}: "
                f"{type(transform).__name__} takes no saliency maps; use a method that "
                "does (getam), or leave it null"
            )
        self._eval_datasets: dict[str, ImageDataset] = {}
        self._train_dataset: ImageDataset | None = None
        self._sizes: dict[str, list[tuple[int, int]]] = {}
        self._kept: dict[str, NDArray[np.int64]] = {}  # indices of splits cut from others
        self._resume: dict[str, Any] = {}

    @abstractmethod
    def _listed(self, split: str) -> list[Sample]:
        """Give the files of a list of its own, limited; only the list is read."""

    def samples(self, split: str) -> list[Sample]:
        """Give the files of a split, limited; of one that is cut from another, labels are read."""
        cut = cut_of(split)
        if cut is None:
            return self._listed(split)
        samples = self.samples(cut.source)
        if split not in self._kept:
            read = self.label_reader()
            labels = np.stack([read(sample) for sample in samples])
            self._kept[split] = cut.indices([sample.name for sample in samples], labels)
        return [samples[index] for index in self._kept[split]]

    @abstractmethod
    def label_reader(self) -> Callable[[Sample], NDArray[np.float32]]:
        """Give the function that reads the labels (K,) of a sample or raises WSSSError."""

    @abstractmethod
    def _listed_dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> ImageDataset:
        """Give a list of its own whose files have been looked for and whose labels are read."""

    def _dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> ImageDataset:
        """Give a split whose files have been looked for and whose labels are read."""
        cut = cut_of(split)
        if cut is None:
            return self._listed_dataset(split, transform=transform, with_mask=with_mask)
        dataset = self._dataset(cut.source, transform=transform, with_mask=with_mask)
        return dataset.reduced_to(cut.indices(dataset.names, dataset.labels))

    def left_out(self) -> str:
        """Say which images no split in use has, if that may be a mistake; else an empty text."""
        return ""

    @property
    def scored_split(self) -> str:
        """The list that maps made elsewhere are scored on, for which nothing need be held out."""
        return self.val_split

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.class_names)

    @property
    def supervision(self) -> str:
        """Kind of the training signal; runs are compared under equal supervision only."""
        if self.train_masks is None and self.saliency_folder:
            return f"{IMAGE_LABELS} and saliency maps (above {self.saliency_threshold})"
        kind = supervision_of(self.train_masks)
        if self.train_masks == GROUND_TRUTH and is_few_shot(self.train_split):
            return f"{len(self.samples(self.train_split))} {kind}"
        return kind

    def list_hash(self, split: str) -> str:
        """Give the sha256 of the split's names in use, one a line, in their order."""
        return hash_names([sample.name for sample in self.samples(split)])

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Give, for every split in use, what says that two runs had the same data.

        Number of images and sha256 of list, labels and masks' ids; masks of the training split
        are not opened, so theirs is None.
        """
        splits = dict.fromkeys([self.train_split, self.val_split, *self.test_splits])
        datasets = {
            split: self.eval_dataset(split) for split in splits if split != self.train_split
        }
        training = (
            self.unmasked_dataset(self.train_split)
            if self.train_transform is None
            else self._make_train_dataset()
        )
        datasets = {self.train_split: training, **datasets}
        return {
            split: {
                "images": len(dataset),
                "list_sha256": hash_names(dataset.names),
                "labels_sha256": dataset.label_sha256(),
                "masks_sha256": dataset.mask_sha256(),
            }
            for split, dataset in datasets.items()
        }

    def setup(self, stage: str) -> None:
        """Build the data sets of a stage, so that bad data is named before anything else runs."""
        if stage == "fit":
            self._make_train_dataset()
            self.per_device_batch_size()
        if stage in ("fit", "validate"):
            self.eval_dataset(self.val_split)
        if stage == "test":
            for split in self.test_splits:
                self.eval_dataset(split)

    def check_contents(self) -> None:
        """Look into every file that a run will read, evaluation included, before it starts.

        A truncated image or a mask of the wrong kind is then named at once and not after hours of
        training. Costs a header an image and one decoding a mask: seconds for VOC.

        Raises:
            WSSSError: names the first file that cannot be used, or no mask shows any class.
        """
        if (text := self.left_out()) and is_first_process():
            print(f"warning: {text}", file=sys.stderr)
        self._check_apart()
        self._make_train_dataset().check_contents()
        for split in (self.val_split, *self.test_splits):
            self.eval_dataset(split).check_contents()

    def _check_apart(self) -> None:
        """Raise WSSSError where training would see images of a list whose scores are reported.

        A list whose name begins with ``train`` may be scored all the same: seeds usually are.
        """
        trained = {sample.name for sample in self.samples(self.train_split)}
        for key, splits in (("val_split", [self.val_split]), ("test_splits", self.test_splits)):
            for split in splits:
                if split.startswith("train"):
                    continue
                if shared := [s.name for s in self.samples(split) if s.name in trained]:
                    raise WSSSError(
                        f"data.train_split={self.train_split}: {len(shared)} of its images are "
                        f"also in {split!r} ({shared[0]!r}), which data.{key} has scored; train "
                        "on a list of other images"
                    )

    def _make_train_dataset(self) -> ImageDataset:
        if self._train_dataset is None:
            if self.train_transform is None:
                raise WSSSError(
                    "data.train_transform is null: this data module was made to evaluate; make one "
                    "with training views to train"
                )
            check_train_masks(self.train_masks, self.train_transform)
            dataset = self._dataset(
                self.train_split, transform=self.train_transform, with_mask=False
            )
            dataset.long_side = self.long_side
            guide = self._guide(self.samples(self.train_split))
            if guide is not None:
                dataset.guided_by(guide)
            if len(dataset) < self.global_batch_size:
                raise WSSSError(
                    f"split {self.train_split!r} of {self.root} has {len(dataset)} images, fewer "
                    f"than global_batch_size={self.global_batch_size}; lower it or raise data.limit"
                )
            self._train_dataset = dataset
        return self._train_dataset

    def _guide(self, samples: Sequence[Sample]) -> Guide | None:
        """Give what training sees beside images and their labels, if anything; it is declared."""
        if self.train_masks is None:
            if not self.saliency_folder:
                return None
            folder = self.data_root() / self.saliency_folder
            return saliency_guide(samples, folder, self.saliency_threshold)
        paths = {sample.name: sample.mask for sample in samples if sample.mask}
        if self.train_masks != GROUND_TRUTH:
            folder = Path(self.train_masks)
            paths = {sample.name: folder / f"{sample.name}.png" for sample in samples}
        without = [sample.name for sample in samples if sample.name not in paths]
        if without:
            raise WSSSError(
                f"data.train_masks={GROUND_TRUTH}: {without[0]!r} ({len(without)} of "
                f"{len(samples)} images) has no mask; add it or train on image labels"
            )
        read = partial(read_mask, num_classes=self.num_classes)
        return Guide("mask", paths, read, truth=self.train_masks == GROUND_TRUTH)

    def unmasked_dataset(self, split: str) -> ImageDataset:
        """Give a split at native size whose masks are never opened: for pseudo labels."""
        return self._dataset(split, transform=None, with_mask=False)

    def data_root(self) -> Path:
        """Give the folder to which paths of the data are relative."""
        return self.root

    def eval_dataset(self, split: str) -> ImageDataset:
        """Give the split at native size with its masks (where it has any), checked and kept."""
        if split not in self._eval_datasets:
            self._eval_datasets[split] = self._dataset(split, transform=None, with_mask=True)
        return self._eval_datasets[split]

    def per_device_batch_size(self) -> int:
        """Derive the images per process and forward pass from `global_batch_size`.

        Raises:
            WSSSError: it does not divide by processes times accumulated batches.
        """
        processes, _ = self._processes()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        size, rest = divmod(self.global_batch_size, processes * accumulate)
        if rest or size < 1:
            raise WSSSError(
                f"global_batch_size={self.global_batch_size} does not divide by {processes} "
                f"process(es) x accumulate_grad_batches={accumulate}; expected a multiple of "
                f"{processes * accumulate}"
            )
        return size

    def _processes(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def train_dataloader(self) -> OneLineErrorLoader:
        """Give the shuffled training batches, from where a loaded checkpoint left off."""
        dataset = self._make_train_dataset()
        per_device = self.per_device_batch_size()
        processes, rank = self._processes()
        sampler = TrainSampler(
            length=len(dataset),
            global_batch_size=self.global_batch_size,
            per_device=per_device,
            num_replicas=processes,
            rank=rank,
            seed=self.seed,
            start=self._start(per_device),
            current_epoch=(lambda: self._position()[0]) if self.trainer else None,
        )
        return make_loader(
            dataset,
            batch_size=per_device,
            num_workers=self.num_workers,
            sampler=sampler,
            drop_last=True,
            worker_seed=(self.seed, rank),
        )

    def eval_dataloader(self, split: str) -> OneLineErrorLoader:
        """Give this process's share of a split at native size, singly or in batches by size."""
        dataset = self.eval_dataset(split)
        processes, rank = self._processes()
        sampler = UnpaddedDistributedSampler(length=len(dataset), num_replicas=processes, rank=rank)
        buckets = None
        if self.eval_batch_size > 1:
            if split not in self._sizes:  # a header an image
                self._sizes[split] = dataset.sizes()
            buckets = SizeBuckets(
                sampler, sizes=self._sizes[split], batch_size=self.eval_batch_size
            )
        return make_loader(
            dataset,
            batch_size=1,
            num_workers=self.num_workers,
            sampler=sampler,
            batch_sampler=buckets,
            worker_seed=(self.seed, rank),
        )

    def val_dataloader(self) -> OneLineErrorLoader:
        """Give the validation split."""
        return self.eval_dataloader(self.val_split)

    def test_dataloader(self) -> list[OneLineErrorLoader]:
        """Give the test splits, in their order."""
        return [self.eval_dataloader(split) for split in self.test_splits]

    def predict_dataloader(self) -> OneLineErrorLoader:
        """Give the validation split's images one by one; its masks are not opened."""
        dataset = self.unmasked_dataset(self.val_split)
        processes, rank = self._processes()
        return make_loader(
            dataset,
            batch_size=1,
            num_workers=self.num_workers,
            sampler=UnpaddedDistributedSampler(
                length=len(dataset), num_replicas=processes, rank=rank
            ),
            worker_seed=(self.seed, rank),
        )

    def _order_identity(self) -> dict[str, Any]:
        """Give what must be unchanged for a position in the epoch to mean the same images."""
        return {
            TRAINING_LIST: hash_names(self._make_train_dataset().names),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
        }

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the training order for a checkpoint (plain values only)."""
        if self.trainer is None or self._train_dataset is None:
            return {}
        epoch, batches = self._position()
        return {"epoch": epoch, "batches": batches, "order": self._order_identity()}

    def _position(self) -> tuple[int, int]:
        """Give the epoch and how many batches of it are done.

        Not from Lightning's count of epochs, which lags after resuming at the end of one.
        """
        assert self.trainer is not None
        seen = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return divmod(seen, int(self.trainer.num_training_batches))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a position; it is checked and used when training takes its loader."""
        self._resume = state_dict

    def _start(self, per_device: int) -> tuple[int, int]:
        if not self._resume:
            return 0, 0
        now = self._order_identity()
        for key, then in self._resume["order"].items():
            if now.get(key) != then:
                raise WSSSError(
                    f"cannot resume: {key} was {then} in the checkpoint and is {now.get(key)}; "
                    "expected the same data and batches, restore it or start a new run"
                )
        # Lightning looks for the position in the loader and would warn that there is none
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended")
        return self._resume["epoch"], self._resume["batches"] * per_device
