"""Several processes train one model: their gradients are averaged by hand.

``DistributedDataParallel`` wants a gradient for every parameter at every step. Here the phase of a
method decides what learns: decoders have no gradient before segmentation starts, encoders none
during a warm-up. Searching each step's graph (``find_unused_parameters``) finds that out at a
price, a static graph forbids it, and a term of weight zero is skipped, since ``0 * NaN`` is NaN.
So nothing is wrapped: after the backward pass the processes exchange which parameters have
a gradient, and average those. A parameter that has none anywhere keeps ``None`` and is left alone
by the optimiser, as in a single process. Communication does not overlap with the backward pass.

A process that dies would leave the others waiting, for half an hour on GPUs: :class:`Watch` ends
them.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsss.core.errors import WSSSError
from wsss.runs.folder import build

BUCKET = 2**24  # numbers that are averaged in one exchange: 64 MiB of float32
LAUNCHER = "WSSS_LAUNCHER"  # process id of the first process, for those that it starts
POLL = 1.0  # seconds between two looks at the other processes
GRACE = 15.0  # seconds in which the main thread may find out by itself, and save


def choose_strategy(settings: Mapping[str, Any]) -> "str | GradientAveraging":
    """Choose Lightning's strategy for one device, ours for several.

    Args:
        settings: the trainer's configuration.

    Raises:
        WSSSError: another strategy is named, no such device, or batch norms that shall be
            synchronised on CPUs.
    """
    if settings.get("strategy", "auto") != "auto":
        raise WSSSError(
            f"trainer.strategy={settings['strategy']}: expected auto, which averages gradients "
            "over the processes where there are several devices (trainer.devices=2)"
        )
    where = {k: v for k, v in settings.items() if k in ("accelerator", "devices", "num_nodes")}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    probe = build({"_target_": "lightning.Trainer", **where}, **dict.fromkeys(quiet, False))
    if isinstance(probe.strategy, SingleDeviceStrategy):
        return "auto"
    if settings.get("sync_batchnorm") and probe.strategy.root_device.type == "cpu":
        raise WSSSError(
            "trainer.sync_batchnorm=true: torch synchronises batch norms on GPUs alone; with "
            "several CPU processes set trainer.sync_batchnorm=false"
        )
    return GradientAveraging()


class GradientAveraging(DDPStrategy):
    """One process a device; gradients are averaged after the last backward pass of a step.

    Running statistics of batch norms are averaged with them: the mean is then that of the global
    batch, the variance the mean of the processes' variances.

    Attributes:
        alone: this process is leaving and waits for no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alone = False
        self._accumulating = False
        if "LOCAL_RANK" not in os.environ:  # Lightning will start the other processes
            os.environ[LAUNCHER] = str(os.getpid())

    def setup_distributed(self) -> None:
        """Watch the other processes of this machine, then meet them."""
        children: list[subprocess.Popen[bytes]] = getattr(self.launcher, "procs", [])
        Watch.over(list(children))
        # Lightning's own watcher, which kills this process in mid-sentence, ends with its list
        children.clear()
        super().setup_distributed()

    @torch.no_grad()
    def configure_ddp(self) -> None:
        """Give all processes the first one's parameters and buffers."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            flat = tensor.detach().contiguous()
            dist.broadcast(flat, 0)
            tensor.copy_(flat)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let backward passes in here only add to the gradients of this process."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average gradients and statistics, before a gradient is clipped or checked for infinity.

        Args:
            closure_loss: not used.
        """
        if not self._accumulating:
            assert self.lightning_module is not None
            average_gradients(self.lightning_module, self.root_device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other processes, unless this one is leaving after an error."""
        if not self.alone:
            super().barrier(*args, **kwargs)


@torch.no_grad()
def average_gradients(module: nn.Module, device: torch.device) -> None:
    """Replace gradients, and statistics of batch norms in training, by their means over processes.

    A gradient that only some processes have counts as zero in the others; one that none has stays
    None.

    Args:
        module: the same in every process.
        device: that of the process group.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    mask = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    learned = mask.to(device, non_blocking=True)
    dist.all_reduce(learned, dist.ReduceOp.MAX)
    tensors = []
    for parameter, anywhere in zip(parameters, learned.tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    for norm in module.modules():
        own = isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)
        if own and norm.training:  # without statistics there are no such buffers
            tensors += [b for b in norm.buffers(recurse=False) if b.is_floating_point()]
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, mean in zip(bucket, parts, strict=True):
            tensor.copy_(mean.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give tensors of one kind, in an order that is the same everywhere, up to BUCKET numbers."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        bucket: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


class Watch(threading.Thread):
    """End this process when another one of the run on this machine has died.

    The main thread usually notices first, by a broken connection, and leaves by itself. Where it
    computes, or waits in a way that cannot break, this thread ends the process after GRACE seconds.

    Args:
        children: processes that this one started, of rank 1 and on.
        parent: process id of the one that started this process for the run, or None.
    """

    #: of this process; the stages of a study share it, as they share the processes
    current: "Watch | None" = None

    def __init__(self, children: Sequence["subprocess.Popen[bytes]"], parent: int | None) -> None:
        super().__init__(daemon=True, name="watch-processes")
        self.children, self.parent = children, parent

    @classmethod
    def over(cls, children: Sequence["subprocess.Popen[bytes]"]) -> None:
        """Start watching, once a process."""
        parent = os.getppid() if os.environ.get(LAUNCHER) == str(os.getppid()) else None
        if cls.current is None and (children or parent):
            cls.current = cls(children, parent)
            cls.current.start()

    def lost(self) -> str | None:
        """Say who has died; None while all live or have ended well."""
        for rank, child in enumerate(self.children, start=1):
            status = child.poll()
            if status:
                how = f"was killed (signal {-status})" if status < 0 else f"ended ({status})"
                return f"process {rank} of this run {how}"
        if self.parent is not None and os.getppid() != self.parent:
            return "the first process of this run has died"
        return None

    def run(self) -> None:
        """Look about until somebody is missing."""
        while (lost := self.lost()) is None:
            time.sleep(POLL)
        time.sleep(GRACE)
        print(f"wsss train: {lost}; the same command resumes", file=sys.stderr, flush=True)
        for child in self.children:
            child.kill()
        os._exit(1)  # the main thread may hang where no exception reaches it


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the error of a broken connection into one that says which process has died.

    Raises:
        ConnectionError: another process of the run has gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = None
        for _ in range(30):  # the connection breaks a moment before the process is gone
            lost = Watch.current.lost() if Watch.current else None
            if lost:
                break
            time.sleep(0.1)
        lost = lost or "the connection to another process of this run broke"
        raise ConnectionError(f"{lost}; the same command resumes") from error
