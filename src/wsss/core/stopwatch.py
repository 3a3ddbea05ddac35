"""Seconds by phase, a duration in words, peak memory, the name of a device."""

import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch


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
        """Give the time in seconds, once all work submitted so far is done."""
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
    """Give the peak bytes of this process, and what they count."""
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
    """Give the name of the GPU or else of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor() or "CPU"


def duration(seconds: float) -> str:
    """Write a duration in the two largest units that it has."""
    hours, minutes = round(seconds / 3600), round(seconds / 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{max(1, round(seconds))} s"
