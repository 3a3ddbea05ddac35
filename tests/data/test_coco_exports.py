"""What strangers' COCO files hold: each kind is read as it is meant or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prepared import contents, in_another_process, prepare
from trees import make_coco, rectangle, run_lengths

from wsss.cli import main
from wsss.data.prepare import instances, painting
from wsss.data.prepare.instances import Instance, Picture
from wsss.data.prepare.painting import paint
from wsss.data.prepare.regions import looks_like_fractions
from wsss.data.table import Table, read_table

pytest.importorskip("pycocotools.mask")

HEIGHT, WIDTH = 40, 60
INNER, OUTER = rectangle(10, 8, 10, 10), rectangle(2, 2, 40, 30)
OUTSIDE = rectangle(61, 41, 9, 9)
FRACTIONS = [0.1, 0.1, 0.9, 0.1, 0.9, 0.95, 0.1, 0.95]


def image(key: Any, name: str) -> dict[str, Any]:
    return {"id": key, "file_name": name, "height": HEIGHT, "width": WIDTH}


def annotation(key: Any, picture: Any, category: Any, shape: Any, **fields: Any) -> dict[str, Any]:
    entry = {"id": key, "image_id": picture, "category_id": category, "segmentation": shape}
    return entry | {"iscrowd": 0} | fields


def two_images() -> dict[str, Any]:
    """A cat and a dog in a.jpg, a dog in b.jpg."""
    return {
        "images": [image(1, "a.jpg"), image(2, "b.jpg")],
        "annotations": [
            annotation(1, 1, 1, [INNER], area=100.0),
            annotation(2, 1, 2, [OUTER], area=1200.0),
            annotation(3, 2, 2, [OUTER], area=1200.0),
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write(root: Path, content: dict[str, Any], path: str = "annotations/instances_x.json") -> Path:
    """Write an export; its images lie in ``images``."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content))
    for entry in content["images"]:
        if isinstance(entry.get("file_name"), str):
            name = entry["file_name"].replace("\\", "/").rpartition("/")[2]
            write_image(root / "images" / name)
    return target


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(str(path).encode())
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def refused(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> str:
    """Give the one line of a refusal, which leaves every file as it was."""
    before = contents(root), sorted(root.rglob("*"))
    assert main(["data", "prepare", "coco", f"root={root}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "WSSS_DEBUG" not in error
    assert (contents(root), sorted(root.rglob("*"))) == before
    return error


def table_of(root: Path) -> Table:
    return read_table(root / "wsss" / "labels.csv", root)


def mask_of(root: Path, name: str = "a") -> np.ndarray:
    row = next(row for row in table_of(root).rows if row.sample.image.stem == name)
    assert row.sample.mask is not None
    with Image.open(row.sample.mask) as mask:
        return np.asarray(mask)


def cat_on_dog() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:32, 2:42] = 2
    mask[8:18, 10:20] = 1
    return mask


# --- images without an object --------------------------------------------------------------------


def one_class() -> dict[str, Any]:
    """A cat in a.jpg, nothing in b.jpg and c.jpg."""
    content = two_images()
    content["images"].append(image(3, "c.jpg"))
    return content | {
        "annotations": content["annotations"][:1],
        "categories": content["categories"][:1],
    }


def test_images_without_the_only_class_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, one_class())
    prepare("coco", f"root={tmp_path}")
    rows = {row.sample.image.stem: row for row in table_of(tmp_path).rows}
    assert {name: row.labels for name, row in rows.items()} == {"a": ("cat",), "b": (), "c": ()}
    assert (mask_of(tmp_path, "a") == 1).any()
    assert not mask_of(tmp_path, "b").any()
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 2 of 3 images have no annotation, first images/b.jpg" in said
    assert "images without 'cat'" in said


def test_of_several_classes_they_are_left_out(tmp_path: Path) -> None:
    content = two_images()
    content["images"].append(image(3, "c.jpg"))
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert [row.sample.image.stem for row in table_of(tmp_path).rows] == ["a", "b"]


def test_a_file_that_annotates_nothing_has_no_negatives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, one_class(), "annotations/instances_train.json")
    unseen = one_class() | {"annotations": [], "images": [image(1, "d.jpg")]}
    write(tmp_path, unseen, "annotations/instances_val.json")
    prepare("coco", f"root={tmp_path}")
    assert [row.sample.image.stem for row in table_of(tmp_path).rows] == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "wsss")
    (tmp_path / "annotations" / "instances_train.json").unlink()
    assert "annotates no image" in refused(capsys, tmp_path)


# --- areas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "area", [None, -1200.0, -1, 0, 1, 99, float("nan"), float("-inf"), 10**400, "missing"]
)
@pytest.mark.parametrize("first", ["inner", "outer"])
def test_a_declared_area_is_not_believed(tmp_path: Path, area: Any, first: str) -> None:
    content = two_images()
    content["annotations"][0]["area"] = 5000.0
    content["annotations"][1]["area"] = area
    if area == "missing":
        del content["annotations"][1]["area"]
    if first == "outer":
        content["annotations"].reverse()
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


def test_areas_far_from_the_pixels_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    content["annotations"][0]["area"] = 100 * 2.0  # a box's
    content["annotations"][1]["area"] = -1200
    content["annotations"][2]["area"] = None
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "1 of 3 instances declare another area than they paint" in notes[0]
    assert "instances_x.json: annotation 2 of a.jpg declares -1200 and paints 1,200" in notes[0]


def test_masks_by_declared_areas_are_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, two_images())
    prepare("coco", f"root={tmp_path}")
    marker = tmp_path / "wsss" / "prepare.json"
    before = json.loads(marker.read_text())
    del before["area"]  # as it was written when areas were believed
    marker.write_text(json.dumps(before))
    assert "does not say by which rules" in refused(capsys, tmp_path)


# --- instances without a pixel -------------------------------------------------------------------


def only(shape: Any, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """Annotation 3, the only one of b.jpg, gets another shape."""

    def change(content: dict[str, Any]) -> None:
        content["annotations"][2] |= {"segmentation": shape} | fields

    return change


def no_cat(shape: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = shape

    return change


FLAT = [9, 9, 20, 9, 9, 9]
EMPTY = {
    "fractions": [FRACTIONS],
    "tiny fractions": [[0.01, 0.01, 0.02, 0.01, 0.02, 0.02]],
    "fractions rounded up": [[0.1, 0.1, 1.0000001, 0.1, 1.0000001, 0.9, 0.1, 0.9]],
    "fractions that overshoot": [[-0.05, -0.001, 1.1, 0.1, 1.02, 1.01, 0.1, 0.9]],
    "integers 0 and 1": [[0, 0, 1, 0, 1, 1, 0, 1]],
    "right of it": [OUTSIDE],
    "left of it": [rectangle(-30, 5, 20, 20)],
    "no height": [FLAT],
    "run lengths": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "several": [OUTSIDE, FLAT],
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_image_without_a_pixel_is_refused(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    only(EMPTY[case])(content)
    path = write(tmp_path, content)
    error = refused(capsys, tmp_path)
    assert f"{path}: annotation 3 of b.jpg paints no pixel" in error
    hint = "multiply x by the image's width" if "0" in case or "frac" in case else "redraw"
    assert hint in error


@pytest.mark.parametrize("case", EMPTY)
def test_a_class_without_a_pixel_is_refused(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    no_cat(EMPTY[case])(content)
    path = write(tmp_path, content)
    error = refused(capsys, tmp_path)
    assert f"{path}: annotation 1 of a.jpg paints no pixel" in error
    assert "no other of the class 'cat' does" in error


def test_some_instances_without_a_pixel_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    content["annotations"] += [annotation(7, 1, 2, [OUTSIDE]), annotation(8, 2, 2, [FRACTIONS])]
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    out = capsys.readouterr().out
    assert "2 of 5 instances paint no pixel, first" in out
    assert "annotation 7 of a.jpg; their labels stay" in out
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


def test_cocos_own_file_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    path = root / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"][:4]:
        entry["segmentation"] = [FLAT]
    path.write_text(json.dumps(content))
    assert "paints no pixel, and no other of this image does" in refused(capsys, root)
    monkeypatch.setitem(instances.OFFICIAL, "val2014", 2)
    prepare("coco", f"root={root}")
    assert "4 of 20 instances paint no pixel" in capsys.readouterr().out


def test_images_of_skipped_crowds_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    only([OUTER], iscrowd=1)(content)
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}", "crowd=skip")
    assert "1 images show only crowd regions, first" in capsys.readouterr().out
    assert not mask_of(tmp_path, "b").any()


@pytest.mark.parametrize("crowd", ["ignore", "skip"])
def test_a_class_of_crowds_alone_cannot_be_scored(
    tmp_path: Path, crowd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    put("annotations", 0, iscrowd=1)(content)
    path = write(tmp_path, content)
    error = refused(capsys, tmp_path, f"crowd={crowd}")
    assert f"{path}: annotation 1 of a.jpg shows no pixel in its mask" in error
    assert f"no other of the class 'cat' does: crowd={crowd}" in error
    assert "give crowd=paint" in error


@pytest.mark.parametrize("crowd", ["ignore", "skip"])
def test_images_that_are_all_crowds_are_refused(
    tmp_path: Path, crowd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    for number in range(3):
        put("annotations", number, iscrowd=1)(content)
    write(tmp_path, content)
    assert "annotation 1 of a.jpg shows no pixel" in refused(capsys, tmp_path, f"crowd={crowd}")


def test_images_of_ignored_crowds_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    only([OUTER], iscrowd=1)(content)
    path = write(tmp_path, content)
    prepare("coco", f"root={tmp_path}", "crowd=ignore")
    first = f"first {path}: annotation 3 of b.jpg; crowd=ignore leaves nothing to score"
    assert f"note: 1 images show only crowd regions, {first}" in capsys.readouterr().out
    assert {*np.unique(mask_of(tmp_path, "b"))} == {0, 255}


def test_a_class_that_others_cover_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, two_images())
    error = refused(capsys, tmp_path, "overlap=last")
    assert "annotation 1 of a.jpg shows no pixel in its mask" in error
    assert "class 'cat' does: others cover it (overlap=last); give overlap=smallest" in error
    prepare("coco", f"root={tmp_path}")


def test_labels_that_a_mask_does_not_show_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    content["annotations"].append(annotation(4, 2, 1, [OUTER]))  # as large as the dog before it
    path = write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    out = capsys.readouterr().out
    assert "note: 1 of 4 instances are of a class that their mask does not show" in out
    assert f"first {path}: annotation 4 of b.jpg; their labels stay" in out


@pytest.mark.parametrize(("width", "fraction"), [(60, True), (3, True), (2, False)])
def test_narrow_images_have_coordinates_about_one(width: int, fraction: bool) -> None:
    overshoot = [[0.0, 0.0, 1.1, 0.0, 1.1, 1.1, 0.0, 1.1]]
    assert looks_like_fractions(overshoot, width) == fraction
    assert not looks_like_fractions([[0.0, 0.0, 1.2, 0.0, 1.2, 1.2]], width)
    assert not looks_like_fractions([[-0.1, 0.0, 1.0, 0.0, 1.0, 1.0]], width)


def test_a_background_in_capitals_is_no_class(tmp_path: Path) -> None:
    content = two_images()
    content["categories"].insert(0, {"id": 0, "name": "BackGround"})
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert table_of(tmp_path).class_names == ("cat", "dog")


def test_two_preparations_at_once_do_not_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, two_images())
    with in_another_process(tmp_path):
        assert main(["data", "prepare", "coco", f"root={tmp_path}"]) == 2
    assert "is preparing here; wait until it ends" in capsys.readouterr().err
    assert not (tmp_path / "wsss").exists()
    prepare("coco", f"root={tmp_path}")


# --- shapes --------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[Any, str]] = {
    "flat list": ([5, 5, 25, 5, 25, 25, 5, 25], "a flat list of 8 coordinates; put each polygon"),
    "NaN": ([[5, 5, 25, 5, float("nan"), 25]], "the coordinate nan"),
    "far": ([[-1.1, -2.8, 2.08e8, 3.52e8, 25.9, 26.5]], "the coordinate 2.08e+08"),
    "short run lengths": (
        {"size": [40, 60], "counts": "Rc0d0d0000000000000000"},
        "do not fill the image",
    ),
    "negative run": ({"size": [40, 60], "counts": [600, -5, 10, 1795]}, "the run length -5"),
    "of another image": ({"size": [60, 40], "counts": [2400]}, "run lengths for [60, 40]"),
    "only a box": ([], "no segmentation, perhaps only a box"),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("crowd", [0, 1])
def test_bad_shapes_are_named_before_a_file_is_written(
    tmp_path: Path, case: str, crowd: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, expected = SHAPES[case]
    content = two_images()
    only(shape, iscrowd=crowd)(content)
    path = write(tmp_path, content)
    error = refused(capsys, tmp_path, "crowd=skip")
    assert f"{path}: annotation 3 of b.jpg has " in error
    assert expected in error


def test_slivers_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    content["annotations"][0]["segmentation"] = [INNER, [7, 7, 7, 9], [3, 3]]
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    out = capsys.readouterr().out
    assert "1 of 3 instances have polygons of fewer than three points, first" in out
    assert "annotation 1 of a.jpg; those are left out" in out
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


@pytest.mark.parametrize("crowd", [None, "missing", False, "0", 0.0])
def test_no_crowd_is_written_in_many_ways(tmp_path: Path, crowd: Any) -> None:
    content = two_images()
    for entry in content["annotations"]:
        entry["iscrowd"] = crowd
        if crowd == "missing":
            del entry["iscrowd"]
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}", "crowd=skip")
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


# --- ids -----------------------------------------------------------------------------------------


def as_text(*kinds: str) -> Callable[[dict[str, Any]], None]:
    """Write ids as text: of ``image_id``, or of all (``images``, ...)."""

    def change(content: dict[str, Any]) -> None:
        for kind in kinds:
            part, key = ("annotations", kind) if kind.endswith("_id") else (kind, "id")
            for entry in content[part]:
                entry[key] = str(entry[key])

    return change


def named(content: dict[str, Any]) -> None:
    for entry in content["images"]:
        entry["id"] = f"img_{entry['id']}"
    for entry in content["annotations"]:
        entry |= {"id": f"x{entry['id']}", "image_id": f"img_{entry['image_id']}"}


def named_categories(content: dict[str, Any]) -> None:
    for entry in content["categories"]:
        entry["id"] = f"id of {entry['name']}"
    for entry in content["annotations"]:
        entry["category_id"] = ["id of cat", "id of dog"][entry["category_id"] - 1]


def with_zeros(content: dict[str, Any]) -> None:
    for entry in content["images"]:
        entry["id"] = f"{entry['id']:03}"
    for entry in content["annotations"]:
        entry["image_id"] = f"{entry['image_id']:03}"


def as_floats(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry |= {"image_id": float(entry["image_id"]), "category_id": float(entry["category_id"])}


IDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "image_id": as_text("image_id"),
    "category_id": as_text("category_id"),
    "images": as_text("images"),
    "categories": as_text("categories"),
    "all": as_text("images", "categories", "annotations", "image_id", "category_id"),
    "names": named,
    "named categories": named_categories,
    "leading zeros": with_zeros,
    "1.0": as_floats,
}


@pytest.mark.parametrize("case", IDS)
def test_ids_written_as_text_are_read(tmp_path: Path, case: str) -> None:
    content = two_images()
    IDS[case](content)
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert [row.labels for row in table_of(tmp_path).rows] == [("cat", "dog"), ("dog",)]
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


def test_ids_as_text_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    content = two_images()
    content["categories"] = [{"id": "10", "name": "dog"}, {"id": "9", "name": "cat"}]
    for entry in content["annotations"]:
        entry["category_id"] = ["9", 10][entry["category_id"] - 1]
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert table_of(tmp_path).class_names == ("cat", "dog")


def put(part: str, index: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][index].update(fields)


def drop(part: str, index: int, field: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][index].pop(field)


FORMS = ("caf\u00e9", "cafe\u0301")  # Linux and macOS write the same name in these ways

REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "1 and '1'": (put("images", 1, id="1"), "has the image id twice: 1"),
    "annotation twice": (put("annotations", 1, id="1"), "the annotation id twice: 1"),
    "category id twice": (put("categories", 1, id="1"), "the category id twice: 1"),
    "unknown image": (put("annotations", 0, image_id="9"), "annotation 1 has the image_id '9'"),
    "007 is not 7": (put("annotations", 0, image_id="01"), "annotation 1 has the image_id '01'"),
    "unknown category": (put("annotations", 0, category_id=3), "1 has the category_id 3"),
    "no id": (drop("annotations", 1, "id"), "annotation 2 of 3 has the id None"),
    "boolean id": (put("images", 0, id=True), "image 1 of 2 has the id True"),
    "list as id": (put("images", 0, id=[1]), "image 1 of 2 has the id [1]"),
    "fraction as id": (put("annotations", 0, id=1.5), "annotation 1 of 3 has the id 1.5"),
    "blank id": (put("categories", 0, id=" "), "category 1 of 2 has the id ' '"),
    "image_id of a list": (put("annotations", 0, image_id=[1]), "the image_id [1]"),
    "image_id of null": (put("annotations", 0, image_id=None), "the image_id None"),
    "name twice": (put("categories", 1, name="cat"), "name 'cat' twice: ids 1 ('cat') and 2"),
    "name in another case": (put("categories", 1, name="Cat"), "name 'Cat' twice: ids 1 ('cat')"),
    "name in another form": (
        lambda c: [c["categories"][n].update(name=name) for n, name in enumerate(FORMS)],
        "twice: ids 1",
    ),
    "no name": (put("categories", 1, name=""), "category 2 has the name ''"),
    "half a pair": (put("categories", 1, name="\ud800"), "category 2 has the name '\\ud800'"),
    "a separator": (put("categories", 1, name="a;b"), "labels.csv cannot list the class 'a;b'"),
    "two lines": (put("categories", 1, name="a\u2028b"), "the class 'a\\u2028b', which holds"),
    "background": (put("categories", 0, name="background"), "which is the background"),
    "Background": (put("categories", 0, name="Background"), "which is the background"),
    "one blank": (
        lambda c: [c["categories"][n].update(name=name) for n, name in enumerate(("a b", "ab"))],
        "'a b' and 'ab', which differ only in case or blanks",
    ),
    "unseen blank": (put("categories", 1, name="ca\u200bt"), "'cat' and 'ca\\u200bt', which"),
    "nothing seen": (put("categories", 1, name="\u200b"), "'\\u200b', which cannot be printed"),
    "area in words": (put("annotations", 0, area="big"), "annotation 1 has the area 'big'"),
    "crowd of 2": (put("annotations", 0, iscrowd=2), "iscrowd 2"),
    "null as annotation": (lambda c: c["annotations"].append(None), "no list 'annotations'"),
    "no categories": (lambda c: c.update(categories={}), "no list 'categories'"),
    "nothing annotated": (lambda c: c["annotations"].clear(), "annotates no image"),
    "no class": (lambda c: (c["annotations"].clear(), c["categories"].clear()), "has 0 categories"),
    "too many": (
        lambda c: c["categories"].extend({"id": n, "name": f"c{n}"} for n in range(3, 256)),
        "has 255 categories; expected 1 to 254",
    ),
    "no height": (put("images", 0, height=0), "image 1 lacks file_name, height or width"),
    "half a pixel": (put("images", 0, height=40.5), "image 1 lacks file_name, height or width"),
    "another height": (put("images", 0, height=41), "is 60x40"),
    "no file": (put("images", 1, file_name="c.jpg"), "c.jpg is missing"),
    "out of the folder": (put("images", 0, file_name="..\\..\\a.jpg"), "a path below"),
    "drive": (put("images", 0, file_name="C:\\data\\a.jpg"), "a path below"),
    "share": (put("images", 0, file_name="\\\\server\\data\\a.jpg"), "a path below"),
    "line break": (put("images", 0, file_name="a\n.jpg"), "lacks file_name"),
    "too long": (put("images", 0, file_name="a" * 300), "a path below"),
    "one file twice": (put("images", 1, file_name="a.jpg"), "list each image once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_is_one_line_and_leaves_nothing(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, two_images())
    content = two_images()
    change, expected = REFUSED[case]
    change(content)
    path = tmp_path / "annotations" / "instances_x.json"
    path.write_text(json.dumps(content))
    error = refused(capsys, tmp_path)
    assert expected in error
    if "class" not in expected and "missing" not in expected and "once" not in expected:
        assert str(path) in error
    path.write_text(json.dumps(two_images()))
    prepare("coco", f"root={tmp_path}")  # mended, the same call does it
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


def test_deeply_nested_json_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, two_images())
    path.write_text("[" * 100_000)
    assert f"{path} is no complete JSON" in refused(capsys, tmp_path)


def test_a_broken_image_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, two_images())
    path = tmp_path / "images" / "b.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refused(capsys, tmp_path)
    assert "at least 1 process" in refused(capsys, tmp_path, "jobs=0")


# --- layouts -------------------------------------------------------------------------------------


def test_backslashes_in_names_are_folders(tmp_path: Path) -> None:
    content = two_images()
    put("images", 0, file_name="images\\a.jpg")(content)
    put("images", 1, file_name=".\\images\\b.jpg")(content)
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert [row.sample.name for row in table_of(tmp_path).rows] == ["images/b", "images/a"]
    np.testing.assert_array_equal(mask_of(tmp_path), cat_on_dog())


def test_backslashes_may_be_part_of_the_files_names(tmp_path: Path) -> None:
    content = two_images()
    for number in (0, 1):
        name = f"train\\{'ab'[number]}.jpg"
        put("images", number, file_name=name)(content)
        write_image(tmp_path / name)  # as some tools unpack archives of Windows
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    np.testing.assert_array_equal(mask_of(tmp_path, "train\\a"), cat_on_dog())


def roboflow(root: Path, *splits: str, name: str = "pets-x1") -> None:
    """As Roboflow writes it: the whole data set is category 0, and nothing is of it."""
    for split in splits:
        content = two_images()
        content["categories"] = [
            {"id": 0, "name": name, "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": name},
            {"id": 2, "name": "dog", "supercategory": name},
        ]
        for entry in content["images"]:
            entry["file_name"] = f"{split}_{entry['file_name']}"
            write_image(root / split / entry["file_name"])
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["pets-x1", "cat"])
def test_roboflow_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    roboflow(tmp_path, "train", "valid", "test", name=name)
    prepare("coco", f"root={tmp_path}")
    table = table_of(tmp_path)
    assert table.class_names == ("cat", "dog")
    assert [(row.sample.name, row.split) for row in table.rows] == [
        (f"{folder}/{folder}_{image}", split)
        for folder, split in (("test", "test"), ("train", "train"), ("valid", "val"))
        for image in "ab"
    ]
    np.testing.assert_array_equal(mask_of(tmp_path, "valid_a"), cat_on_dog())
    before = contents(tmp_path)
    prepare("coco", f"root={tmp_path}")
    assert contents(tmp_path) == before
    assert main(["data", "check", "data=table", f"root={tmp_path}", "csv=wsss/labels.csv"]) == 0


@pytest.mark.parametrize("given", ["annotations={}/_annotations.coco.json", "annotations={}", ""])
def test_one_split_of_roboflow_is_a_data_set(tmp_path: Path, given: str) -> None:
    roboflow(tmp_path, "train")
    root = tmp_path / "train"
    prepare("coco", f"root={root}", *([given.format(root)] if given else []))
    assert table_of(root).class_names == ("cat", "dog")
    assert [row.split for row in table_of(root).rows] == [None, None]
    np.testing.assert_array_equal(mask_of(root, "train_a"), cat_on_dog())


def test_one_split_of_roboflow_below_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roboflow(tmp_path, "train", "valid")
    monkeypatch.chdir(tmp_path)
    prepare("coco", "root=.", f"annotations={tmp_path}/valid/_annotations.coco.json")
    assert {row.split for row in table_of(tmp_path).rows} == {"val"}


def test_a_split_without_annotations_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roboflow(tmp_path, "train", "valid", "test")
    path = tmp_path / "test" / "_annotations.coco.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    prepare("coco", f"root={tmp_path}")
    assert {row.split for row in table_of(tmp_path).rows} == {"train", "val"}


def test_a_root_category_that_is_used_is_a_class(tmp_path: Path) -> None:
    roboflow(tmp_path, "train", "valid")
    path = tmp_path / "valid" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"].append(annotation(9, 1, 0, [rectangle(50, 2, 5, 5)]))
    path.write_text(json.dumps(content))
    prepare("coco", f"root={tmp_path}")
    assert table_of(tmp_path).class_names == ("pets-x1", "cat", "dog")


def test_an_unused_category_below_no_other_stays(tmp_path: Path) -> None:
    content = two_images()
    content["categories"].append({"id": 3, "name": "cow", "supercategory": "cow"})
    write(tmp_path, content)
    prepare("coco", f"root={tmp_path}")
    assert table_of(tmp_path).class_names == ("cat", "dog", "cow")


def test_splits_with_other_categories_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roboflow(tmp_path, "train", "valid")
    path = tmp_path / "valid" / "_annotations.coco.json"
    path.write_text(path.read_text().replace('"dog"', '"hound"'))
    error = refused(capsys, tmp_path)
    assert f"{path} has other categories than" in error
    assert "'dog'" in error


def test_a_table_of_train_alone_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = two_images()
    for number in range(4):
        content["images"].append(image(10 + number, f"{number}.jpg"))
        content["annotations"] += [
            annotation(10 + number, 10 + number, 1, [INNER]),
            annotation(20 + number, 10 + number, 2, [OUTER]),
        ]
    write(tmp_path, content, "annotations/instances_train.json")
    prepare("coco", f"root={tmp_path}")
    assert "a part is held out to val" in capsys.readouterr().out
    assert main(["data", "check", "data=table", f"root={tmp_path}", "csv=wsss/labels.csv"]) == 0


def test_train_and_test_name_the_split_to_validate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roboflow(tmp_path, "train", "test")
    prepare("coco", f"root={tmp_path}")
    assert "data.val_split=test" in capsys.readouterr().out
    arguments = [f"root={tmp_path}", "csv=wsss/labels.csv", "val_split=test"]
    assert main(["data", "check", "data=table", *arguments]) == 0


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["smallest", "last"])
@pytest.mark.parametrize("crowd", ["paint", "ignore", "skip"])
def test_painting_equals_taking_the_first_of_each_pixel(overlap: str, crowd: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        entries, inside = [], []
        for key in range(8):
            here = np.zeros((HEIGHT, WIDTH), bool)
            top, left = rng.integers(0, 30, 2)
            here[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = True
            is_crowd = bool(rng.random() < 0.3)
            entries.append(Instance(key, key % 5 + 1, 1.0, is_crowd, run_lengths(here)))
            inside.append(here)
        order = [k for k in range(8) if crowd == "paint" or not entries[k].crowd]
        order.sort(key=lambda k: -k if overlap == "last" else inside[k].sum())
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        free = np.ones((HEIGHT, WIDTH), bool)
        for k in order:
            expected[inside[k] & free] = entries[k].class_id
            free &= ~inside[k]
        for k in range(8):
            if entries[k].crowd and crowd == "ignore":
                expected[inside[k] & free] = 255
        mask = paint(Picture("x", HEIGHT, WIDTH, entries), overlap=overlap, crowd=crowd)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.slow
def test_looking_over_in_processes_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", two_images())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    prepare("coco", f"root={tmp_path / 'one'}", "jobs=1")
    monkeypatch.setattr(painting, "FEW", 1)
    prepare("coco", f"root={tmp_path / 'two'}", "jobs=2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
