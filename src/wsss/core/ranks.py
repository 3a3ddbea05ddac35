"""Which of the processes of a run this one is."""

import torch
from lightning.pytorch.utilities import rank_zero_only


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
