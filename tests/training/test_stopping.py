"""The group ``callbacks``: stopped by the holdout, averaged weights, custom classes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_runs import PLAIN, SMALL

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.evaluation.ledger import past_readings
from wsss.runs.compose import compose_run
from wsss.runs.config import config_hash
from wsss.runs.folder import load_run
from wsss.runs.prepare import prepare
from wsss.training.trainer import build_trainer, fit

TINY = [
    "method=toco",
    *SMALL,
    *PLAIN,
    "method.decoder_channels=16",
    "budget.warmup_steps=1",
    "budget.max_steps=6",
    "budget.eval_every=1",
    "data.limit=4",
    "trainer.enable_progress_bar=false",
]
#: the first validation is the best: no number grows by 90 points
STOPPING = [
    "callbacks=[early_stopping,lr_monitor]",
    "callbacks.early_stopping.patience=2",
    "callbacks.early_stopping.min_delta=0.9",
    "eval.holdout_per_class=1",
]
CUSTOM = """
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

class Count(Callback):
    waited = []  # as a checkpoint has it when a step begins

    def __init__(self, factor: int = 1, **further):
        self.factor, self.seen = factor, 0

    def on_train_batch_start(self, trainer, *_):
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if path.is_file():
            states = torch.load(path, weights_only=True)["callbacks"]
            self.waited += [s["wait_count"] for key, s in states.items() if "Early" in key]

    def on_train_batch_end(self, *_):
        self.seen += self.factor

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A custom class that can be imported."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "counting.py").write_text(CUSTOM)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("counting", None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that the holdout stopped, with a custom callback."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", *TINY, *STOPPING, "+callbacks.n._target_=counting.Count",
                 "+callbacks.n.factor=10", f"runs_dir={runs}"]) == 0  # fmt: skip
    (config,) = runs.rglob("config.yaml")
    return config.parent


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def state_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def test_a_run_that_the_holdout_stopped_says_so(stopped: Path) -> None:
    found = results(stopped)
    assert found["status"] == "finished"
    assert found["stopped_early"] == {"monitor": "holdout/seed_miou", "step": 3}
    card = found["splits"]["val"]["protocol"]
    assert card["iterations"] == 3
    assert card["selection"] == "last checkpoint, stopped early on holdout/seed_miou (patience 2)"
    readings = [(e["split"], e["step"]) for e in past_readings(stopped) if "early" in e["purpose"]]
    assert readings == [("holdout", 1), ("holdout", 2), ("holdout", 3)]


def test_a_killed_run_has_counted_every_look(stopped: Path) -> None:
    """The first validation is the best, the second the first in vain, the third ends the run."""
    assert sys.modules["counting"].Count.waited == [0, 1]


def test_a_stopped_run_trains_no_further_and_keeps_its_state(stopped: Path) -> None:
    before = state_of(stopped)
    assert before["callbacks"]["Count"] == {"seen": 30}
    (stopped / "results.json").unlink()  # as if killed before the scores
    assert main(["train", *TINY, *STOPPING, "+callbacks.n._target_=counting.Count",
                 "+callbacks.n.factor=10", f"runs_dir={stopped.parents[1]}"]) == 0  # fmt: skip
    after = state_of(stopped)
    assert after["global_step"] == 3
    assert after["callbacks"]["Count"] == {"seen": 30}
    assert results(stopped)["stopped_early"]["step"] == 3


def test_a_custom_class_of_a_stored_run_needs_trust(stopped: Path) -> None:
    with pytest.raises(WSSSError, match=r"trust=\[counting\]"):
        load_run(stopped)
    run = load_run(stopped, trust=["counting"])
    assert run.stopped == {"monitor": "holdout/seed_miou"}
    assert run.unfinished == ""


def test_averaged_weights_are_saved_and_scored(tmp_path: Path) -> None:
    """A decay of one keeps the weights as they were after the first step."""
    line = ["callbacks=weight_averaging", "callbacks.weight_averaging.decay=1.0"]
    steps = ["budget.max_steps=3", "budget.eval_every=3", "trainer.limit_val_batches=0"]
    run = prepare(compose_run([*TINY, *steps, *line, f"runs_dir={tmp_path}"]))
    trainer = build_trainer(run)
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            kept.append({name: p.detach().clone() for name, p in module.named_parameters()})

    trainer.callbacks.insert(0, Keep())  # type: ignore[attr-defined]
    fit(run, trainer)
    saved, now = state_of(run.folder)["state_dict"], dict(run.module.named_parameters())
    assert any(not torch.equal(kept[0][name], kept[2][name]) for name in kept[0])
    for name, value in kept[0].items():
        assert torch.equal(value, now[name]), name
        assert torch.equal(value, saved[name]), name


def test_what_watches_makes_no_other_run() -> None:
    plain = config_hash(compose_run(TINY))
    watched = ["callbacks=[lr_monitor,device_stats]", "trainer.enable_model_summary=true"]
    assert config_hash(compose_run([*TINY, *watched])) == plain
    assert config_hash(compose_run([*TINY, "callbacks=weight_averaging"])) != plain


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([*STOPPING, "callbacks.early_stopping.monitor=val/seg_miou"], "of the declared holdout"),
        ([*STOPPING, "eval.holdout_per_class=0"], "no holdout is declared"),
        ([*STOPPING, "callbacks.early_stopping.mode=min"], "these numbers grow"),
        ([*STOPPING, "callbacks.early_stopping.patienc=1"], "callbacks.early_stopping.patience?"),
        (["+callbacks.a._target_=io.FileIO"], "expected a Callback"),
        (["+callbacks.a.b=1"], "callbacks.a: expected a class"),
        (["+callbacks.n._target_=counting.Count", "+callbacks.n.factor=x"], "factor='x': expected"),
    ],
)
def test_callbacks_are_checked_before_data_is_touched(line: list[str], message: str) -> None:
    line = line[:3] + line[4:] if line[-1].startswith("eval.holdout") else line
    with pytest.raises(WSSSError) as refused:
        compose_run([*TINY, *line, "data.root=nowhere"])
    assert message in str(refused.value)
