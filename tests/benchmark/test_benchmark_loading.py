"""`wsss benchmark part=data`: both sides make the same views, and the rates are reported."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss.benchmark.loading import enlarged_minivoc
from wsss.benchmark.plain_views import PLAIN
from wsss.cli import main
from wsss.core.places import config_root
from wsss.data.views.toco import ToCoViews

METHODS = sorted(path.stem for path in (config_root() / "conf" / "method").glob("*.yaml"))
SIZE = 64


def photo() -> Image.Image:
    low = np.random.default_rng(0).integers(20, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((100, 75), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("method", PLAIN)
def test_plain_views_are_crops_of_the_normalised_picture(method: str) -> None:
    random.seed(0)
    torch.manual_seed(0)
    views = PLAIN[method](SIZE)
    for _ in range(5):
        sample = views(photo())
        images = [view for key, view in sample.items() if key != "box"]
        assert all(view.shape == (3, SIZE, SIZE) for view in images)
        assert all(torch.isfinite(view).all() for view in images)
        if "box" in sample:
            r0, r1, c0, c1 = sample["box"].tolist()
            assert 0 <= r0 < r1 <= SIZE
            assert 0 <= c0 < c1 <= SIZE


def test_plain_toco_makes_the_views_that_training_has() -> None:
    ours = ToCoViews(crop_size=SIZE)(np.array(photo()), np.random.default_rng(0))
    plain = PLAIN["toco"](SIZE)(photo())
    assert {key: view.shape for key, view in plain.items()} == {
        key: view.shape for key, view in ours.items()
    }
    # the same distribution: means over many draws agree
    means: dict[str, list[float]] = {"ours": [], "plain": []}
    views = ToCoViews(crop_size=SIZE)
    for number in range(60):
        rgb = np.array(photo())
        means["ours"].append(float(views(rgb, np.random.default_rng(number))["view2"].mean()))
        means["plain"].append(float(PLAIN["toco"](SIZE)(photo())["view2"].mean()))
    difference = np.mean(means["ours"]) - np.mean(means["plain"])
    assert abs(difference) < 4 * np.std(means["ours"]) / np.sqrt(60) * np.sqrt(2)


def test_command_reports_every_method_and_writes_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        photo().save(tmp_path / f"{number}.jpg")
    out = tmp_path / "loading.json"
    options = [f"image_size={SIZE}", "repeats=2", f"images={tmp_path}", f"out={out}"]
    assert main(["benchmark", "part=data", *options]) == 0
    summary = json.loads(out.read_text())
    timed = [result["method"] for result in summary["methods"]]
    assert {*METHODS} - {*timed} == {"segmenter", "segmenter_vit"}  # which train on masks
    for result in summary["methods"]:
        rates = result["images_per_second_fastest"]
        assert rates["ours"] > 0
        assert len(result["seconds"]["ours"]) == 2
        if result["method"] in PLAIN:
            assert result["ratio_fastest"] == pytest.approx(rates["ours"] / rates["plain"])
    assert "images/s and core" in " ".join(capsys.readouterr().out.split())


def test_the_built_in_pictures_have_vocs_usual_size() -> None:
    with enlarged_minivoc(2) as paths:
        assert [Image.open(path).size for path in paths] == [(500, 375)] * 2
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["part=dta", "method=toco"], "part=dta: expected step or crf or data or pce"),
        (["part=data", "method=tocco"], "expected one of"),
        (["part=data", "count=0"], "must be at least 1"),
        (["part=data", "batch_size=2"], "batch_size: unknown key"),
        (["part=data", "images=nowhere"], "nowhere is missing; expected a folder of images"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1
