"""The loader of every data module."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wsss.core.errors import WSSSError
from wsss.core.processes import ignore_terminal_signals
from wsss.data.samplers import seed_worker


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
            raise WSSSError(message.removeprefix("wsss.core.errors.WSSSError: ")) from error


def make_loader(
    dataset: Dataset[dict[str, Any]],
    *,
    batch_size: int,
    num_workers: int,
    worker_seed: tuple[int, int],
    sampler: Sampler[Any] | None = None,
    batch_sampler: Sampler[list[int]] | None = None,
    drop_last: bool = False,
) -> OneLineErrorLoader:
    """Build a loader whose workers live through all epochs and whose errors are one line.

    Args:
        dataset: what to load.
        batch_size: images a batch.
        num_workers: processes.
        worker_seed: seed and rank, for the workers' global generators.
        sampler: order of the images.
        batch_sampler: whole batches; takes the place of the sampler and the batch size.
        drop_last: leave out a last, smaller batch.
    """
    batches: dict[str, Any] = {"batch_sampler": batch_sampler}
    if batch_sampler is None:
        batches = {"batch_size": batch_size, "sampler": sampler, "drop_last": drop_last}
    return OneLineErrorLoader(
        dataset,
        **batches,
        num_workers=num_workers,
        worker_init_fn=partial(_begin_worker, *worker_seed),
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _begin_worker(seed: int, rank: int, worker: int) -> None:
    ignore_terminal_signals()
    seed_worker(seed, rank, worker)
