"""A run that is stopped in every way, again and again, ends as if it never had been."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import FORKED, METHODS, PLAIN, SMALL, Command, processes_of

from wsss.core.errors import WSSSError
from wsss.core.lock import lock
from wsss.evaluation.ledger import past_readings
from wsss.maps.refine.dense_crf import CRF_PRESETS, CRFPool

# three steps an epoch, so that the checkpoints of steps 2 and 4 are from the middle of one
STEPS = [
    "budget.max_steps=6",
    "budget.eval_every=2",
    "budget.global_batch_size=2",
    "data.limit=6",
]
LAST = Path("checkpoints") / "last.ckpt"


def command(method: str, runs: Path) -> list[str]:
    own = METHODS.get(method, ["budget.warmup_steps=1", "method.decoder_channels=16"])
    return ["train", f"method={method}", *SMALL, *PLAIN, *own, *STEPS, f"runs_dir={runs}"]


def folder_of(runs: Path) -> Path:
    (config,) = runs.rglob("config.yaml")
    return config.parent


def steps_of(runs: Path) -> int:
    return int(torch.load(folder_of(runs) / LAST, weights_only=True)["global_step"])


def assert_equal_ends(runs: Path, others: Path) -> None:
    """Weights and every number that is no time are the same to the bit."""
    ends = [torch.load(folder_of(each) / LAST, weights_only=True) for each in (runs, others)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 6
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    numbers = [_numbers(folder_of(each)) for each in (runs, others)]
    assert numbers[0] == numbers[1]


def _numbers(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    assert results["cost"]["train_wall_hours"] > 0
    assert all(metrics["cost"]["seconds"] > 0 for metrics in results["splits"].values())
    leave = ("cost", "readings")
    return {
        split: {key: value for key, value in metrics.items() if key not in leave}
        for split, metrics in results["splits"].items()
    }


def assert_whole_validations(folder: Path) -> None:
    """None of them stopped early or began in the middle; the last is there."""
    watched = [e for e in past_readings(folder) if e["purpose"] == "watching training"]
    assert {entry["num_images"] for entry in watched} == {6}
    assert watched[-1]["step"] == 6


def kill_after_a_checkpoint(running: Command, runs: Path) -> None:
    """As soon as the run has written its next checkpoint."""
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("last.ckpt")}

    def written() -> bool:
        return any(p.stat().st_mtime_ns != before.get(p) for p in runs.rglob("last.ckpt"))

    running.until(written)
    running.send(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_resumes_in_mid_epoch_to_the_same_numbers(method: str, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert Command(command(method, straight), tmp_path / "0.log").end() == 0
    for part in ("1", "2"):
        kill_after_a_checkpoint(Command(command(method, broken), tmp_path / f"{part}.log"), broken)
    last = Command(command(method, broken), tmp_path / "3.log")
    assert last.end() == 0, last.text()
    assert "resuming from" in last.text()
    assert_equal_ends(straight, broken)
    assert_whole_validations(folder_of(broken))


@pytest.mark.slow
def test_run_stopped_in_every_way_ends_the_same(tmp_path: Path) -> None:
    """The clock of the uninterrupted run goes backwards, which no number shows."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = Command(command("toco", straight), tmp_path / "0.log", clock_runs_back=True)
    assert whole.end() == 0, whole.text()
    arguments = command("toco", broken)

    first = Command(arguments, tmp_path / "1.log")
    first.until(lambda: "/3 [" in first.text())  # the bar of training
    first.send(signal.SIGSTOP)
    second = Command(arguments, tmp_path / "second.log")
    assert second.end() == 2
    assert f"{first.process.pid}) is training here" in second.text()
    first.send(signal.SIGINT)
    first.send(signal.SIGCONT)
    assert first.end() == 130
    assert "the same command resumes" in first.text()
    assert not (folder_of(broken) / "results.json").exists()
    assert 0 < steps_of(broken) < 6

    before = (folder_of(broken) / LAST).read_bytes()
    full = Command(arguments, tmp_path / "2.log", largest_file=100_000)
    assert full.end() == 2
    assert "last.ckpt: cannot be written" in full.text()
    assert "Traceback" not in full.text()
    assert (folder_of(broken) / LAST).read_bytes() == before
    assert not list((folder_of(broken) / LAST).parent.glob(".*"))

    stopped = Command(arguments, tmp_path / "3.log")
    stopped.until(lambda: "it/s" in stopped.text())
    stopped.send(signal.SIGTERM)
    assert stopped.end() == 143
    assert "stopping after this step" in stopped.text()

    kill_after_a_checkpoint(Command(arguments, tmp_path / "4.log"), broken)
    last = Command(arguments, tmp_path / "5.log")
    assert last.end() == 0, last.text()
    assert_equal_ends(straight, broken)
    assert_whole_validations(folder_of(broken))


def _hold(folder: Path, ready: Any) -> None:
    with lock(folder):
        if os.fork() == 0:  # as a worker that loads data: it has the lock, too
            time.sleep(2)
            os._exit(0)
        ready.set()
        time.sleep(600)


def test_lock_refuses_until_the_first_and_its_workers_are_gone(
    tmp_path: Path,
) -> None:
    ready = FORKED.Event()
    first = FORKED.Process(target=_hold, args=(tmp_path, ready))
    first.start()
    assert ready.wait(60)
    with pytest.raises(WSSSError, match=f"another process .* {first.pid}"), lock(tmp_path):
        pass
    first.kill()
    first.join()
    began = time.monotonic()
    with lock(tmp_path):
        assert time.monotonic() - began < 10


def _refine(ready: Any) -> None:
    """As an evaluation does, but never at its end."""
    os.setpgid(0, 0)
    image, prob = np.zeros((16, 16, 3), np.uint8), np.full((2, 16, 16), 0.5, np.float32)
    with CRFPool(CRF_PRESETS["toco"], jobs=2) as pool:
        for labels in [pool.submit(image, prob) for _ in range(8)]:
            labels.result()
        ready.set()
        time.sleep(600)


def test_crf_workers_end_with_a_killed_evaluation() -> None:
    pytest.importorskip("pydensecrf")
    ready = FORKED.Event()
    parent = FORKED.Process(target=_refine, args=(ready,))
    parent.start()
    assert ready.wait(60)
    assert parent.pid is not None
    assert len(processes_of(parent.pid)) > 2
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 10
    while processes_of(parent.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
