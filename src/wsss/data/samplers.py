"""Which image comes when: a resumable training order, an evaluation order without padding.

The first two are `DistributedSampler`s, which Lightning leaves alone: it would otherwise wrap the
loader in one of its own, that pads the last batch (an image counted twice) and has another seed.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler


class TrainSampler(DistributedSampler[tuple[int, int]]):
    """A shuffled order that depends on (seed, epoch) alone, yielding pairs (epoch, index).

    The epoch travels with the index because workers that live through many epochs hold a copy of
    the dataset that never learns the epoch. Only whole global batches are given, so the images
    of optimiser step n are the same however many processes share them. A global batch is cut into
    forward passes of `per_device` images, and the processes take these in turn: two processes see
    the images together that one process would in two passes (``accumulate_grad_batches=2``).

    Args:
        length: number of images, at least `global_batch_size`.
        global_batch_size: images per optimiser step over all processes and accumulated batches.
        per_device: images per process and forward pass.
        num_replicas: number of processes.
        rank: of this process.
        seed: of the order.
        start: (epoch, images of this process already seen in it) to begin with.
        current_epoch: gives the epoch, called whenever one begins.
    """

    def __init__(
        self,
        *,
        length: int,
        global_batch_size: int,
        per_device: int,
        num_replicas: int,
        rank: int,
        seed: int,
        start: tuple[int, int] = (0, 0),
        current_epoch: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.total_size = length // global_batch_size * global_batch_size
        self.per_device = per_device
        self.num_samples = self.total_size // num_replicas
        self.start_epoch, self.start_offset = start
        self.current_epoch = current_epoch
        # Lightning asks for the first iterator before it calls set_epoch
        self.epoch = self.start_epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch.

        Args:
            epoch: Lightning's number, which lags in a run that was resumed at the end of one; it
                counts only where there is no ``current_epoch``.
        """
        super().set_epoch(self.current_epoch() if self.current_epoch else epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
        order = np.random.default_rng(stream).permutation(len(self.dataset))  # type: ignore[arg-type]
        passes = order[: self.total_size].reshape(-1, self.num_replicas, self.per_device)
        share = passes[:, self.rank].ravel()
        first = self.start_offset if self.epoch == self.start_epoch else 0
        return iter([(self.epoch, int(index)) for index in share[first:]])

    def __len__(self) -> int:
        """Give the number of images of a whole epoch: Lightning counts resumed ones itself."""
        return self.num_samples


class UnpaddedDistributedSampler(DistributedSampler[int]):
    """Split 0..length-1 over the processes without repeating any, in order.

    Processes may get unequal numbers: metrics must be reduced once at the end, not every batch.
    """

    def __init__(self, *, length: int, num_replicas: int, rank: int) -> None:
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.num_samples = len(range(rank, length, num_replicas))
        self.total_size = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class SizeBuckets(Sampler[list[int]]):
    """Batches of equally large images, so that full-size evaluation needs no padding.

    Padding would change what a network sees at the border, and so the numbers. A batch is given
    as soon as its bucket is full, the rest at the end, hence every image exactly once.

    Args:
        sampler: gives the indices of this process.
        sizes: (height, width) of every image.
        batch_size: largest batch.
    """

    def __init__(
        self,
        sampler: UnpaddedDistributedSampler,
        *,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
    ) -> None:
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.batches: list[list[int]] = []
        for index in sampler:
            bucket = buckets[sizes[index]]
            bucket.append(index)
            if len(bucket) == batch_size:
                self.batches.append(buckets.pop(sizes[index]))
        self.batches += list(buckets.values())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def seed_worker(seed: int, rank: int, worker: int) -> None:
    """Seed the global generators of a loader's worker from (seed, rank, worker).

    Samples draw from generators of their own and do not need it. It is for what a transform or a
    library might draw elsewhere: never the same stream twice, and the same one in every run.
    """
    state = np.random.SeedSequence(seed, spawn_key=(rank, worker)).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002  the legacy generator is what is to be seeded
    torch.manual_seed(int(state[2]))
