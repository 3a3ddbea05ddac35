"""Run folders, checkpoints and hashes of an earlier version are read (before/README.md)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from wsss.cli import main
from wsss.runs.config import config_hash
from wsss.runs.targets import FORMER, MOVED, with_current_targets, with_former_targets

TESTS = Path(__file__).parent
FOLDER = "tkppcl-minivoc-s0-184c47be"
COMMAND = [
    "train",
    "method=tkp_pcl",
    "data=minivoc",
    "backbone.weights=random",
    "+backbone.overrides.embed_dim=24",
    "backbone.overrides.depth=2",
    "budget.crop_size=32",
    "budget.local_size=16",
    "budget.global_batch_size=4",
    "budget.cam_size=32",
    "budget.warmup_steps=2",
    "budget.max_steps=6",
    "budget.eval_every=1",
    "data.limit=8",
    "data.num_workers=0",
    "data.test_splits=[]",
    "eval.crf=null",
    "eval.refine=null",
    "eval.seg_scales=[1.0]",
    "eval.holdout_per_class=0",
    "gallery=0",
    "method.lstm_hidden=4",
    "method.trained_blocks=1",
    "trainer=cpu",
    "trainer.deterministic=true",
    "study=before",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stored run where `COMMAND` looks for it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "before" / FOLDER
    shutil.copytree(TESTS / "before" / FOLDER, folder)
    return folder


def test_a_finished_run_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.json").read_bytes()
    assert main(COMMAND) == 0
    assert f"{run} is finished" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == before


def test_a_checkpoint_gives_the_same_numbers(run: Path) -> None:
    assert main(["eval", f"run={run}", "out=again", "splits=[val]"]) == 0
    ours, stored = (json.loads((f / "results.json").read_text()) for f in (Path("again"), run))
    for key in ("seed_miou", "seg_miou", "image_map"):
        assert ours["splits"]["val"][key] == pytest.approx(stored["splits"]["val"][key], abs=1e-3)
    assert ours["config_hash"] == stored["config_hash"]


def test_an_interrupted_run_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "results.json").unlink()
    ended = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    shutil.copy(TESTS / "before" / "step3.ckpt", run / "checkpoints" / "last.ckpt")
    assert main(COMMAND) == 0
    assert "resuming from" in capsys.readouterr().out
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state, ended, rtol=1e-3, atol=1e-5)
    old = torch.load(TESTS / "before" / "step3.ckpt", weights_only=True)["state_dict"]
    moved = max(float((state[name] - old[name]).abs().max()) for name in state)
    assert moved > 1e-4  # three steps were made


def test_a_report_draws_its_pictures(run: Path) -> None:
    assert main(["report", str(run), "out=page", "gallery=1"]) == 0
    assert "data:image" in Path("page/index.html").read_text()


def test_hashes_of_stored_runs_are_those_of_today() -> None:
    league = TESTS.parent / "experiments" / "league_minivoc" / "results"
    results = [json.loads(path.read_text()) for path in sorted(league.glob("*.json"))]
    # of a second stage the path of its labels is in the hash, and it has been shortened here
    whole = [r for r in results if r["config"]["data"].get("train_masks") in (None, "ground_truth")]
    assert len(whole) == 45
    earlier = json.loads((TESTS / "before" / "configs.json").read_text())
    for runs in (whole, earlier):
        for run in runs:
            assert config_hash(with_current_targets(run["config"])) == run["config_hash"]
        names = {run["config"]["method"]["_target_"].rpartition(".")[2] for run in runs}
        methods = {"ToCo", "GETAM", "TKPPCL", "ClusterCAM", "MoRe", "MCTformerPlus"}
        assert names == methods | {"Segmenter"}
    assert any(with_current_targets(run["config"]) != run["config"] for run in earlier)


def test_targets_move_there_and_back() -> None:
    old = {"a": [{"_target_": name} for name in MOVED], "_target_": "wsss.methods.toco.ToCo"}
    new = with_current_targets(old)
    assert [node["_target_"] for node in new["a"]] == [*MOVED.values()]
    assert with_former_targets(new) == old
    assert len(FORMER) == len(MOVED)
