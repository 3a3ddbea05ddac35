"""`wsss dashboard` without a server: the page has what the workspace would have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs_on_disk import make_run

from wsss.cli import main
from wsss.results.store import RESULTS_FILE
from wsss.runs.wandb import ID_FILE

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def add_run(
    folder: Path, weight: float, seed: int, *, name: str = ATTACK, **groups: dict[str, Any]
) -> Path:
    """Add a run of a study that varies one weight, with a log."""
    run = make_run(folder / f"toco-w{weight}-s{seed}", seed=seed, quality=0.5 + weight)
    config: dict[str, Any] = {
        "method": {"_target_": "wsss.methods.toco.ToCo", "ptc_weight": weight},
        "study": folder.name, "seed": seed, "gallery": 0, "logger": {"project": "wsss"}, **groups,
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((run / RESULTS_FILE).read_text())
    (run / RESULTS_FILE).write_text(json.dumps(results | {"config": config}))
    logs = run / "logs" / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text(
        f"step,train/ptc_loss,train/lr,val/seg_miou,train/{name}\n"
        f"0,{weight},0.1,,5\n10,{weight + seed},0.2,0.5,6\n"
    )
    return run


def keys_of(specification: Any) -> Iterator[str]:
    """Every key of a history or summary that a workspace's panels name."""
    if isinstance(specification, dict):
        yield from (key for value in specification.values() for key in keys_of(value))
    elif isinstance(specification, list):
        yield from (key for value in specification for key in keys_of(value))
    elif isinstance(specification, str):
        key = specification.removeprefix("summary:")
        if key.startswith(("train/", "val/", "final/val/")) and ATTACK not in key:
            yield key


def test_the_local_page_has_the_keys_of_the_workspace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    runs = [add_run(tmp_path / "s", weight, seed) for weight in (0.2, 0.4) for seed in (0, 1)]
    for run in runs:
        (run / ID_FILE).write_text(run.name)
    assert main(["dashboard", "study=s", f"runs_dir={tmp_path}"]) == 0
    page = (tmp_path / "s" / "dashboard.html").read_text()
    keys = {*keys_of(json.loads((tmp_path / "s" / "dashboard.json").read_text()))}
    assert {"train/ptc_loss", "train/lr", "final/val/seg_miou", "val/seg_miou"} <= keys
    for key in keys:
        last = key.rpartition("/")[2]
        shown = "seconds an image" if last == "seconds_per_image" else last
        assert f">{shown}<" in page or f'"{shown}"' in page or key in page, key
    for group in ("toco ptc_weight=0.2", "toco ptc_weight=0.4"):
        assert f"{group}: losses by step" in page, "grouped by what varies, seeds together"
    assert "CAM threshold curves" in page
    assert "difference to the best, points [95 % interval]" in page
    assert "ToCo, ptc_weight=0.4 (n=2)" in page
    assert "% of the true class" not in page, "no confusions were stored"
    assert "http" not in page
    assert "no W&B key" in capsys.readouterr().out


def test_costs_are_in_the_units_of_their_titles(tmp_path: Path) -> None:
    run = add_run(tmp_path / "s", 0.2, 0)
    results = json.loads((run / RESULTS_FILE).read_text())
    results["cost"] = {"train_wall_hours": 0.25, "train_peak_memory_bytes": 3 * 2**30}
    (run / RESULTS_FILE).write_text(json.dumps(results))
    assert main(["dashboard", "study=s", f"runs_dir={tmp_path}"]) == 0
    page = (tmp_path / "s" / "dashboard.html").read_text()
    assert "training, peak memory (GiB)" in page
    assert "toco: 3, toco" in page
    assert "toco: 0.25, toco" in page


def test_csv_logs_are_enough_and_names_stay_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = add_run(tmp_path / "s", 0.2, 0)
    unfinished = add_run(tmp_path / "s", 0.2, 1)
    (unfinished / RESULTS_FILE).unlink()
    sheets = run / "gallery"
    sheets.mkdir()
    (sheets / "sheet_00.png").write_bytes(b"")
    results = json.loads((run / RESULTS_FILE).read_text())
    metrics = results["splits"]["val"]
    metrics["per_class"]["class"] = ["background", ATTACK, "dog"]
    metrics["confusion"] = {"seed": [[3, 1, 0], [0, 4, 4], [0, 0, 0]]}
    metrics["protocol"]["supervision"] = None
    (run / RESULTS_FILE).write_text(json.dumps(results))
    assert main(["dashboard", "study=s", f"runs_dir={tmp_path}"]) == 0
    assert "no run was logged to W&B" in capsys.readouterr().out
    assert not (tmp_path / "s" / "dashboard.json").exists()
    page = (tmp_path / "s" / "dashboard.html").read_text()
    assert page.count("<img") == 1, "the sheet alone"
    assert 'src="toco-w0.2-s0/gallery/sheet_00.png"' in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<td>25.0</td>" in page
    assert "2 runs" in page
    assert "protocol.supervision is missing" in page, "why they are not compared"
    assert "<th>group</th></tr>" not in page, "no table without a row"


def test_settings_that_end_alike_are_two_columns(tmp_path: Path) -> None:
    for seed, (weight, other) in enumerate(((0.1, 0.2), (0.2, 0.1), (0.2, 0.2))):
        add_run(tmp_path / "s", weight, seed, eval={"ptc_weight": other})
    assert main(["dashboard", "study=s", f"runs_dir={tmp_path}"]) == 0
    page = (tmp_path / "s" / "dashboard.html").read_text()
    for name in ("method.ptc_weight", "eval.ptc_weight"):
        assert f">{name}</th>" in page
    assert "method.ptc_weight=0.1 eval.ptc_weight=0.2" in page


def test_runs_that_are_not_ranked_say_what_differs_in_a_table(tmp_path: Path) -> None:
    run = add_run(tmp_path / "s", 0.2, 0)
    add_run(tmp_path / "s", 0.4, 1)
    results = json.loads((run / RESULTS_FILE).read_text())
    results["splits"]["val"]["protocol"] |= {"iterations": 600, "crop_size": "7" * 100}
    (run / RESULTS_FILE).write_text(json.dumps(results))
    assert main(["dashboard", "study=s", f"runs_dir={tmp_path}"]) == 0
    page = (tmp_path / "s" / "dashboard.html").read_text()
    assert "not ranked: toco; protocols differ" in page
    groups = [f"<td>ToCo, ptc_weight={weight}</td>" for weight in (0.2, 0.4)]
    for value, group in zip((600, 400), groups, strict=True):
        assert f"<tr><th>iterations</th><td>{value}</td>{group}</tr>" in page
    assert "these runs are not ranked" not in page
    assert "allow=[crop_size,iterations]" in page
    assert "7" * 61 not in page, "long values are cut"
