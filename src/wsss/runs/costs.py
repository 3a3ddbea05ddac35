"""What training cost: hours on how many devices, peak memory."""

import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from wsss.core.errors import WSSSError
from wsss.core.stopwatch import device_name, peak_memory

#: what a checkpoint keeps of a :class:`CostMeter`
STATE: dict[str, type | tuple[type, ...]] = {
    "seconds": (int, float),
    "peak": int,
    "kind": str,
    "where": str,
    "devices": int,
    "sessions": int,
}


class CostMeter(Callback):
    """Measure hours and peak memory of training; checkpoints keep them, resumptions add to them.

    Steps that a run lost when it was killed between two checkpoints are not counted.
    """

    #: key of the callback's state in a checkpoint
    state_key = "CostMeter"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak = 0
        self.kind = ""
        self.where = ""
        self.devices = 1
        self.sessions = 0
        self._since: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.where, self.devices = device_name(pl_module.device), trainer.world_size
        self.sessions += 1
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._device = pl_module.device
        self._since = time.perf_counter()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop the clock, so that the evaluation that follows is not training."""
        self._tick()
        self._since = None

    def _tick(self) -> None:
        if self._since is None:
            return
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        peak, self.kind = peak_memory(self._device)
        self.peak = max(self.peak, peak)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        self._tick()
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where an interrupted run stood.

        Raises:
            WSSSError: the state is damaged.
        """
        self.__dict__.update(checked_state(state_dict, "the checkpoint"))


def checked_state(state: Any, origin: str) -> dict[str, Any]:
    """Give the state of a :class:`CostMeter` back if it is one.

    Raises:
        WSSSError: a part is missing, of another kind or below zero.
    """
    whole = isinstance(state, dict) and state.keys() == STATE.keys()
    if not whole or not all(isinstance(state[key], kind) for key, kind in STATE.items()):
        raise WSSSError(f"{origin}: what it says of its cost is damaged; copy it again")
    numbers = [value for value in state.values() if not isinstance(value, str)]
    if not all(0 <= number < 2**63 for number in numbers):
        raise WSSSError(f"{origin}: what it says of its cost is out of range; copy it again")
    return dict(state)


def training_cost(state: dict[str, Any], origin: str = "the checkpoint") -> dict[str, Any]:
    """Make the cost entry of ``results.json`` from the state of a :class:`CostMeter`.

    Args:
        state: of the callback.
        origin: where it was read, for the error.

    Returns:
        Wall hours, device hours (GPU hours where ``kind`` is GPU memory), peak memory of the first
        process in bytes and what it counts, devices, and the number of sessions.
    """
    state = checked_state(state, origin)
    hours = state["seconds"] / 3600
    on_gpu = state["kind"].startswith("GPU")
    return {
        "train_wall_hours": hours,
        "train_gpu_hours": hours * state["devices"] if on_gpu else None,
        "train_peak_memory_bytes": state["peak"],
        "train_peak_memory_kind": state["kind"],
        "device": state["where"],
        "num_devices": state["devices"],
        "sessions": state["sessions"],
    }
