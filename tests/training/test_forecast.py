"""What a training says of its length after its first steps, on a clock of the test."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsss.runs.compose import compose_run
from wsss.runs.prepare import prepare
from wsss.training.forecast import Forecast, forecast_of
from wsss.training.trainer import build_trainer


def trained(
    *, steps: range, seconds: float, device: str = "cpu", accumulated: int = 1, validated: float = 0
) -> Forecast:
    """Steps of equal length, the first one five times as long, the callback's hooks as Lightning's.

    Args:
        steps: from the one that is resumed to the last.
        seconds: of a step.
        device: of the module.
        accumulated: batches a step.
        validated: seconds of a validation after every step.
    """
    now = [0.0]
    forecast = Forecast(
        crops="4 crops of 448 px", advice=lambda: "experiment=toco/small is a start"
    )
    forecast._clock = lambda: now[0]
    trainer: Any = SimpleNamespace(
        global_step=steps.start, max_steps=steps.stop, progress_bar_callback=None
    )
    module = SimpleNamespace(device=torch.device(device))
    forecast.on_train_start(trainer, module)
    for step in steps:
        for batch in range(accumulated):
            now[0] += (5 if step == steps.start else 1) * seconds / accumulated
            trainer.global_step += batch == accumulated - 1
            forecast.on_train_batch_end(trainer, module, None, None, batch)
        if validated:
            forecast.on_validation_start(trainer, module)
            now[0] += validated
            forecast.on_validation_end(trainer, module)
    return forecast


def test_slow_steps_are_reported_after_the_second(capsys: pytest.CaptureFixture[str]) -> None:
    trained(steps=range(4000), seconds=36)
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert "3,998 of 4,000 steps are left: about 1 d 16 h on " in said.out
    assert "36 s a step of 4 crops of 448 px" in said.out
    assert said.err.startswith("warning: that is long for a CPU")
    assert " experiment=toco/small is" in said.err


@pytest.mark.parametrize(("accumulated", "validated"), [(1, 0), (3, 0), (1, 7.0)])
def test_resumed_runs_count_what_is_left(
    accumulated: int, validated: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of several batches are one, and validations are no part of them."""
    trained(steps=range(1000, 2000), seconds=0.5, accumulated=accumulated, validated=validated)
    said = capsys.readouterr()
    assert "987 of 2,000 steps are left: about 8 min" in said.out
    assert "0.5 s a step" in said.out
    assert not said.err


@pytest.mark.parametrize("steps", [range(4), range(13)])
def test_short_trainings_pass_silently(steps: range, capsys: pytest.CaptureFixture[str]) -> None:
    trained(steps=steps, seconds=0.5)
    assert capsys.readouterr().out == ""


def test_other_processes_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    trained(steps=range(4000), seconds=36)
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_gpus_are_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    trained(steps=range(4000), seconds=36, device="cuda")
    said = capsys.readouterr()
    assert " on a GPU (" in said.out
    assert not said.err


OVERLAYS = {
    "data=minivoc method=getam backbone=deit_base": "getam/minivoc",
    "+experiments=tkp_pcl/photos data.root=x": "tkp_pcl/small",
    "data=table data.root=x method=weclip method.text=random": "toco/small",
}


@pytest.mark.parametrize("line", OVERLAYS)
def test_the_named_start_exists_and_fits_the_data(line: str) -> None:
    run: Any = SimpleNamespace(config=compose_run(line.split()))
    assert forecast_of(run).advice().startswith(f"experiment={OVERLAYS[line]} is a start")


@pytest.mark.parametrize(
    "line", ["+experiments=toco/minivoc seed=3", "+experiments=toco/small data.root=x"]
)
def test_a_small_start_is_not_advised_to_start_itself(line: str) -> None:
    run: Any = SimpleNamespace(config=compose_run(line.split()))
    assert forecast_of(run).advice() == "a smaller budget.max_steps= is over sooner"


def test_every_training_has_a_forecast(tmp_path: Path) -> None:
    line = "data=minivoc trainer=cpu backbone.weights=random data.limit=8 eval.crf=null"
    run = prepare(compose_run([*line.split(), f"runs_dir={tmp_path}"]))
    (forecast,) = [c for c in build_trainer(run).callbacks if isinstance(c, Forecast)]
    assert forecast.crops == "8 crops of 96 px"
