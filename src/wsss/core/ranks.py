"""Which of the processes of a run this one is."""

import torch
from lightning.pytorch.utilities import rank_zero_only


def is_first_process() -> bool:
    """Tell whether this is no further process of a run, be it on this machine or on another.

    It answers before processes are joined, too: launchers say the rank in the environment.
    """
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def rank_and_count() -> tuple[int, int]:
    """Rank of this process and the number of processes that are joined; (0, 1) where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
