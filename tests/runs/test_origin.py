"""What a run's ``data.json`` says is compared: other data under the same name is found."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.builtin import minivoc_root
from wsss.runs.folder import load_run
from wsss.runs.origin import check_origin, check_resumed, read_origin

(STORED,) = (Path(__file__).parents[1] / "before").glob("tkppcl-*")
LINE = [
    "train",
    "method=tkp_pcl",
    "data=minivoc",
    "data.root=data",
    "backbone.weights=random",
    "+backbone.overrides.embed_dim=24",
    "backbone.overrides.depth=1",
    "budget.crop_size=32",
    "budget.local_size=16",
    "budget.global_batch_size=4",
    "budget.cam_size=32",
    "budget.warmup_steps=0",
    "budget.max_steps=1",
    "budget.eval_every=1",
    "data.limit=4",
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
    "runs_dir=runs",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data under ``data`` and a finished run."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(minivoc_root(), home / "data")
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(LINE) == 0
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def run(home: Path) -> Path:
    (folder,) = home.glob("runs/default/*")
    return folder.absolute()


@pytest.fixture
def elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place, whose ``data`` has other masks under the same names."""
    shutil.copytree(home / "data", tmp_path / "data")
    folder = tmp_path / "data" / "VOC2012" / "SegmentationClass"
    for path in folder.glob("*.png"):
        with Image.open(path) as mask:
            palette, ids = mask.getpalette(), np.asarray(mask)
        other = Image.fromarray(np.where(ids > 0, 0, 1).astype(np.uint8), mode="P")
        other.putpalette(palette or [])
        other.save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_absolute_root_is_kept(home: Path, run: Path) -> None:
    stored = json.loads((run / "data.json").read_text())
    assert stored["data.root"] == {"given": "data", "absolute": str(home / "data")}
    assert set(stored) == {"data.root", "train", "val"}


def test_other_masks_give_no_number(
    run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = (run / "results.json").read_bytes()
    assert main(["eval", f"run={run}"]) == 2
    said = capsys.readouterr().err
    assert "val has other masks" in said
    assert str(elsewhere / "data") in said
    assert "data.root=FOLDER" in said
    assert (run / "results.json").read_bytes() == results


def test_the_users_own_line_is_believed(
    home: Path, run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={run}", f"data.root={home / 'data'}", "out=same"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert main(["eval", f"run={run}", f"data.root={elsewhere / 'data'}", "out=other"]) == 0
    assert "note:" in capsys.readouterr().out


def test_other_labels_make_no_pseudo_labels(
    run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (elsewhere / "data" / "VOC2012" / "Annotations").glob("*.xml"):
        path.write_text(re.sub("<name>[a-z]+<", "<name>sofa<", path.read_text()))
    assert main(["pseudo", f"run={run}"]) == 2
    assert "train has other labels" in capsys.readouterr().err


def test_other_data_resumes_no_run(
    home: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "runs", elsewhere / "runs")
    (folder,) = (elsewhere / "runs").glob("default/*")
    (folder / "results.json").unlink()
    assert main(LINE) == 2
    assert "val has other masks" in capsys.readouterr().err
    shutil.rmtree(elsewhere / "data")
    shutil.copytree(home / "data", elsewhere / "data")
    assert main(LINE) == 0


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{", '{"val": 3}', "[" * 10**5, '{"val": {}}', '{"data.root": {"absolute": 5}}'],
)
def test_a_damaged_file_is_named(
    content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "data.json").write_text(content)
    assert main(["eval", f"run={copy}", "data.root=builtin"]) == 2
    assert f"{copy / 'data.json'}: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("val.list_sha256", 5),
        ("val.masks_sha256", ""),
        ("val.labels_sha256", "0" * 63),
        ("val.images", "8"),
        ("train.list_sha256", None),
        ("data.root.absolute", ["x"]),
        ("data.root.given", 3),
    ],
)
def test_a_damaged_part_is_named(key: str, value: Any, run: Path, tmp_path: Path) -> None:
    group, _, last = key.rpartition(".")
    stored = json.loads((run / "data.json").read_text())
    stored[group][last] = value
    (tmp_path / "data.json").write_text(json.dumps(stored))
    with pytest.raises(WSSSError, match=rf"data\.json: is damaged: {group}: {last}.*; restore it"):
        read_origin(tmp_path)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (("val",), "data.json does not know val; see"),
        (("data.root", "train", "val"), "data.json does not know val; see"),
        (None, "there is no"),
    ],
)
def test_what_is_not_compared_is_said(
    lost: tuple[str, ...] | None,
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run")) / "data.json"
    stored = json.loads(copy.read_text())
    if lost is None:
        copy.unlink()
    else:
        copy.write_text(json.dumps({k: v for k, v in stored.items() if k not in lost}))
    loaded = load_run(copy.parent, ["data.root=builtin"])
    check_origin(loaded, ["val"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: not compared: ")
    assert said in line
    assert str(copy) in line
    check_resumed(loaded)
    assert "val" in capsys.readouterr().err or lost is None


def test_masks_that_came_later_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    loaded = load_run(copy, ["data.root=builtin"])
    check_origin(loaded, ["train", "val"])
    assert capsys.readouterr().err == ""
    stored = json.loads((copy / "data.json").read_text())
    stored["val"]["masks_sha256"] = None
    (copy / "data.json").write_text(json.dumps(stored))
    check_origin(loaded, ["train", "val"], with_masks=False)
    assert capsys.readouterr().err == ""
    check_origin(loaded, ["train", "val"])
    assert "not compared: masks of val, which had none" in capsys.readouterr().err


def test_a_holdout_is_no_list_to_compare(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", f"run={run}", "data.root=builtin", f"out={tmp_path / 'out'}"]
    assert main([*line, "splits=[holdout]", "eval.holdout_per_class=1"]) == 0
    assert "not compared" not in capsys.readouterr().err


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    assert main(["eval", f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 0
