"""What a number cost: seconds by phase, peak memory, hours on how many devices."""

import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


@dataclass
class Stopwatch:
    """Adds up the time of named phases; inside a nested phase only the inner one counts.

    Attributes:
        device: synchronised at every boundary where it is a GPU.
        seconds: phase -> exclusive seconds since the last :meth:`reset`.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def now(self) -> float:
        """Seconds, after all work submitted so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset(self) -> None:
        """Forget all phases."""
        self.seconds = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase; the enclosing one pauses meanwhile."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Credit the time since the last boundary to the innermost open phase."""
        now = self.now()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak bytes of this process, and what they count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU memory allocated"
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss, which a child inherits from the process that started it
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert match is not None
        return int(match[1]) * 1024, "resident set of the process"
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * unit, "resident set of the process"


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor() or "CPU"


class CostMeter(Callback):
    """Hours and peak memory of training, kept in every checkpoint and added up over resumptions.

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
        """What a checkpoint keeps."""
        self._tick()
        names = ("seconds", "peak", "kind", "where", "devices", "sessions")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where an interrupted run stood."""
        self.__dict__.update(state_dict)


def training_cost(state: dict[str, Any]) -> dict[str, Any]:
    """The cost entry of ``results.json`` from the state of a :class:`CostMeter`.

    Returns:
        Wall hours, device hours (GPU hours where ``kind`` is GPU memory), peak memory of the first
        process in bytes and what it counts, devices, and the number of sessions.
    """
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
