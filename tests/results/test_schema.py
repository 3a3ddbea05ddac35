"""Results that come from anybody: each key is checked when it is read, each cell too."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_on_disk import make_run

from wsss.core.errors import WSSSError
from wsss.results.store import CELLS_FILE, RESULTS_FILE, read_cells, read_results

ROOT = Path(__file__).parents[2]


def changed(run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Changes the file's content in place."""
    results = json.loads((run / RESULTS_FILE).read_text())
    change(results)
    (run / RESULTS_FILE).write_text(json.dumps(results))
    return run / RESULTS_FILE


def at(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change that sets one key."""

    def change(results: dict[str, Any]) -> None:
        node: Any = results
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


VAL = ("splits", "val")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("method",), 5),
        (("data",), ["x"]),
        (("seed",), "0"),
        (("seed",), 0.5),
        (("study",), {}),
        (("run",), 5),
        (("config",), []),
        (("config", "method"), "x"),
        (("cost",), 3),
        (("cost", "train_wall_hours"), "long"),
        (("cost", "train_wall_hours"), float("inf")),
        (("source",), "cams"),
        (VAL, 5),
        ((*VAL, "seed_miou"), "0.9"),
        ((*VAL, "seed_miou"), True),
        ((*VAL, "seed_miou"), 1.5),
        ((*VAL, "seed_miou"), -0.1),
        ((*VAL, "seed_miou"), float("nan")),
        ((*VAL, "seed_miou"), 10**400),
        ((*VAL, "seed_threshold"), "half"),
        ((*VAL, "readings"), "once"),
        ((*VAL, "num_images"), -1),
        ((*VAL, "num_images"), 1e400),
        ((*VAL, "notes"), "text"),
        ((*VAL, "notes"), [5]),
        ((*VAL, "maps"), []),
        ((*VAL, "maps", "sed"), {}),
        ((*VAL, "maps", "seed"), 0.5),
        ((*VAL, "maps", "seed", "miou"), "x"),
        ((*VAL, "maps", "seed", "trimap_iou"), 0.5),
        ((*VAL, "maps", "seed", "trimap_iou", "3"), "x"),
        ((*VAL, "per_class"), {"seed_iou": []}),
        ((*VAL, "per_class", "class"), ["background"]),
        ((*VAL, "per_class", "class"), [1, 2, 3]),
        ((*VAL, "per_class", "seed_iou"), [0.1]),
        ((*VAL, "per_class", "seed_iou"), ["a", "b", "c"]),
        ((*VAL, "confusion"), {"seed": [["a"]]}),
        ((*VAL, "protocol"), "card"),
        ((*VAL, "protocol", "supervision"), 5),
        ((*VAL, "protocol", "holdout"), [1]),
        ((*VAL, "data_sha256"), "x"),
        ((*VAL, "seed_curve"), {"miou": [0.5]}),
        ((*VAL, "seed_curve", "miou"), [0.5]),
        ((*VAL, "cost"), "much"),
        ((*VAL, "cost", "seconds_per_image"), "much"),
    ],
)
def test_a_key_of_another_kind_is_named(
    path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    file = changed(make_run(tmp_path / "run"), at(*path, value=value))
    with pytest.raises(WSSSError) as caught:
        read_results(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert ".".join(path[:2]) in text
    assert text.endswith("run `wsss eval` again")
    assert len(text.splitlines()) == 1
    assert len(text) < 600


@pytest.mark.parametrize("content", ["[" * 100_000, "{" * 9, '{"schema": 1, "splits": ' + "[" * 9])
def test_groups_without_end_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_text(content)
    with pytest.raises(WSSSError, match="not valid JSON"):
        read_results(tmp_path / RESULTS_FILE)


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    file = changed(make_run(tmp_path / "run"), at(*VAL, "seed_miou", value="x" * 70_000))
    with pytest.raises(WSSSError) as caught:
        read_results(file)
    assert len(str(caught.value)) < 600


def test_results_of_every_earlier_version_are_read() -> None:
    files = [
        *sorted((ROOT / "experiments").glob("*/results/*.json")),
        *sorted((ROOT / "tests" / "before").glob("*/results.json")),
    ]
    assert len(files) > 20
    for file in files:
        assert read_results(file)["splits"]
    for cells in (ROOT / "tests" / "before").glob("*/images.npz"):
        assert read_cells(cells, "val")["seed"].dtype == np.int64


def test_a_key_of_a_later_version_is_no_matter(tmp_path: Path) -> None:
    file = changed(make_run(tmp_path / "run"), at(*VAL, "new_number", value="anything"))
    assert read_results(file)["splits"]["val"]["new_number"] == "anything"


CELLS = np.array([[0, 1, 5]], np.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds no names"),
        ({"val/names": np.array(["a"]), "val/seed": CELLS[0]}, r"val/seed is int32 \(3,\)"),
        ({"val/names": np.array(["a"]), "val/seed": CELLS[:, :2]}, r"\(1, 2\), expected"),
        ({"val/names": np.array(["a"]), "val/seed": CELLS * 0.5}, "val/seed is float64"),
        ({"val/names": np.array(["a"]), "val/seed": -CELLS}, "counts below zero"),
        ({"val/names": np.array(["a"]), "val/seed": CELLS + 1}, "more than its 1 images"),
        ({"val/names": np.array([1]), "val/seed": CELLS}, "no list of names"),
        ({"val/names": np.array(["a"], object), "val/seed": CELLS}, "pickled"),
    ],
)
def test_cells_of_another_kind_are_named(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / CELLS_FILE, **arrays)
    with pytest.raises(WSSSError, match=rf"images\.npz: .*{message}.*run `wsss eval` again"):
        read_cells(tmp_path / CELLS_FILE, "val")


def test_damaged_cells_are_one_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run") / CELLS_FILE
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    good, refused = read_cells(path, "val"), []
    for _ in range(300):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.integers(1, 4) if damaged else 0):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_cells(path, "val")
        except WSSSError as error:
            refused.append(str(error))
            continue
        for kind in found.keys() & good.keys():
            np.testing.assert_array_equal(found[kind], good[kind])
    assert len(refused) > 200
    assert all("\n" not in text and len(text) < 600 for text in refused)


def test_cells_of_terabytes_are_refused(tmp_path: Path) -> None:
    text = repr({"descr": "<i4", "fortran_order": False, "shape": (2**37, 3)}).encode().ljust(117)
    head = b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"
    np.savez(tmp_path / CELLS_FILE, **{"val/names": np.array(["a"])})
    with zipfile.ZipFile(tmp_path / CELLS_FILE, "a") as archive:
        archive.writestr("val/seed.npy", head)
    with pytest.raises(WSSSError, match=r"val/seed declares int32 \(137438953472, 3\)"):
        read_cells(tmp_path / CELLS_FILE, "val")
