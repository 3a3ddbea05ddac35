"""From a CSV of photographs with three classes and no mask to masks, by the command line."""

import json
import sys
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the generators of small data sets

from trees import CLASSES_OF_PHOTOS, make_coco, make_photos, write_photo_table

import wsss as wsss_package
from wsss.cli import main
from wsss.data.images import read_rgb
from wsss.data.table_module import TableDataModule
from wsss.results.store import read_results
from wsss.runs.folder import load_run

TINY = [
    "method=toco",
    "backbone=vit_pico",
    "backbone.weights=random",
    "budget.crop_size=64",
    "budget.cam_size=64",
    "budget.local_size=16",
    "budget.warmup_steps=1",
    "budget.global_batch_size=2",
    "budget.max_steps=3",
    "budget.eval_every=2",
    "data.num_workers=0",
    "method.decoder_channels=16",
    "eval.seg_scales=[1.0]",
    "trainer=cpu",
    "gallery=2",
]


def wsss(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photographs and the folder of a run trained on them."""
    folder = tmp_path_factory.mktemp("own")
    photos = folder / "mine"
    write_photo_table(photos, make_photos(photos, 12))
    arguments = ["data=table", f"data.root={photos}", f"runs_dir={folder / 'runs'}"]
    assert wsss("train", *TINY, *arguments) == 0
    (run,) = (path.parent for path in (folder / "runs").rglob("results.json"))
    return photos, run


def test_image_level_scores_are_taken_and_no_others(finished: tuple[Path, Path]) -> None:
    _, run = finished
    metrics = read_results(run / "results.json")["splits"]["val"]
    assert 0 <= metrics["image_map"] <= 1
    for key in ("seed_miou", "seed_miou_oracle", "seg_miou", "seg_miou_crf"):
        assert metrics[key] is None, key
    assert metrics["num_images"] == 2
    assert metrics["notes"] == ["no masks: only image-level scores"]
    assert list((run / "gallery").glob("*.png"))


def test_run_records_classes_and_hashes(finished: tuple[Path, Path]) -> None:
    photos, run = finished
    loaded = load_run(run)
    assert loaded.data.class_names == CLASSES_OF_PHOTOS
    recorded = json.loads((run / "data.json").read_text())
    assert isinstance(loaded.data, TableDataModule)
    assert loaded.data.root == photos
    root = recorded.pop("data.root")
    assert root["absolute"] == str(photos)
    assert recorded == loaded.data.fingerprint()
    assert recorded["train"]["images"] + recorded["val"]["images"] == 12
    assert recorded["val"]["masks_sha256"] is None


def test_masks_of_three_classes_are_predicted_without_the_data(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    photos, run = finished
    hidden = photos.with_name("hidden")
    photos.rename(hidden)
    try:
        assert wsss("predict", f"run={run}", f"images={hidden / 'photos'}", f"out={tmp_path}") == 0
    finally:
        hidden.rename(photos)
    for number in range(12):
        with Image.open(tmp_path / f"{number:03}.png") as mask:
            assert mask.size == (56, 48)
            assert np.asarray(mask).max() <= 3
    lines = (tmp_path / "classes.txt").read_text().split()
    assert lines[1::2] == ["background", *CLASSES_OF_PHOTOS]


def test_maps_behind_the_masks_are_written(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pictures of one name in two folders; arrays as Python gives them, and a heat map each."""
    photos, run = finished
    for folder, number in (("a", 0), ("b", 1)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        copy(photos / "photos" / f"{number:03}.jpg", tmp_path / "in" / folder / "same.jpg")
    out = tmp_path / "out"
    given = [f"run={run}", f"images={tmp_path}/in/*/*.jpg", f"out={out}"]
    assert wsss("predict", *given, "cams=both", "soft=both") == 0
    loaded = wsss_package.load_run(run)
    for folder in "ab":
        image = read_rgb(tmp_path / "in" / folder / "same.jpg")
        cams = np.load(out / "cams" / folder / "same.npy")
        soft = np.load(out / "soft" / folder / "same.npy")
        np.testing.assert_array_equal(cams, wsss_package.predict_cams(loaded, image))
        np.testing.assert_array_equal(soft, wsss_package.predict_soft(loaded, image))
        assert soft.shape == (4, 48, 56)
        np.testing.assert_allclose(soft.sum(0), 1, atol=1e-5)
        shown = {"cams": np.flatnonzero(cams.any((1, 2))) + 1, "soft": np.unique(soft.argmax(0))}
        for kind, classes in shown.items():
            drawn = sorted(path.stem for path in (out / kind / folder).glob("*.png"))
            assert drawn == [f"same_{index}" for index in classes if index]
        with Image.open(out / folder / "same.png") as mask:
            np.testing.assert_array_equal(
                np.asarray(mask), wsss_package.predict_mask(loaded, image)
            )
    only = ["predict", f"run={run}", f"images={photos}/photos/002.jpg"]
    assert wsss(*only, f"out={tmp_path / 'one'}", "cams=npy") == 0
    written = sorted(path.name for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert written == ["002.npy", "002.png", "002_overlay.jpg", "classes.txt"]
    capsys.readouterr()
    (tmp_path / "in" / "a").rename(tmp_path / "in" / "cams")
    assert wsss("predict", *given, "cams=npy") == 2
    assert "its mask would lie among the maps" in capsys.readouterr().err
    for wrong, message in (
        ([f"out={photos}/photos"], "masks would lie among the images"),
        ([f"out={tmp_path}/x", "soft=jpg"], "soft=jpg: expected one of npy, png, both"),
    ):
        assert wsss(*only, *wrong) == 2
        assert message in capsys.readouterr().err


def test_a_second_call_finds_the_run_finished(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run = finished
    arguments = ["data=table", f"data.root={photos}", f"runs_dir={run.parents[1]}"]
    assert wsss("train", *TINY, *arguments) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_coco_trains_and_is_evaluated_on_prepared_masks(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", train=5, val=3)
    assert wsss("data", "prepare", "coco", f"root={root}") == 0
    arguments = ["data=coco", f"data.root={root}", f"runs_dir={tmp_path / 'runs'}"]
    assert wsss("train", *TINY, *arguments, "eval.crf=null", "data.eval_batch_size=2") == 0
    (path,) = (tmp_path / "runs").rglob("results.json")
    metrics = read_results(path)["splits"]["val"]
    assert metrics["num_images"] == 2
    assert 0 <= metrics["seg_miou"] <= 1
    assert metrics["protocol"]["label_source"] == "json"
    assert len(metrics["data_sha256"]["masks"]) == 64
