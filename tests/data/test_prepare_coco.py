"""COCO's instance annotations become index masks, lists and labels, by rules that are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prepared import contents, prepare, prepare_killed
from trees import (
    COCO_IDS,
    LAYOUTS,
    coco_instances,
    make_coco,
    official_categories,
    rectangle,
    run_lengths,
)

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.prepare.instances import COCO_CLASSES, Instance, Picture
from wsss.data.prepare.painting import paint
from wsss.data.prepare.regions import read_region
from wsss.data.table import read_table

pycocotools_mask = pytest.importorskip("pycocotools.mask")


def filled(shape: Any, height: int, width: int) -> np.ndarray:
    """Pixels of rectangles or run lengths, counted out by hand."""
    inside = np.zeros((height, width), bool)
    if isinstance(shape, list):
        for polygon in shape:
            xs, ys = [int(v) for v in polygon[::2]], [int(v) for v in polygon[1::2]]
            inside[min(ys) : max(ys), min(xs) : max(xs)] = True
        return inside
    position, value = 0, False
    for count in shape["counts"]:
        for pixel in range(position, position + count):
            inside[pixel % height, pixel // height] = value
        position, value = position + count, not value
    return inside


def straightforward(
    content: dict[str, Any], image: dict[str, Any], *, overlap: str, crowd: str
) -> np.ndarray:
    """Pixel by pixel: which of the instances that cover it is on top?"""
    height, width = image["height"], image["width"]
    own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    ids = sorted(c["id"] for c in content["categories"])
    cover = [(a, filled(a["segmentation"], height, width)) for a in own]
    mask = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            here = [(n, a) for n, (a, inside) in enumerate(cover) if inside[y, x]]
            things = [(n, a) for n, a in here if crowd == "paint" or not a["iscrowd"]]
            if things:
                key: Callable[[Any], Any] = lambda pair: (pair[1]["area"], pair[0])  # noqa: E731
                if overlap == "last":
                    key = lambda pair: -pair[0]  # noqa: E731
                mask[y, x] = ids.index(min(things, key=key)[1]["category_id"]) + 1
            elif here and crowd == "ignore":
                mask[y, x] = 255
    return mask


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_straightforward_masks(tmp_path: Path, layout: str) -> None:
    root = make_coco(tmp_path, layout=layout)
    prepare("coco", f"root={root}")
    table = read_table(root / "wsss" / "labels.csv", root, COCO_CLASSES)
    assert len(table.rows) == 5  # the last image of each list has no annotation
    for subset, split in (("train2014", "train"), ("val2014", "val")):
        path = next(root.glob(f"*nnotations/instances_{subset}.json"))
        content = json.loads(path.read_text())
        rows = [row for row in table.rows if row.split == split]
        for row, image in zip(rows, content["images"][:-1], strict=True):
            assert row.sample.image.is_file()
            assert row.sample.mask is not None
            expected = straightforward(content, image, overlap="smallest", crowd="paint")
            np.testing.assert_array_equal(read(row.sample.mask), expected)
            categories = {
                a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]
            }
            assert row.labels == tuple(COCO_CLASSES[COCO_IDS.index(c)] for c in sorted(categories))


@pytest.mark.parametrize("overlap", ["smallest", "last"])
@pytest.mark.parametrize("crowd", ["paint", "ignore", "skip"])
def test_every_rule_gives_the_straightforward_masks(
    tmp_path: Path, overlap: str, crowd: str
) -> None:
    root = make_coco(tmp_path)
    prepare("coco", f"root={root}", f"overlap={overlap}", f"crowd={crowd}")
    content = json.loads((root / "annotations" / "instances_train2014.json").read_text())
    seen = set()
    for image in content["images"][:-1]:
        name = image["file_name"].replace(".jpg", ".png")
        mask = read(root / "wsss" / "masks" / "train2014" / name)
        expected = straightforward(content, image, overlap=overlap, crowd=crowd)
        np.testing.assert_array_equal(mask, expected)
        seen |= {*np.unique(mask)}
    assert (255 in seen) == (crowd == "ignore")
    assert max(seen - {255}) <= 80


def test_last_classes_are_80_and_not_90() -> None:
    last = Instance(1, 80, 1.0, False, [rectangle(1, 1, 2, 2)])
    assert paint(Picture("x", 5, 5, [last]), overlap="smallest", crowd="paint").max() == 80
    assert COCO_IDS[-1] == 90


def test_run_lengths_compressed_and_not_are_the_same_pixels() -> None:
    inside = np.random.default_rng(0).random((17, 23)) > 0.6
    packed = pycocotools_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    text = {"size": [17, 23], "counts": packed["counts"].decode()}
    for shape in (run_lengths(inside), text):
        region = read_region(shape, 17, 23)
        np.testing.assert_array_equal(region.pixels(), inside)
        assert region.area == inside.sum()


def test_without_an_area_the_pixels_are_counted() -> None:
    large = Instance(1, 1, None, False, [rectangle(0, 0, 8, 8)])
    small = Instance(2, 2, None, False, [rectangle(2, 2, 3, 3)])
    for order in ([large, small], [small, large]):
        mask = paint(Picture("x", 10, 10, order), overlap="smallest", crowd="paint")
        assert (mask == 2).sum() == 9
        assert (mask == 1).sum() == 64 - 9


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    prepare("coco", f"root={root}")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    prepare("coco", f"root={root}")
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_a_killed_call_goes_on_and_ends_equal(tmp_path: Path, number: int) -> None:
    for folder in ("straight", "killed"):
        make_coco(tmp_path / folder)
    prepare("coco", f"root={tmp_path / 'straight'}")
    prepare_killed(number, "coco", f"root={tmp_path / 'killed'}")
    assert contents(tmp_path / "killed") != contents(tmp_path / "straight")
    prepare("coco", f"root={tmp_path / 'killed'}")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_several_processes_make_the_same(tmp_path: Path) -> None:
    for folder, jobs in (("one", 1), ("two", 2)):
        make_coco(tmp_path / folder)
        prepare("coco", f"root={tmp_path / folder}", f"jobs={jobs}")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_masks_of_two_rules_never_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_coco(tmp_path)
    prepare("coco", f"root={root}")
    before = contents(root)
    assert main(["data", "prepare", "coco", f"root={root}", "overlap=last"]) == 2
    assert "prepared with overlap=smallest, now it is last" in capsys.readouterr().err
    assert contents(root) == before
    path = root / "annotations" / "instances_val2014.json"
    path.write_text(path.read_text().replace("400.0", "401.0"))
    assert main(["data", "prepare", "coco", f"root={root}"]) == 2
    assert "prepared with annotations=" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{cut", "[1]", "{}"])
def test_a_damaged_note_of_the_rules_is_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    path = root / "wsss" / "prepare.json"
    path.parent.mkdir()
    path.write_text(content)
    assert main(["data", "prepare", "coco", f"root={root}"]) == 2
    assert f"{path} does not say by which rules" in capsys.readouterr().err


def test_the_validation_set_alone_can_be_prepared(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    (root / "annotations" / "instances_train2014.json").unlink()
    prepare("coco", f"root={root}")
    table = read_table(root / "wsss" / "labels.csv", root, COCO_CLASSES)
    assert {row.split for row in table.rows} == {"val"}


def spoil(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        path = root / "annotations" / "instances_val2014.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path

    return write


def truncated(root: Path) -> Path:
    path = root / "annotations" / "instances_val2014.json"
    path.write_text(path.read_text()[:-30])
    return path


def latin(root: Path) -> Path:
    path = root / "annotations" / "instances_val2014.json"
    path.write_bytes(path.read_bytes() + "ä".encode("latin-1"))
    return path


def other_size(root: Path) -> Path:
    path = root / "val2014" / "COCO_val2014_000000000001.jpg"
    Image.new("RGB", (9, 9)).save(path)
    return path


def without_image(root: Path) -> Path:
    path = root / "val2014" / "COCO_val2014_000000000002.jpg"
    path.unlink()
    return path


def without_images(root: Path) -> Path:
    (root / "val2014").rename(root / "elsewhere")
    return Path("COCO_val2014_000000000001.jpg")


def one_file(root: Path) -> Path:
    """Two images of the JSON are the same file."""

    def unite(content: dict[str, Any]) -> None:
        content["images"][1] |= {"file_name": content["images"][0]["file_name"], "width": 48}
        content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]

    spoil(unite)(root)
    return root / "wsss" / "labels.csv"


def first(content: dict[str, Any]) -> dict[str, Any]:
    annotation: dict[str, Any] = content["annotations"][0]
    return annotation


SPOILT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated JSON": (truncated, "no complete JSON"),
    "no UTF-8": (latin, "not UTF-8"),
    "unknown category": (spoil(lambda c: first(c).update(category_id=12)), "category_id 12"),
    "unknown image": (spoil(lambda c: first(c).update(image_id=99)), "image_id 99"),
    "other categories": (
        spoil(lambda c: c["categories"][4].update(name="aeroplane")),
        "not COCO's 80 ('aeroplane')",
    ),
    "annotation twice": (spoil(lambda c: first(c).update(id=2)), "id twice"),
    "image twice": (spoil(lambda c: c["images"].append(c["images"][0])), "id twice"),
    "category twice": (
        spoil(lambda c: c["categories"].append(c["categories"][0])),
        "category id twice",
    ),
    "file of two images": (one_file, "list each image once"),
    "path out of the folder": (
        spoil(lambda c: c["images"][0].update(file_name="../annotations/x.jpg")),
        "file_name '../annotations/x.jpg'",
    ),
    "absolute path": (
        spoil(lambda c: c["images"][0].update(file_name="/etc/x.jpg")),
        "file_name '/etc/x.jpg'",
    ),
    "list of categories": (spoil(lambda c: first(c).update(category_id=[1])), "category_id [1]"),
    "area in words": (spoil(lambda c: first(c).update(area="big")), "has the area 'big'"),
    "crowd in words": (spoil(lambda c: first(c).update(iscrowd="no")), "iscrowd 'no'"),
    "results file": (spoil(lambda c: c.pop("categories")), "not the structure"),
    "only boxes": (
        spoil(lambda c: first(c).update(segmentation=[])),
        "000001.jpg has no segmentation",
    ),
    "a line": (spoil(lambda c: first(c).update(segmentation=[[1, 2, 3, 4]])), "three points"),
    "short run lengths": (
        spoil(lambda c: c["annotations"][3]["segmentation"].update(counts=[5, 6])),
        "do not fill the image",
    ),
    "run lengths of another size": (
        spoil(lambda c: c["annotations"][3]["segmentation"].update(size=[3, 4])),
        "run lengths for [3, 4]",
    ),
    "no size": (spoil(lambda c: c["images"][0].pop("height")), "lacks file_name, height or width"),
    "image of another size": (other_size, "is 9x9"),
    "missing image": (without_image, "is missing (1 of 2"),
    "missing images": (without_images, "is in none of"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_downloads_are_one_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    damage, expected = SPOILT[case]
    path = damage(root)
    assert main(["data", "prepare", "coco", f"root={root}"]) == 2
    error = capsys.readouterr().err.strip()
    assert str(path) in error
    assert expected in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["overlap=largest"], "expected smallest or last"),
        (["crowd=void"], "expected paint or ignore or skip"),
        (["annotations=cls_labels_coco.npy"], "never loaded"),
        (["annotations=nowhere"], "annotations_trainval2014.zip"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    assert main(["data", "prepare", "coco", f"root={root}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1


def test_missing_root_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "prepare", "coco", f"root={tmp_path / 'no'}"]) == 2
    assert f"{tmp_path / 'no'} is missing" in capsys.readouterr().err


def test_structure_is_checked_by_us_not_by_luck() -> None:
    content = coco_instances("val2014", 3, categories=official_categories())
    assert len(content["categories"]) == len(COCO_CLASSES) == 80
    with pytest.raises(WSSSError, match="annotation 7"):
        paint(Picture("x", 4, 4, [Instance(7, 1, 1.0, False, None)]), overlap="last", crowd="skip")
