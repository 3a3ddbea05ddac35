"""Sweeps: every job in processes of its own, so many at a time, and what became of them.

The folder of a sweep, ``runs_dir/sweeps/TIME-PID``, holds ``N.json`` for every job that ended and,
where several ran at a time, ``N.log`` with what job N printed. Skipping what is finished and
resuming what was interrupted is what each run does by itself (:func:`wsss.training.run.train`).
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from wsss.core.errors import WSSSError
from wsss.core.failures import JOB_STEM
from wsss.core.files import write_atomically
from wsss.core.processes import end_with

#: in the environment of a job: the process that started it, with which it ends
PARENT = "WSSS_PARENT"
#: exit statuses of a job that was stopped and resumes with the same command
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
#: seconds that processes of a job may go on after its first one has ended
GRACE = 10


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        overrides: of the job.
        status: exit status of its first process; negative: the signal that ended it.
        error: first line of what went wrong, empty where nothing did.
        value: the objective, for sweepers that optimise; None where there is none.
        log: file with its output, where that did not go to the terminal.
    """

    overrides: list[str]
    status: int
    error: str = ""
    value: float | None = None
    log: str | None = None


def new_folder(runs_dir: Path) -> Path:
    """Name the folder of a sweep that begins; made when something is written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (runs_dir / "sweeps" / f"{stamp}-{os.getpid()}").absolute()


def job_stem(folder: Path, number: int) -> Path:
    """Name the files of a job without their suffix."""
    return folder / f"{number:03d}"


def write_value(stem: Path, value: float | None) -> None:
    """Leave a job's objective for the process that started it."""
    write_atomically(stem.with_suffix(".value"), json.dumps(value).encode())


def record(stem: Path, overrides: Sequence[str], status: int, log: Path | None = None) -> Outcome:
    """Write ``N.json`` from what a job left behind, and give it back."""
    error, value = stem.with_suffix(".error"), stem.with_suffix(".value")
    if status == 0:
        reason = ""
    elif status in STOPPED:
        reason = "stopped"
    elif error.is_file():
        reason = (error.read_text().splitlines() or [""])[0]
    elif status < 0:
        reason = f"ended by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            reason += " (out of memory?)"
    else:
        reason = f"exit status {status}"
    outcome = Outcome(
        list(overrides),
        status,
        reason,
        json.loads(value.read_text()) if status == 0 and value.is_file() else None,
        str(log) if log else None,
    )
    write_atomically(stem.with_suffix(".json"), json.dumps(asdict(outcome), indent=2).encode())
    for left in (error, value):
        left.unlink(missing_ok=True)
    return outcome


def outcomes(folder: Path) -> list[Outcome]:
    """Read all jobs of a sweep that ended, in their order."""
    found = sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem))
    return [Outcome(**json.loads(path.read_text())) for path in found]


def repeat(overrides: Sequence[str]) -> str:
    """Give the command that repeats a job."""
    return f"wsss train {shlex.join(overrides)}"


def summary(ended: Sequence[Outcome], *, begun_of: int) -> list[str]:
    """Give the lines that end a sweep for its user; none where all went well.

    Args:
        ended: jobs that ended.
        begun_of: number of jobs of the sweep.
    """
    lines = []
    stopped = [outcome for outcome in ended if outcome.status in STOPPED]
    failed = [outcome for outcome in ended if outcome.status and outcome not in stopped]
    if failed:
        lines.append(f"{len(failed)} of {begun_of} jobs failed:")
    for outcome in failed:
        lines += [f"  {repeat(outcome.overrides)}", f"      {outcome.error}"]
        lines += [f"      {outcome.log}"] if outcome.log else []
    missing = begun_of - len(ended)
    if stopped or missing:
        lines.append(
            f"{len(stopped)} of {begun_of} jobs were stopped, {missing} did not begin or end; the "
            "same command resumes"
        )
    return lines


def exit_status(ended: Sequence[Outcome]) -> int:
    """Give a sweep's exit status: the largest of its jobs'; a shell counts signals like this."""
    return max((o.status if o.status >= 0 else 128 - o.status for o in ended), default=0)


def end_with_sweep() -> None:
    """Stop this job, with a checkpoint, when the process that runs the sweep is gone."""
    parent = os.environ.pop(PARENT, None)  # further processes of the job have other parents
    if parent:
        end_with(int(parent), signal.SIGTERM)


def share_devices(devices: Sequence[str], slots: int) -> list[list[str]]:
    """Say which GPUs each of the jobs that run at a time gets; more jobs than GPUs take turns."""
    if not devices:
        return [[] for _ in range(slots)]
    each = max(len(devices) // slots, 1)
    return [
        [devices[(slot * each + i) % len(devices)] for i in range(each)] for slot in range(slots)
    ]


def _environments(slots: int) -> list[dict[str, str]]:
    """Give what jobs that run at a time have of the machine; one alone has all of it."""
    base = {**os.environ, PARENT: str(os.getpid())}
    if slots == 1:
        return [base]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        [str(index) for index in range(torch.cuda.device_count())]
        if visible is None
        else [name for name in visible.split(",") if name]
    )
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // slots, 1)), **base}
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})
        for own in share_devices(devices, slots)
    ]


class _Process:
    """A job that runs: the first process of a group of its own.

    Args:
        overrides: of the job.
        hidden: further overrides, which repeating it by hand does not need.
        stem: of its files.
        environment: of its processes.
        quiet: print into a log file.
    """

    def __init__(
        self,
        *,
        overrides: Sequence[str],
        hidden: Sequence[str],
        stem: Path,
        environment: Mapping[str, str],
        quiet: bool,
    ) -> None:
        self.overrides, self.stem = overrides, stem
        self.log = stem.with_suffix(".log") if quiet else None
        with ExitStack() as files:
            output = files.enter_context(self.log.open("ab")) if self.log else None
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wsss.cli", "train", *overrides, *hidden],
                env={**environment, JOB_STEM: str(stem)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # so that Ctrl-C of the terminal reaches it once, through the sweep
                process_group=0,
            )

    def outcome(self) -> Outcome | None:
        """Say what became of it, once it has ended and all its processes with it."""
        status = self.process.poll()
        if status is None:
            return None
        self._end_group()
        return record(self.stem, self.overrides, status, self.log)

    def _end_group(self) -> None:
        """End what the first process has left behind, such as the other ranks of a dead one."""
        with suppress(ProcessLookupError, PermissionError):
            for _ in range(GRACE * 10):
                os.killpg(self.process.pid, 0)
                time.sleep(0.1)
            os.killpg(self.process.pid, signal.SIGKILL)


def run_jobs(
    jobs: Sequence[Sequence[str]],
    *,
    hidden: Sequence[str],
    limit: int,
    folder: Path,
    first: int = 0,
    quiet: bool = False,
) -> list[Outcome]:
    """Run every job as ``wsss train`` in processes of its own; a failed one stops no other.

    Ctrl-C and SIGTERM are handed on to the running jobs, which end after their step with a
    checkpoint; no further job begins. A second one is handed on too, and ends them at once.

    Args:
        jobs: overrides of each.
        hidden: further overrides of all.
        limit: jobs at a time. More than one print into log files, and share GPUs and cores.
        folder: of the sweep.
        first: number of the first job.
        quiet: print into log files in any case.

    Returns:
        What became of each, in their order.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, when all jobs have ended.
        WSSSError: ``limit`` is below one.
    """
    if limit < 1:
        raise WSSSError(f"hydra.launcher.jobs={limit}: expected at least 1 job at a time")
    slots = min(limit, len(jobs))
    environments = _environments(slots)
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[int, _Process]] = {}
    ended: dict[int, Outcome] = {}
    waiting = list(range(len(jobs)))
    with _handing_on(running) as signals:
        while running or (waiting and not signals):
            for slot in range(slots):
                if slot not in running and waiting and not signals:
                    number = waiting.pop(0)
                    print(f"[{first + number + 1}] {repeat(jobs[number])}", flush=True)
                    process = _Process(
                        overrides=jobs[number],
                        hidden=hidden,
                        stem=job_stem(folder, first + number),
                        environment=environments[slot],
                        quiet=quiet or slots > 1,
                    )
                    running[slot] = (number, process)
                    if signals:  # while it was being started
                        process.process.send_signal(signals[-1])
                    if process.log:
                        print(f"    {process.log}", flush=True)
            time.sleep(0.1)
            ended |= _take_ended(running, first)
    if signals:
        raise SystemExit(128 + signals[0])
    return [ended[number] for number in range(len(jobs))]


def _take_ended(running: dict[int, tuple[int, _Process]], first: int) -> dict[int, Outcome]:
    """Take the jobs that have ended out of ``running``; give what became of each by its number."""
    ended = {}
    for slot, (number, process) in list(running.items()):
        outcome = process.outcome()
        if outcome is not None:
            ended[number] = outcome
            del running[slot]
            print(f"[{first + number + 1}] {outcome.error or 'done'}", flush=True)
    return ended


@contextmanager
def _handing_on(running: Mapping[int, tuple[int, _Process]]) -> Iterator[list[int]]:
    """Hand signals on to what runs; give the list of those that came."""
    signals: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for _, process in list(running.values()):
            process.process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
