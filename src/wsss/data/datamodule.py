"""The Lightning data module that every method trains and is evaluated with."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wsss.data.builtin import minivoc_root
from wsss.data.samplers import TrainSampler, UnpaddedDistributedSampler
from wsss.data.train_masks import GROUND_TRUTH, check_train_masks, supervision_of
from wsss.data.voc import (
    TrainTransform,
    VOCDataset,
    check_class_names,
    find_voc_root,
    read_split,
)
from wsss.errors import WSSSError


class OneLineErrorLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that passes on a worker's `WSSSError` as it was raised.

    torch re-creates an exception of a worker with the worker's whole traceback as its message;
    its last line is the one that the user is meant to see.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except WSSSError as error:
            message = str(error).rstrip().rsplit("\n", 1)[-1]
            raise WSSSError(message.removeprefix("wsss.errors.WSSSError: ")) from error


def make_loader(
    dataset: Dataset[dict[str, Any]],
    *,
    batch_size: int,
    num_workers: int,
    sampler: Sampler[Any] | None = None,
    drop_last: bool = False,
) -> OneLineErrorLoader:
    """Builds a loader whose workers live through all epochs and whose errors are one line."""
    return OneLineErrorLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _hash_names(names: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


class WSSSDataModule(L.LightningDataModule):
    """A VOC-layout data set: one split to train on, others to evaluate.

    Training batches hold the tensors of `train_transform` plus ``labels`` (B, K) float32, ``name``
    (list of B) and ``index`` (B,) int64. Evaluation batches are single images at native size:
    ``image`` (1, 3, H, W) normalised, ``rgb`` (1, H, W, 3) uint8, ``mask`` (1, H, W) int64,
    ``labels`` (1, K), ``name`` [str], ``index`` (1,).

    A sample depends only on (seed, epoch, index) and the order only on (seed, epoch): neither on
    the number of workers nor on that of the processes. The position is part of a checkpoint, so a
    run that resumes in the middle of an epoch goes on with the images it had not seen yet.

    Args:
        name: of the data set, for reports.
        root: see `wsss.data.voc.find_voc_root`; ``builtin`` is MiniVOC inside the package.
        class_names: the K foreground classes.
        train_split: list to train on; its masks are never opened by training (unless the image
            labels are taken from them).
        val_split: list for validation during and after training.
        test_splits: further lists to evaluate.
        train_transform: makes a training sample from a uint8 image.
        global_batch_size: images per optimiser step, over all processes and accumulated batches.
        num_workers: worker processes per loader and process.
        seed: of order and augmentation.
        mask_folder: folder of the masks.
        train_mask_folder: that of the training split, if it is another one.
        label_source: of image-level labels, see `VOCDataset`.
        limit: use only the first so many names of every list.
        train_masks: masks that training sees, for a second stage: a folder of pseudo labels, or
            ``ground_truth``; None: image-level labels are all there is.
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
        label_source: Literal["xml", "mask"] = "xml",
        limit: int | None = None,
        train_masks: str | None = None,
    ) -> None:
        super().__init__()
        if limit is not None and limit < 1:
            raise WSSSError(f"data.limit is {limit}; expected at least 1, or null for all images")
        self.name = name
        self.root = minivoc_root() if str(root) == "builtin" else Path(root)
        self.class_names = check_class_names(class_names)
        self.train_split = train_split
        self.val_split = val_split
        self.test_splits = tuple(test_splits)
        self.train_transform = train_transform
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.mask_folder = mask_folder
        self.train_mask_folder = train_mask_folder or mask_folder
        self.label_source = label_source
        self.limit = limit
        self.train_masks = train_masks
        self._eval_datasets: dict[str, VOCDataset] = {}
        self._train_dataset: VOCDataset | None = None
        self._resume: dict[str, Any] = {}

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.class_names)

    @property
    def supervision(self) -> str:
        """League of the training signal; runs of different leagues are not to be compared."""
        return supervision_of(self.train_masks)

    def list_hash(self, split: str) -> str:
        """Returns the sha256 of the split's names in use, one a line, in their order."""
        return _hash_names(read_split(find_voc_root(self.root), split)[: self.limit])

    def setup(self, stage: str) -> None:
        """Builds the data sets of a stage, so that bad data is named before anything else runs."""
        if stage == "fit":
            self._make_train_dataset()
            self.per_device_batch_size()
        if stage in ("fit", "validate"):
            self.eval_dataset(self.val_split)
        if stage == "test":
            for split in self.test_splits:
                self.eval_dataset(split)

    def check_contents(self) -> None:
        """Looks into every file that a run will read, evaluation included, before it starts.

        A truncated image or a mask of the wrong kind is then named at once and not after hours of
        training. Costs a header an image and one decoding a mask: seconds for VOC.

        Raises:
            WSSSError: names the first file that cannot be used.
        """
        self._make_train_dataset().check_contents()
        for split in (self.val_split, *self.test_splits):
            self.eval_dataset(split).check_contents()

    def _dataset(
        self, split: str, *, transform: TrainTransform | None, with_mask: bool
    ) -> VOCDataset:
        is_train = split == self.train_split
        return VOCDataset(
            root=self.root,
            split=split,
            class_names=self.class_names,
            transform=transform,
            with_mask=with_mask,
            mask_folder=self.train_mask_folder if is_train else self.mask_folder,
            label_source=self.label_source,
            limit=self.limit,
            seed=self.seed,
        )

    def _make_train_dataset(self) -> VOCDataset:
        if self._train_dataset is None:
            check_train_masks(self.train_masks, self.train_transform)
            self._train_dataset = self._dataset(
                self.train_split, transform=self.train_transform, with_mask=False
            )
            if self.train_masks is not None:
                own = self.train_masks == GROUND_TRUTH
                folder = self._train_dataset.mask_folder if own else Path(self.train_masks)
                self._train_dataset.train_on_masks(folder)
            if len(self._train_dataset) < self.global_batch_size:
                raise WSSSError(
                    f"split {self.train_split!r} of {self.root} has {len(self._train_dataset)} "
                    f"images, fewer than global_batch_size={self.global_batch_size}; lower it or "
                    "raise data.limit"
                )
        return self._train_dataset

    def eval_dataset(self, split: str) -> VOCDataset:
        """Returns the split at native size with its masks, checked once and kept."""
        if split not in self._eval_datasets:
            self._eval_datasets[split] = self._dataset(split, transform=None, with_mask=True)
        return self._eval_datasets[split]

    def unmasked_dataset(self, split: str) -> VOCDataset:
        """Returns a split at native size whose masks are never opened: for pseudo labels."""
        return self._dataset(split, transform=None, with_mask=False)

    def per_device_batch_size(self) -> int:
        """Derives the images per process and forward pass from `global_batch_size`.

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
        """Returns the shuffled training batches, from where a loaded checkpoint left off."""
        dataset = self._make_train_dataset()
        per_device = self.per_device_batch_size()
        processes, rank = self._processes()
        sampler = TrainSampler(
            length=len(dataset),
            global_batch_size=self.global_batch_size,
            num_replicas=processes,
            rank=rank,
            seed=self.seed,
            start=self._start(per_device),
        )
        return make_loader(
            dataset,
            batch_size=per_device,
            num_workers=self.num_workers,
            sampler=sampler,
            drop_last=True,
        )

    def eval_dataloader(self, split: str) -> OneLineErrorLoader:
        """Returns this process's share of a split, one image at native size a batch."""
        dataset = self.eval_dataset(split)
        processes, rank = self._processes()
        sampler = UnpaddedDistributedSampler(length=len(dataset), num_replicas=processes, rank=rank)
        return make_loader(dataset, batch_size=1, num_workers=self.num_workers, sampler=sampler)

    def val_dataloader(self) -> OneLineErrorLoader:
        """Returns the validation split."""
        return self.eval_dataloader(self.val_split)

    def test_dataloader(self) -> list[OneLineErrorLoader]:
        """Returns the test splits, in their order."""
        return [self.eval_dataloader(split) for split in self.test_splits]

    def _order_identity(self) -> dict[str, Any]:
        """What must be unchanged for a position in the epoch to mean the same images."""
        return {
            "training list (sha256)": _hash_names(self._make_train_dataset().names),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training order for a checkpoint (plain values only)."""
        if self.trainer is None or self._train_dataset is None:
            return {}
        loop = self.trainer.fit_loop
        # A batch is `processed` once its optimiser step is done. It is counted as `completed`
        # only after the hooks in which checkpoints are written.
        batches = loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        epoch = max(loop.epoch_progress.current.started - 1, 0)  # type: ignore[attr-defined]
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "order": self._order_identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers a position; it is checked and used when training asks for its loader."""
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
