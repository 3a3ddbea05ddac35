"""Which of the processes of a run this one is, and what they add up."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def is_first_process() -> bool:
    """Say whether this is the first process of a run over all its machines.

    It answers before processes are joined, too: launchers say the rank in the environment.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def rank_and_count() -> tuple[int, int]:
    """Give this process's rank and the number of joined processes; (0, 1) where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_ranks(
    count: Tensor, *, enabled: bool = True, device: torch.device | None = None
) -> tuple[Tensor, int]:
    """Sum what a loss divides by over all processes.

    Gradients are averaged over processes. A loss of ``ranks`` times the process's own sum over the
    summed count has the gradients, in that mean, of one process that has all images. Every process
    must call this, in the same order, also one that counts nothing: the others wait for it.

    Args:
        count: of this process; it is left as it is.
        enabled: False: this process's own count.
        device: that of the process group, where the count is on the host; None: the count's.

    Returns:
        The sum and the number of processes; with one process the count itself and 1.
    """
    ranks = rank_and_count()[1]
    if not enabled or ranks == 1:
        return count, 1
    total = count.detach().to(device=device, non_blocking=True, copy=True)
    torch.distributed.all_reduce(total)
    return total, ranks


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average scalars over all processes in one exchange, without gradient.

    Args:
        values: of this process, on the device of the process group, by names that are the same in
            every process.

    Returns:
        The means in float32; with one process the values themselves.
    """
    own = {name: value.detach() for name, value in values.items()}
    ranks = rank_and_count()[1]
    if ranks == 1:
        return own
    flat = torch.stack([value.float() for value in own.values()])
    torch.distributed.all_reduce(flat)
    return dict(zip(own, (flat / ranks).unbind(), strict=True))
