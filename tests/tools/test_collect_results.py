"""Collected results name no place of the machine that made them, and are read all the same."""

import json
import sys
from pathlib import Path

from runs_on_disk import make_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from collect_results import collect

from wsss.results.search import read_search, write_search


def test_runs_and_searches_lose_their_place(tmp_path: Path) -> None:
    runs = tmp_path / "disk" / "runs"
    config = {"runs_dir": str(runs), "data": {"train_masks": f"{runs}/study/first/labels"}}
    run = make_run(runs / "study" / "toco-s0", config=config)
    search = runs / "searches" / "toco-minivoc-s0"
    lost = {"number": 0, "state": "failed", "by": "overlay", "settings": {"method.lr": 1e-3},
            "run": "trials/toco-s0", "error": f"{search}/trials/000.log says why"}  # fmt: skip
    overrides = ["method=toco", f"runs_dir={runs}", f"hydra.searchpath=['file://{tmp_path}']"]
    write_search(search, {
        "status": "running", "method": "toco", "data": "minivoc", "study": "s", "masks": 24,
        "objective": "seed_miou", "split": "train:holdout:3", "list_sha256": "a" * 64,
        "steps": 9, "planned": 2, "startup": 8, "seed": 0, "searcher": "Optuna",
        "overrides": overrides, "space": {"method.lr": {"low": 1e-4, "high": 1.0}},
        "trials": [lost],
    })  # fmt: skip

    collect([run, search], tmp_path / "out")

    results = json.loads((tmp_path / "out" / "toco-s0.json").read_text())
    assert results["config"]["runs_dir"] == "runs"
    assert results["config"]["data"]["train_masks"] == "study/first/labels"
    assert results["splits"] == json.loads((run / "results.json").read_text())["splits"]
    copied = read_search(tmp_path / "out" / search.name)
    assert copied.overrides == ["method=toco"]
    assert copied.trials[0].error == f"searches/{search.name}/trials/000.log says why"
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in file.read_text()
