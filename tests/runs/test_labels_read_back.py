"""Label maps, masks and cards that lie in a folder already: what counts as done was opened."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.cli import main
from wsss.data.images import write_mask
from wsss.data.train_masks import CARD_FILE

(STORED,) = (Path(__file__).parents[1] / "before").glob("tkppcl-*")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def resize(path: Path) -> None:
    write_mask(np.zeros((3, 5), np.uint8), path)


def unknown_id(path: Path) -> None:
    with Image.open(path) as image:
        ids = np.array(image)
    ids[0, 0] = 200
    write_mask(ids, path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pseudo labels; every test leaves it as it was."""
    folder = tmp_path_factory.mktemp("labels") / "out"
    assert main(line(folder)) == 0
    return folder


def line(folder: Path) -> list[str]:
    return ["pseudo", f"run={STORED}", "split=val", f"out={folder}", "device=cpu"]


@pytest.mark.parametrize("damage", [cut, resize, unknown_id, Path.unlink])
@pytest.mark.parametrize("status", ["begun", "finished"])
def test_a_damaged_label_map_is_made_again(
    status: str,
    damage: Callable[[Path], None],
    labelled: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = json.loads((labelled / CARD_FILE).read_text())
    (labelled / CARD_FILE).write_text(json.dumps({**card, "status": status}))
    first, other = sorted(labelled.glob("*.png"))[:2]
    whole, untouched = first.read_bytes(), other.stat()
    damage(first)
    assert main(line(labelled)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 images in" in said
    assert "7 done before" in said
    assert ("1 damaged label maps are made again" in said) == (damage is not Path.unlink)
    assert first.read_bytes() == whole
    assert os.path.samestat(other.stat(), untouched)
    assert json.loads((labelled / CARD_FILE).read_text())["status"] == "finished"


def test_whole_labels_are_finished(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (labelled / CARD_FILE).stat()
    assert main(line(labelled)) == 0
    assert f"{labelled} is finished" in capsys.readouterr().out
    assert os.path.samestat((labelled / CARD_FILE).stat(), before)


@pytest.mark.parametrize(
    "content", ["[1]", "[" * 10**5, '{"status": "done"}', '{"made_from": [1]}', ""]
)
def test_the_mend_of_a_damaged_card_mends(
    content: str, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = labelled.parent / "damaged"
    folder.mkdir()
    (folder / CARD_FILE).write_text(content)
    assert main(line(folder)) == 2
    said = capsys.readouterr().err
    assert f"{folder / CARD_FILE}: " in said
    assert f"remove {folder}, and run wsss pseudo again" in said
    (folder / CARD_FILE).unlink()
    folder.rmdir()


@pytest.mark.parametrize("device", ["cuda:99", "nope"])
@pytest.mark.parametrize("verb", ["predict", "pseudo", "eval", "eval masks"])
def test_no_such_device_leaves_no_folder(
    verb: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (40, 40)).save(images / "a.png")
    given = {
        "predict": ["predict", f"run={STORED}", f"images={images}"],
        "pseudo": ["pseudo", f"run={STORED}"],
        "eval": ["eval", f"run={STORED}"],
        "eval masks": ["eval", f"masks={images}", "data=minivoc", "supervision=none"],
    }[verb]
    assert main([*given, f"out={out}", f"device={device}"]) == 2
    assert f"device={device}" in capsys.readouterr().err
    assert not out.exists()
