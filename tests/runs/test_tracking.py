"""Offline runs are read back: what should reach Weights & Biases is in their files."""

import http.server
import json
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from offline import Offline, read_offline
from PIL import Image
from small_runs import Command

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.results.store import read_results
from wsss.runs.compose import compose_run
from wsss.runs.config import LoggerConfig
from wsss.runs.naming import varying
from wsss.runs.wandb import has_key, run_id, wandb_run

wandb = pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")

TINY = [
    "data=minivoc",
    "backbone.weights=random",
    "+backbone.overrides.embed_dim=48",
    "backbone.overrides.depth=4",
    "budget.max_steps=2",
    "budget.eval_every=2",
    "budget.crop_size=64",
    "budget.cam_size=64",
    "eval.single_resize=64",
    "budget.local_size=16",
    "budget.warmup_steps=1",
    "budget.global_batch_size=2",
    "data.limit=4",
    "data.num_workers=0",
    "data.test_splits=[]",
    "method.decoder_channels=16",
    "eval.seg_scales=[1.0]",
    "eval.crf=null",
    "eval.holdout_per_class=0",
    "trainer.accelerator=cpu",
    "study=pair",
]
WANDB = "logger=wandb"
TOCO = ["method=toco", "method.seg_after=0", "trainer.log_every_n_steps=1", "gallery=2"]
RUNS = {
    "toco": [*TOCO, WANDB],
    "tagged": [
        *TOCO,
        "logger=[csv,tensorboard,wandb]",
        "method.ptc_weight=0.4",
        "logger.tags=[mine]",
        "logger.checkpoints=true",
    ],
    # of fewer steps than lie between two logged ones
    "clustercam": ["method=clustercam", "method.seg_from_epoch=0", "gallery=0", WANDB],
}


def _without_key(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    patch.setenv("WANDB_SILENT", "true")


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_key(monkeypatch, tmp_path / "home")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three offline runs of one study, trained one after the other in this process."""
    runs = tmp_path_factory.mktemp("runs")
    folders: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        _without_key(patch, runs / "home")
        for name, settings in RUNS.items():
            assert main(["train", *TINY, *settings, f"runs_dir={runs}"]) == 0
            (folders[name],) = {p.parent for p in runs.rglob("config.yaml")} - {*folders.values()}
    wandb.teardown()  # ends the writing process, so that the files are complete
    return folders


@pytest.fixture(scope="module")
def offline(study: dict[str, Path]) -> dict[str, Offline]:
    return {name: read_offline(folder) for name, folder in study.items()}


def test_a_run_says_what_it_is(study: dict[str, Path], offline: dict[str, Offline]) -> None:
    for name, folder in study.items():
        (run,) = offline[name].runs
        assert run.run_id == run_id(folder)
        assert json.loads(offline[name].config["run_folder"]) == folder.name
        assert (run.project, run.job_type) == ("wsss", "train")
        assert offline[name].exits == [0]
    names = [(offline[name].runs[0].display_name, offline[name].runs[0].run_group) for name in RUNS]
    assert names == [
        ("toco minivoc seed=0", "pair: toco"),
        # the folder of the first is there by then
        ("toco minivoc ptc_weight=0.4 seed=0", "pair: toco ptc_weight=0.4"),
        ("clustercam minivoc seed=0", "pair: clustercam"),
    ]
    assert "ptc_weight=0.4" in offline["tagged"].runs[0].tags
    tags = list(offline["toco"].runs[0].tags)
    assert tags == ["toco", "minivoc", "vit_tiny_patch16_224", "image labels"]
    assert "mine" in offline["tagged"].runs[0].tags
    config = offline["tagged"].config
    assert json.loads(config["method"])["ptc_weight"] == 0.4
    assert json.loads(config["method_name"]) == "toco"
    assert json.loads(config["supervision"]) == "image labels"
    assert json.loads(config["pretraining"]) == "none (random weights)"


def test_losses_and_learning_rates_are_logged_step_by_step(offline: dict[str, Offline]) -> None:
    rows = [row for row in offline["toco"].rows if "train/ptc_loss" in row]
    assert [row["trainer/global_step"] for row in rows] == ["0", "1"]
    assert {"train/seg_loss", "train/ctc_loss", "train/lr", "train/lr_heads"} <= set(rows[1])
    assert float(rows[1]["train/lr_heads"]) == pytest.approx(10 * float(rows[1]["train/lr"]))
    assert {"train/mixing_00", "train/mixing_03"} <= offline["clustercam"].keys
    rows = [row for row in offline["clustercam"].rows if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == ["0", "1"], "the first and the last"
    assert "train/ptc_loss" not in offline["clustercam"].keys, "another run of the same process"


def test_tensorboard_has_what_wandb_has(
    study: dict[str, Path], offline: dict[str, Offline]
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(study["tagged"] / "tensorboard"))
    found.Reload()
    rows = [row for row in offline["tagged"].rows if "train/loss" in row]
    logged = [(str(e.step), pytest.approx(e.value)) for e in found.Scalars("train/loss")]
    assert [(row["trainer/global_step"], float(row["train/loss"])) for row in rows] == logged
    (final,) = found.Scalars("final/val/seg_miou")
    metrics = read_results(study["tagged"] / "results.json")["splits"]["val"]
    assert final.value == pytest.approx(metrics["seg_miou"])


def test_final_numbers_are_those_of_the_results(
    study: dict[str, Path], offline: dict[str, Offline]
) -> None:
    results = read_results(study["toco"] / "results.json")
    metrics, summary = results["splits"]["val"], offline["toco"].summary
    for key, value in {
        "final/val/seg_miou": metrics["seg_miou"],
        "final/val/seed_miou_oracle": metrics["seed_miou_oracle"],
        "final/val/maps/seed/over": metrics["maps"]["seed"]["over"],
        "final/cost/train_wall_hours": results["cost"]["train_wall_hours"],
    }.items():
        assert float(summary[key]) == pytest.approx(value), key
    assert not [key for key in summary if key.startswith("final/val/protocol")]


def test_threshold_curve_is_a_history_over_its_own_axis(
    study: dict[str, Path], offline: dict[str, Offline]
) -> None:
    curve = read_results(study["toco"] / "results.json")["splits"]["val"]["seed_curve"]
    rows = [row for row in offline["toco"].rows if "curve/val/threshold" in row]
    assert [float(row["curve/val/threshold"]) for row in rows] == curve["thresholds"]
    assert [float(row["curve/val/seed_miou"]) for row in rows] == pytest.approx(curve["miou"])
    assert offline["toco"].metrics["curve/val/seed_recall"] == "curve/val/threshold"


def test_tables_hold_classes_and_pixels(study: dict[str, Path]) -> None:
    metrics = read_results(study["toco"] / "results.json")["splits"]["val"]
    media = "wandb/offline-run-*/files/media/table"
    (table,) = study["toco"].glob(f"{media}/tables/val/per_class_*.table.json")
    content = json.loads(table.read_text())
    ious = [row[content["columns"].index("seed_iou")] for row in content["data"]]
    # there is none where a class is neither seen nor predicted
    stored = [math.nan if iou is None else iou for iou in metrics["per_class"]["seed_iou"]]
    assert ious == pytest.approx(stored, nan_ok=True)
    (table,) = study["toco"].glob(f"{media}/confusion/val/seg_table_*.table.json")
    pixels = json.loads(table.read_text())["data"]
    assert sum(count for *_, count in pixels) == sum(map(sum, metrics["confusion"]["seg"]))
    assert pixels[1] == ["background", "bottle", metrics["confusion"]["seg"][0][1]]


def test_gallery_has_label_maps_as_overlays(
    study: dict[str, Path], offline: dict[str, Offline]
) -> None:
    (row,) = [row for row in offline["toco"].rows if "gallery/images._type" in row]
    assert json.loads(row["gallery/images.count"]) == 2
    for masks in json.loads(row["gallery/images.all_masks"]):
        assert set(masks) == {"pseudo_label", "prediction", "truth"}
        (file,) = study["toco"].glob(f"wandb/offline-run-*/files/{masks['truth']['path']}")
        with Image.open(file) as mask:
            assert mask.size == (160, 160)
    assert "gallery/sheets" in offline["toco"].keys
    assert "gallery/images" not in offline["clustercam"].keys


def test_code_configuration_and_checkpoints_are_artifacts(
    study: dict[str, Path], offline: dict[str, Offline]
) -> None:
    stored = {a.type: {e.path for e in a.manifest.contents} for a in offline["toco"].artifacts}
    assert stored["config"] == {"config.yaml"}
    assert {"training/run.py", "methods/toco/method.py"} <= stored["code"]
    assert "model" not in stored, "only on request"
    (model,) = [a for a in offline["tagged"].artifacts if a.type == "model"]
    (entry,) = model.manifest.contents
    assert entry.local_path == str(study["tagged"] / "checkpoints" / "last.ckpt"), "not a copy"


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    """Every step is there once, in two sessions of one id."""
    steps = ["budget.max_steps=6", "gallery=0", f"runs_dir={tmp_path}"]
    command = ["train", *TINY, WANDB, "method=clustercam", "trainer.log_every_n_steps=1", *steps]
    stopped = Command(command, tmp_path / "1.log")
    stopped.until(lambda: any(tmp_path.rglob("last.ckpt")))
    stopped.send(signal.SIGTERM)
    assert stopped.end() == 143, stopped.text()
    resumed = Command(command, tmp_path / "2.log")
    assert resumed.end() == 0, resumed.text()
    (config,) = tmp_path.rglob("config.yaml")
    found = read_offline(config.parent)
    assert [run.run_id for run in found.runs] == [run_id(config.parent)] * 2
    rows = [row for row in found.rows if "train/loss" in row]
    assert [int(row["trainer/global_step"]) for row in rows] == list(range(6))
    validated = [row["trainer/global_step"] for row in found.rows if "val/seg_miou" in row]
    assert len(validated) == len(set(validated))
    assert found.exits[-1] == 0


def test_system_metrics_are_sampled(offline: dict[str, Offline]) -> None:
    assert "proc.memory.rssMB" in offline["toco"].statistics


def test_a_run_that_failed_is_marked(tmp_path: Path) -> None:
    config = compose_run([*TINY, WANDB, "method=toco", "logger.group=g", "logger.job_type=j"])
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(WSSSError), wandb_run(config, tmp_path):
        raise WSSSError("astray")
    wandb.teardown()
    found = read_offline(tmp_path)
    assert found.exits == [1]
    assert (found.runs[0].run_group, found.runs[0].job_type) == ("g", "j")


def _specified(study: Path) -> tuple[dict[str, Any], set[str]]:
    """A study's workspace, and every string in its panels that names a key."""
    assert main(["dashboard", "study=pair", f"runs_dir={study.parent}"]) == 0
    section = json.loads((study / "dashboard.json").read_text())["section"]
    starts = ("train/", "val/", "final/", "curve/", "tables/", "confusion/", "gallery/")

    def strings(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (text for value in node.values() for text in strings(value))
        elif isinstance(node, list):
            yield from (text for value in node for text in strings(value))
        elif isinstance(node, str):
            yield node.removeprefix("summary:")

    titles = {"chartTitle", "name"}
    panels = [
        {key: value for key, value in panel["config"].items() if key not in titles}
        for one in section["panelBankConfig"]["sections"]
        for panel in one["panels"]
    ]
    return section, {text for text in strings(panels) if text.startswith(starts)}


def test_every_key_of_a_dashboard_was_logged(
    study: dict[str, Path], offline: dict[str, Offline], capsys: pytest.CaptureFixture[str]
) -> None:
    section, keys = _specified(study["toco"].parent)
    assert keys <= set().union(*(one.keys for one in offline.values()))
    assert "no W&B key" in capsys.readouterr().out
    wanted = {
        "val/seg_miou",
        "final/val/seg_miou",
        "final/val/seed_miou_oracle",
        "final/val/maps/seg/over",
        "final/val/maps/seed/precision",
        "curve/val/seed_miou",
        "curve/val/threshold",
        "train/ptc_loss",
        "train/patch_loss",
        "train/lr_heads",
        "train/mixing_00",
        "tables/val/per_class",
        "confusion/val/seg_table",
        "gallery/images",
        "final/cost/train_wall_hours",
    }
    assert wanted <= keys
    names = [one["name"] for one in section["panelBankConfig"]["sections"]]
    assert {"Losses of toco", "Losses of clustercam"} <= set(names)
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == [
        "method_name.value",
        "method.value.ptc_weight",
    ]
    config = offline["tagged"].config
    assert "method_name" in config
    assert "ptc_weight" in json.loads(config["method"])
    assert json.dumps(runs["filters"]).count('"pair"') == 1
    tables, *_ = section["panelBankConfig"]["sections"]
    text = tables["panels"][1]["config"]["value"]
    assert "| metric | ToCo, ptc_weight=0.2 (n=1) | ToCo, ptc_weight=0.4 (n=1) |" in text
    assert "95 % interval" in text
    lines = [panel["config"] for one in section["panelBankConfig"]["sections"]
             for panel in one["panels"] if "Line" in panel["viewType"]]  # fmt: skip
    assert {(one["groupAgg"], one["groupArea"]) for one in lines} == {("mean", "stddev")}


def test_settings_that_vary_are_named_once_and_seeds_never() -> None:
    common = [*TINY, "method=toco"]
    configs = [
        compose_run([*common, f"seed={seed}", f"method.low_threshold={low}", f"runs_dir=r{seed}"])
        for seed in (0, 1)
        for low in (0.2, 0.3)
    ]
    # eval.cam_low is read from it
    assert varying(configs) == ["method.low_threshold"]
    other = compose_run([*TINY, "method=clustercam"])
    assert varying([configs[0], other]) == []


def test_dashboard_of_a_study_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", "study=none", f"runs_dir={tmp_path}"]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["dashboard", "study=empty", f"runs_dir={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sync_without_a_key_is_one_line(
    study: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", str(study["toco"].parent)]) == 2
    error = capsys.readouterr().err
    assert "3 offline runs wait" in error
    assert "WANDB_API_KEY" in error
    assert error.count("\n") == 1


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server that lets nobody in, and remembers what was asked."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append(content.decode(errors="replace"))
        self.send_response(401)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_sync_hands_the_runs_to_wandb_and_tells_what_was_refused(
    study: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert main(["sync", str(study["toco"])]) == 2
        server.shutdown()
    assert any(run_id(study["toco"]) in request for request in _Refusing.asked)
    assert "1 of 1 runs were not uploaded" in capfd.readouterr().err


def test_sync_leaves_out_what_is_up_and_names_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = tmp_path / "study" / "run" / "wandb" / "offline-run-1-a"
    session.mkdir(parents=True)
    (session / "run-a.wandb").touch()
    (session / "run-a.wandb.synced").touch()
    assert main(["sync", str(tmp_path)]) == 0
    assert "nothing waits" in capsys.readouterr().out
    assert main(["sync", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_tags_that_wandb_would_refuse_are_told_at_once() -> None:
    with pytest.raises(WSSSError, match=r"logger\.tags.*65 characters"):
        LoggerConfig(tags=["x" * 65])


def test_the_id_stays_with_the_folder(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first


def test_a_key_is_found_in_the_environment_or_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_key()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine example.org login user password x\n")
    assert not has_key()
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (home / ".netrc").chmod(0o600)
    assert has_key()
    (home / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()
