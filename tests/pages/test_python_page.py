"""docs/python.md does what it says, and ``import wsss`` offers what it lists."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import wsss
from wsss.cli import main

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "python.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names after all blocks of the page were run in one process."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for number, block in enumerate(BLOCK.findall(PAGE)):
            exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
        yield names


@pytest.mark.slow
def test_plain_trainer_fits_and_watches(notebook: dict[str, Any]) -> None:
    assert notebook["trainer"].global_step == 4
    assert 0 <= notebook["numbers"]["seg_miou"] <= 1
    step, watched = notebook["watcher"].history[-1]
    assert step == 4
    assert watched["seed_miou"] == notebook["numbers"]["seed_miou"]


@pytest.mark.slow
def test_loaded_run_predicts_an_image_as_a_folder(notebook: dict[str, Any]) -> None:
    run, image = notebook["run"], notebook["image"]
    assert run.step == 4
    assert notebook["masks"].keys() == {"0", "1"}
    np.testing.assert_array_equal(wsss.predict_mask(run, image), notebook["masks"]["0"])
    assert notebook["masks"]["0"].shape == image.shape[:2]
    assert notebook["masks"]["0"].dtype == np.uint8


@pytest.mark.slow
def test_an_open_image_and_a_file_are_as_their_array(
    notebook: dict[str, Any], tmp_path: Path
) -> None:
    run, image, path = notebook["run"], notebook["image"], tmp_path / "one.png"
    turned = Image.fromarray(np.rot90(image))
    turned.getexif()[ExifTags.Base.Orientation] = 6  # the camera was held upright
    turned.save(path, exif=turned.getexif())
    expected = wsss.predict_mask(run, image)
    for given in (path, str(path), Image.open(path), Image.fromarray(image)):
        np.testing.assert_array_equal(wsss.predict_mask(run, given), expected)
    wrong = [(torch.zeros(3, 4, 4), "a Tensor"), (image[:0], r"a uint8 array \(0,")]
    wrong += [(image[..., 0], "a uint8 array"), (tmp_path / "no.png", "no.png is missing")]
    for given, message in wrong:
        with pytest.raises(wsss.WSSSError, match=message):
            wsss.predict_soft(run, given)


@pytest.mark.slow
def test_cams_are_of_the_named_classes_alone(notebook: dict[str, Any]) -> None:
    known, names = notebook["known"], list(notebook["run"].data.class_names)
    assert known.shape == (8, *notebook["image"].shape[:2])
    assert known.min() >= 0
    assert known.max() <= 1
    shown = {name for name, cam in zip(names, known, strict=True) if cam.any()}
    assert shown == {"car", "person"}
    with pytest.raises(wsss.WSSSError, match="persn: unknown class; did you mean person"):
        wsss.predict_cams(notebook["run"], notebook["image"], ["persn"])
    with pytest.raises(wsss.WSSSError, match=r"expected uint8 \(height, width, 3\)"):
        wsss.predict_mask(notebook["run"], notebook["image"] / 255)


@pytest.mark.slow
def test_score_leaves_the_runs_own_numbers_alone(notebook: dict[str, Any]) -> None:
    stored = notebook["folders"][0] / "results.json"
    assert _thresholds(stored.read_text()) == [0.5]
    (other,) = (notebook["folders"][0] / "eval").rglob("results.json")
    assert _thresholds(other.read_text()) == [0.3]
    assert notebook["results"]["splits"]["val"]["protocol"]["cam_threshold"] == 0.3


def _thresholds(text: str) -> list[float]:
    return [float(value) for value in re.findall(r'"seed_threshold": ([\d.]+)', text)]


@pytest.mark.slow
def test_maps_in_memory_have_numpys_numbers(notebook: dict[str, Any]) -> None:
    found, truth = notebook["found"], np.stack(notebook["truth"])
    masks = np.stack(list(notebook["masks"].values()))
    matrix = np.zeros((9, 9), np.int64)
    valid = truth != 255
    np.add.at(matrix, (truth[valid], masks[valid]), 1)
    assert found["confusion"]["seg"] == matrix.tolist()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    occurs = matrix.sum(1) > 0
    expected = (matrix.diagonal() / np.maximum(union, 1))[occurs].mean()
    assert found["seg_miou"] == pytest.approx(expected)
    assert notebook["seeds"]["seed_threshold"] == 0.4
    assert notebook["seeds"]["seed_miou_oracle"] >= notebook["seeds"]["seed_miou"]


@pytest.mark.slow
def test_frame_has_a_row_a_run(notebook: dict[str, Any]) -> None:
    frame = notebook["frame"]
    assert list(frame["seed"]) == [0, 1]
    assert list(frame["folder"]) == [str(folder) for folder in notebook["folders"]]
    assert set(frame["group"]) == {"ToCo"}
    assert frame["seg_miou"].between(0, 1).all()


@pytest.mark.slow
def test_compare_refuses_options_in_the_commands_words(
    notebook: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = notebook["folders"]
    with pytest.raises(wsss.WSSSError, match="metrc: unknown key; did you mean metric"):
        wsss.compare(folders, metrc="seed_miou")
    with pytest.raises(wsss.WSSSError, match="resamples='many': expected int"):
        wsss.compare(folders, resamples="many")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(wsss.WSSSError, match="pip install pandas"):
        notebook["comparison"].frame()


@pytest.mark.slow
def test_train_takes_a_configuration_too(
    notebook: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = notebook["run"].config
    assert wsss.train(config) == notebook["folders"][0]
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(wsss.WSSSError, match=r"method\.lr=-1"):
        wsss.train({**config, "method": {**config["method"], "lr": -1}})


@pytest.mark.parametrize(
    ("key", "value"), [("ptc_weight", -1), ("lr", 0), ("seg_after", 2), ("scales", [])]
)
def test_wrong_setting_has_the_commands_words(
    key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(wsss.WSSSError) as caught:
        wsss.ToCoSettings(max_steps=4, **{key: value})
    arguments = ["train", "method=toco", "data=minivoc", f"method.{key}={value}"]
    try:
        status = main(arguments)
    except SystemExit as leave:
        status = int(leave.code or 0)
    assert status == 2
    assert capsys.readouterr().err.strip() == f"wsss train: {caught.value}"


def test_maps_that_do_not_fit_are_named() -> None:
    mask = np.zeros((4, 6), np.uint8)
    with pytest.raises(wsss.WSSSError, match="differ in number"):
        wsss.evaluate_maps([mask], [mask, mask], ["cat"])
    with pytest.raises(wsss.WSSSError, match="no map to score"):
        wsss.evaluate_maps([], [], ["cat"])
    with pytest.raises(wsss.WSSSError, match="size"):
        wsss.evaluate_maps([mask[:2]], [mask], ["cat"])
    with pytest.raises(wsss.WSSSError, match=r"\(1, h, w\)"):
        wsss.evaluate_maps([np.zeros((2, 4, 6))], [mask], ["cat"])
    with pytest.raises(wsss.WSSSError, match="class id 7"):
        wsss.evaluate_maps([mask + 7], [mask], ["cat"])
    with pytest.raises(wsss.WSSSError, match="kind=boundary"):
        wsss.evaluate_maps([mask], [mask], ["cat"], kind="boundary")


def test_import_is_light() -> None:
    code = (
        "import sys, wsss; dir(wsss); wsss.WSSSError; "
        "print({'torch', 'lightning', 'hydra', 'timm', 'numpy'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found.strip() == "set()"


def test_page_and_stub_list_the_public_names() -> None:
    names = {*wsss.__all__} - {"__version__"}
    table = PAGE.partition("## 1.")[0]
    assert {name for name in re.findall(r"`(\w+)`", table) if hasattr(wsss, name)} >= names
    tree = ast.parse((PROJECT / "src" / "wsss" / "__init__.pyi").read_text())
    stub = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub.keys() == names
    for name, module in stub.items():
        assert getattr(wsss, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="no attribute 'ToCoo'"):
        _ = wsss.ToCoo  # type: ignore[attr-defined]
