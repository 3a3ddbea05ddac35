"""What a run cost: over sessions, on which devices."""

from types import SimpleNamespace

import pytest
import torch

from wsss.runs.costs import CostMeter, training_cost


def session(meter: CostMeter, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """One stretch of training of a given length on a clock of ours."""
    module = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(world_size=2)
    times = iter((100.0, 100.0 + seconds))
    monkeypatch.setattr("wsss.runs.costs.time.perf_counter", lambda: next(times))
    meter.on_train_start(trainer, module)  # type: ignore[arg-type]
    meter.on_train_end(trainer, module)  # type: ignore[arg-type]


def test_hours_add_up_over_resumptions(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = CostMeter(), CostMeter()
    session(first, monkeypatch, 1800)
    second.load_state_dict(first.state_dict())
    session(second, monkeypatch, 3600)
    cost = training_cost(second.state_dict())
    assert cost["train_wall_hours"] == 1.5
    assert cost["train_gpu_hours"] is None, "no GPU was used"
    assert cost["sessions"] == 2
    assert cost["num_devices"] == 2
    assert cost["train_peak_memory_bytes"] > 2**20


def test_gpu_hours_are_of_all_devices() -> None:
    state = {"seconds": 7200.0, "peak": 5, "kind": "GPU memory allocated", "where": "a GPU",
             "devices": 4, "sessions": 1}  # fmt: skip
    assert training_cost(state)["train_gpu_hours"] == 8.0
