"""Two stages through the command line, pseudo labels of several methods, the upper bound."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsss.cli import main
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.images import read_mask
from wsss.data.train_masks import CARD_FILE
from wsss.evaluation.inference import localise, pseudo_label
from wsss.evaluation.protocol import Protocol
from wsss.maps.pseudo_labels import cam_probabilities, cam_to_label
from wsss.runs.compose import compose_run
from wsss.runs.folder import Run, build_data, build_module, load_run
from wsss.runs.label_writer import Labeller, Soft

SMALL = [
    "backbone.weights=random",
    "+backbone.overrides.embed_dim=48",
    "data.limit=6",
    "data.num_workers=0",
    "data.test_splits=[]",
    "budget.crop_size=48",
    "budget.global_batch_size=4",
    "budget.max_steps=2",
    "trainer=cpu",
    "trainer.deterministic=true",
    "gallery=0",
]
STUDY = [
    "+experiments=tkp_pcl/minivoc",
    *SMALL,
    "budget.warmup_steps=1",
    "second_stage.backbone.weights=random",
    "+second_stage.backbone.overrides.embed_dim=48",
    "second_stage.budget.max_steps=2",
    "second_stage.budget.crop_size=48",
    "second_stage.budget.global_batch_size=4",
]


def _wsss(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


def _run(runs: Path, method: str) -> Path:
    (folder,) = (path.parent for path in runs.rglob("config.yaml") if method in str(path))
    return folder


def _labels(first: Path) -> Path:
    (folder,) = (first / "pseudo_labels").iterdir()
    return folder


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["splits"]["val"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a finished study of two stages."""
    runs = tmp_path_factory.mktemp("runs")
    assert _wsss("train", *STUDY, f"runs_dir={runs}") == 0
    return runs


@pytest.mark.slow
def test_one_command_trains_both_stages(study: Path) -> None:
    first, second = _run(study, "tkppcl"), _run(study, "segmenter")
    card = json.loads((_labels(first) / CARD_FILE).read_text())
    assert (card["status"], card["method"], card["supervision"]) == (
        "finished", "TKP-PCL", "image labels",
    )  # fmt: skip
    data = load_run(first).data.unmasked_dataset("train")
    for name, row in zip(data.names, data.labels, strict=True):
        mask = read_mask(_labels(first) / f"{name}.png", num_classes=8, size=(160, 160))
        assert set(np.unique(mask)) <= {0, *(np.flatnonzero(row) + 1)}
    protocol = _results(second)["protocol"]
    assert protocol["supervision"] == "image labels"
    assert protocol["train_masks"]["run"] == first.name
    assert _results(second)["seg_miou"] is not None
    assert _results(first)["protocol"]["train_masks"] is None


@pytest.mark.slow
def test_repeating_goes_on_between_the_stages(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if stopped while labels were written: two are missing, the second stage is not there."""
    runs = tmp_path / "runs"
    shutil.copytree(study, runs)
    first = _run(runs, "tkppcl")
    labels = _labels(first)
    before = {path.name: path.read_bytes() for path in labels.glob("*.png")}
    for name in sorted(before)[:2]:
        (labels / name).unlink()
    card = json.loads((labels / CARD_FILE).read_text())
    (labels / CARD_FILE).write_text(json.dumps(card | {"status": "begun"}))
    shutil.rmtree(_run(runs, "segmenter"))
    trained = (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert _wsss("train", *STUDY, f"runs_dir={runs}") == 0
    assert "2 images in" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in labels.glob("*.png")} == before
    assert (first / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained
    again = _results(_run(runs, "segmenter"))
    assert again["confusion"] == _results(_run(study, "segmenter"))["confusion"]

    assert _wsss("train", *STUDY, f"runs_dir={runs}") == 0
    assert capsys.readouterr().out.count("is finished") == 3


@pytest.mark.slow
def test_pseudo_labels_are_the_seeds_that_are_scored(study: Path, tmp_path: Path) -> None:
    first, out = _run(study, "tkppcl"), tmp_path / "labels"
    assert _wsss("pseudo", f"run={first}", "eval.crf=null", f"out={out}", "split=val") == 0
    run = load_run(first)
    dataset = run.data.unmasked_dataset("val")
    for index in range(2):
        item = dataset[index]
        labels = item["labels"][None]
        with torch.no_grad():
            cams = localise(run.module, item["image"][None], labels, (160, 160), run.protocol)
        expected = cam_to_label(cams, labels, bg_threshold=0.5)[0].numpy()
        written = read_mask(out / f"{item['name']}.png", num_classes=8)
        assert (written == expected).mean() > 0.999  # equal scores aside


@pytest.mark.slow
def test_other_labels_are_not_mixed_in(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(study, "tkppcl")
    arguments = ["pseudo", f"run={first}", f"out={_labels(first)}"]
    assert _wsss(*arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert _wsss(*arguments, "source=seg") == 2
    assert "another source" in capsys.readouterr().err
    (tmp_path / "mine.png").touch()
    assert _wsss("pseudo", f"run={first}", f"out={tmp_path}") == 2
    assert "not these labels" in capsys.readouterr().err


@pytest.mark.slow
def test_upper_bound_is_recorded_as_pixel_supervision(tmp_path: Path) -> None:
    study = ["+experiments=segmenter/minivoc", *SMALL, f"runs_dir={tmp_path}"]
    assert _wsss("train", *study) == 0
    assert _results(_run(tmp_path, "segmenter"))["protocol"]["supervision"] == PIXEL_MASKS


def _untrained(*overrides: str) -> Run:
    config = compose_run(["data=minivoc", *SMALL, *overrides])
    data = build_data(config)
    torch.manual_seed(0)
    module = build_module(config, data.num_classes).eval()
    return Run(module, data, Protocol(**config["eval"]), config, Path())


@torch.no_grad()
def test_labels_of_other_methods_are_what_the_evaluator_scores() -> None:
    run = _untrained("method=toco", "budget.local_size=16", "eval.refine=null")
    item = run.data.unmasked_dataset("train")[0]
    labels = item["labels"][None]
    cams = localise(run.module, item["image"][None], labels, (160, 160), run.protocol)
    rgb = torch.from_numpy(item["rgb"])[None]
    made = Labeller(run, "cam")(item)
    expected = pseudo_label(None, rgb, cams, labels, run.protocol)
    assert np.array_equal(made, expected[0].numpy())
    assert 255 in made

    soft = Labeller(run, "seg")(item)
    assert isinstance(soft, Soft)
    assert soft.ids.tolist() == [0, *(np.flatnonzero(item["labels"]) + 1)]
    np.testing.assert_allclose(soft.probabilities.sum(0), 1, atol=1e-5)


def test_odds_of_a_map_decide_as_its_threshold_does() -> None:
    cams = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    for threshold in (0.0, 0.3, 0.5, 1.0):
        probabilities = cam_probabilities(cams, labels, bg_threshold=threshold)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 20, 20))
        expected = cam_to_label(cams, labels, bg_threshold=threshold)
        assert torch.equal(probabilities.argmax(1), expected)
    assert probabilities[0, 3].max() == 0
