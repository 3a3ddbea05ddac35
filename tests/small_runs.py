"""Runs of seconds, and commands in processes that a test can stop in every way."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from wsss.cli import main

#: of every method: a network and pictures small enough for a tenth of a second a step
SMALL = [
    "data=minivoc",
    "backbone.weights=random",
    "+backbone.overrides.embed_dim=48",
    "backbone.overrides.depth=4",
    "budget.crop_size=64",
    "budget.local_size=16",
    "budget.global_batch_size=4",
    "data.limit=8",
    "data.num_workers=0",
    "data.test_splits=[]",
]
#: the same for evaluation, and bitwise equal when repeated
PLAIN = [
    "budget.cam_size=64",
    "eval.single_resize=64",
    "eval.seg_sizes=null",
    "eval.crf=null",
    "eval.refine=null",
    "eval.seg_scales=[1.0]",
    "eval.holdout_per_class=0",
    "gallery=0",
    "trainer=cpu",
    "trainer.deterministic=true",
]
#: each method, its second phase beginning with step 4 of 6
METHODS = {
    "clustercam": [
        "method.epochs=3",
        "method.warmup_epochs=1",
        "method.seg_from_epoch=2",
        "method.decoder_channels=16",
    ],
    "getam": ["method.decoder_channels=16", "method.energy_weight=0.0"],
    "tkp_pcl": ["budget.warmup_steps=4", "method.lstm_hidden=8", "method.trained_blocks=2"],
    # a tower of CLIP with random weights, and random directions for texts
    "weclip": [
        "backbone=vit_pico",
        "backbone.name=vit_base_patch16_clip_quickgelu_224",
        "+backbone.overrides.num_classes=32",
        "backbone.overrides.patch_size=8",
        "backbone.overrides.img_size=96",
        "+backbone.frozen=true",
        "method.text=random",
        "method.static_layers=3",
        "method.rfm_layers=2",
        "method.rfm_start=5",
        "method.decoder_channels=16",
        "method.decoder_layers=1",
        "method.decoder_heads=2",
        "eval.resize_long=null",
        "method.warmup_steps=1",
    ],
    "more": [
        "budget.warmup_steps=1",
        "method.seg_after=0.5",
        "method.late_masks_after=0.5",
        "method.decoder_channels=16",
    ],
}
SECONDS = 300  # on a machine that is busy

# forked from a process that has imported everything once and has no threads yet
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["wsss.training.run", "wsss.evaluation.evaluator"])


class Command:
    """``wsss ARGUMENTS`` in a process group of its own.

    Args:
        arguments: of the command.
        log: file for what it prints.
        largest_file: bytes at which a file is too large, as on a full disk.
        clock_runs_back: ``time.time()`` is an hour less at every call.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        largest_file: int | None = None,
        clock_runs_back: bool = False,
    ) -> None:
        self.log = log
        log.touch()
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the process that is forked
        self.process = FORKED.Process(
            target=_run,
            # the fork server has the environment of its own start
            args=(list(arguments), log, dict(os.environ), largest_file, clock_runs_back),
        )
        self.process.start()

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that it does."""
        deadline = time.monotonic() + SECONDS
        while not reached():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Wait for its end and that of every process it has started; its exit status."""
        self.process.join(SECONDS)
        assert self.process.pid is not None
        assert self.process.exitcode is not None, self.text()
        deadline = time.monotonic() + 60
        while processes_of(self.process.pid):
            assert time.monotonic() < deadline, "processes are left behind"
            time.sleep(0.05)
        return self.process.exitcode


def processes_of(group: int) -> list[int]:
    """Processes of the group that run; those that only wait to be buried do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _run(
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    largest_file: int | None,
    clock_runs_back: bool,
) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    # as `python -m wsss.cli`: DDP starts further processes from the script, not from pytest
    sys.modules["__main__"].__spec__ = None
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if clock_runs_back:
        ticks = iter(range(10**9))
        time.time = lambda: 1.7e9 - 3600.0 * next(ticks)
    try:
        sys.exit(main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def printer(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give a function that runs a command here, checks its status and gives what it prints."""

    def printed(*arguments: str, status: int = 0) -> str:
        try:
            found = main(list(arguments))
        except SystemExit as leave:
            found = int(leave.code or 0)
        output = capsys.readouterr()
        assert found == status, output.err
        return " ".join((output.out + output.err).split())

    return printed
