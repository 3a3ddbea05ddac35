import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from voc_tree import CLASSES, make_voc, write_image, write_mask, write_xml

from wsss.core.errors import WSSSError
from wsss.data.builtin import MINIVOC_CLASSES, minivoc_root
from wsss.data.voc import (
    VOC_CLASSES,
    VOCDataset,
    find_voc_root,
    labels_from_xml,
    read_split,
)


def dataset(root: Path, split: str = "val", **changes: Any) -> VOCDataset:
    return VOCDataset(
        **({"root": root, "split": split, "class_names": CLASSES, "with_mask": True} | changes)
    )


def test_voc_has_its_twenty_classes_in_order() -> None:
    assert len(VOC_CLASSES) == 20
    assert VOC_CLASSES[14] == "person"  # mask id 15
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


@pytest.mark.parametrize("levels_up", [0, 1, 2])
def test_root_is_found_from_each_level(tmp_path: Path, levels_up: int) -> None:
    root = make_voc(tmp_path)
    given = [root, root.parent, root.parent.parent][levels_up]
    assert find_voc_root(given) == root
    assert len(dataset(given)) == 3


def test_list_ignores_empty_lines_and_needs_no_final_newline(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    path = root / "ImageSets" / "Segmentation" / "odd.txt"
    path.write_bytes(b"\xef\xbb\xbfimg001\r\n\n  img000 \n\nimg002")
    assert read_split(root, "odd") == ["img001", "img000", "img002"]


def test_names_in_lists_may_hold_blanks(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for folder, suffix in (
        ("JPEGImages", "jpg"),
        ("Annotations", "xml"),
        ("SegmentationClass", "png"),
    ):
        (root / folder / f"img007.{suffix}").rename(root / folder / f"photo 1 (2).{suffix}")
    path = root / "ImageSets" / "Segmentation" / "odd.txt"
    path.write_text('img006\n"photo 1 (2)"\n')
    assert read_split(root, "odd") == ["img006", "photo 1 (2)"]
    assert dataset(root, "odd")[1]["labels"].tolist() == [0, 1, 0]
    path.write_text("photo 1 (2)\n")
    assert dataset(root, "odd")[0]["name"] == "photo 1 (2)"
    path.write_text("img006  1\n")  # VOC's Main lists of classes
    with pytest.raises(WSSSError, match="one name a line and no further column"):
        dataset(root, "odd")
    path.write_text("img006.jpg\n")
    with pytest.raises(WSSSError, match=r"there is 'img006\.jpg', name it so"):
        dataset(root, "odd")


def test_list_may_lie_elsewhere(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "data")
    (tmp_path / "mine.txt").write_text("img004\nimg002\n")
    data = dataset(root, str(tmp_path / "mine.txt"))
    assert [data[0]["name"], data[1]["name"]] == ["img004", "img002"]


def test_labels_count_every_object_once_also_difficult_ones(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    path = write_xml(root, "img000", ["person", "bottle", "person"], difficult=1)
    assert labels_from_xml(path, CLASSES).tolist() == [1, 0, 1]


def test_labels_can_come_from_masks(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    shutil.rmtree(root / "Annotations")
    mask = np.zeros((40, 56), np.uint8)
    mask[0, 0], mask[1, 1], mask[2, 2] = 1, 3, 255
    write_mask(root, "img006", mask)
    data = dataset(root, label_source="mask")
    assert data.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_item_of_evaluation(tmp_path: Path) -> None:
    item = dataset(make_voc(tmp_path))[1]
    assert item["name"] == "img007"
    assert item["index"] == 1
    assert item["rgb"].shape == (40, 57, 3)
    assert item["image"].shape == (3, 40, 57)
    assert item["mask"].dtype == torch.int64
    assert item["mask"][15, 15] == 2
    assert item["labels"].tolist() == [0, 1, 0]


def test_without_masks_none_is_opened_or_needed(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for path in (root / "SegmentationClass").iterdir():
        path.write_bytes(b"not an image")
    data = dataset(root, with_mask=False)
    assert "mask" not in data[0]
    shutil.rmtree(root / "SegmentationClass")
    assert "mask" not in dataset(root, with_mask=False)[2]


def test_transform_gets_a_stream_of_epoch_and_index(tmp_path: Path) -> None:
    def draw(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"draw": torch.tensor(rng.random())}

    root = make_voc(tmp_path)
    data = dataset(root, with_mask=False, transform=draw, seed=1)
    assert data[(2, 1)]["draw"] == data[(2, 1)]["draw"]
    assert data[0]["draw"] == data[(0, 0)]["draw"]
    other = dataset(root, with_mask=False, transform=draw, seed=2)
    draws = [d["draw"].item() for d in (data[(0, 0)], data[(0, 1)], data[(1, 0)], other[(0, 0)])]
    assert len(set(draws)) == 4
    with pytest.raises(ValueError, match="native size"):
        dataset(root, transform=draw)


def remove_images(root: Path) -> Path:
    shutil.rmtree(root / "JPEGImages")
    return root


def remove_file(relative: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        (root / relative).unlink()
        return root / relative

    return spoil


def remove_folder(relative: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        shutil.rmtree(root / relative)
        return root / relative

    return spoil


def write_list(content: bytes) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        path = root / "ImageSets" / "Segmentation" / "val.txt"
        path.write_bytes(content)
        return path

    return spoil


def write_annotation(text: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        path = root / "Annotations" / "img007.xml"
        path.write_text(text)
        return path

    return spoil


LIST = "ImageSets/Segmentation/val.txt"
AT_CONSTRUCTION: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no images folder": (remove_images, "holds no JPEGImages"),
    "no list": (remove_file(LIST), r"split 'val' is missing \(its folder has train\)"),
    "entry without image": (remove_file("JPEGImages/img007.jpg"), r"is missing \(1 of 3 entries"),
    "entry without XML": (remove_file("Annotations/img008.xml"), r"is missing \(1 of 3 entries"),
    "entry without mask": (remove_file("SegmentationClass/img006.png"), r"missing \(1 of 3"),
    "no mask folder": (remove_folder("SegmentationClass"), "cannot be read"),
    "no annotation folder": (remove_folder("Annotations"), "cannot be read"),
    "empty list": (write_list(b"\n \n"), "is empty"),
    "doubled name": (write_list(b"img006\nimg007\nimg006\n"), r"twice \(lines 1 and 3\)"),
    "list of pairs": (write_list(b"/JPEGImages/a.jpg /SegmentationClassAug/a.png\n"), "line 1 "),
    "list is no text": (write_list(b"\xff\xd8\xff\xe0"), "cannot be read as text"),
    "NUL in a list": (write_list(b"img006\nimg\0007\n"), "line 2 has a NUL character; save the"),
    "list of UTF-16": (write_list("img006\n".encode("utf-16-le")), "line 1 has a NUL character"),
    "image without labels": (write_annotation("<annotation/>"), "gives image 'img007' no label"),
    "broken XML": (write_annotation("<annotation><obj"), "cannot be read"),
    "unknown encoding": (write_annotation('<?xml version="1.0" encoding="x"?><a/>'), "cannot be"),
    "encoding of several bytes": (
        write_annotation('<?xml version="1.0" encoding="gbk"?><a/>'),
        "cannot be read",
    ),
    "unknown class": (
        write_annotation("<annotation><object><name>carr</name></object></annotation>"),
        "'carr', which is none of the 3 classes",
    ),
}


@pytest.mark.parametrize("case", AT_CONSTRUCTION)
def test_bad_data_is_named_before_anything_is_read(tmp_path: Path, case: str) -> None:
    root = make_voc(tmp_path)
    spoil, expected = AT_CONSTRUCTION[case]
    path = spoil(root)
    with pytest.raises(WSSSError, match=expected) as error:
        dataset(root)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=f"data folder {tmp_path}/none is missing"):
        dataset(tmp_path / "none")


def test_image_without_labels_is_found_in_masks_too(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    path = write_mask(root, "img007", np.full((40, 57), 255))
    with pytest.raises(WSSSError, match="gives image 'img007' no label") as error:
        dataset(root, label_source="mask")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a", "b", "a"), "'a' twice"),
        ((), "holds 0 classes"),
        ([str(i) for i in range(255)], "1 to"),
    ],
)
def test_bad_class_names_are_refused(tmp_path: Path, names: Any, expected: str) -> None:
    with pytest.raises(WSSSError, match=expected):
        dataset(make_voc(tmp_path), class_names=names)


def corrupt_jpeg(root: Path) -> Path:
    path = root / "JPEGImages" / "img007.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return path


def coloured_mask(root: Path) -> Path:
    path = root / "SegmentationClass" / "img007.png"
    Image.open(path).convert("RGB").save(path)
    return path


def small_mask(root: Path) -> Path:
    return write_mask(root, "img007", np.ones((40, 50)))


def unknown_id(root: Path) -> Path:
    return write_mask(root, "img007", np.full((40, 57), 4))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (corrupt_jpeg, "cannot be decoded"),
        (coloured_mask, "has mode RGB"),
        (small_mask, "is 50x40"),
        (unknown_id, "holds class id 4"),
    ],
)
def test_bad_pixels_are_named_when_read(
    tmp_path: Path, spoil: Callable[[Path], Path], expected: str
) -> None:
    root = make_voc(tmp_path)
    path = spoil(root)
    data = dataset(root)
    data[0]
    with pytest.raises(WSSSError, match=expected) as error:
        data[1]
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_image_of_one_pixel_is_read(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    write_image(root, "img006", height=1, width=1)
    write_mask(root, "img006", np.ones((1, 1)))
    assert dataset(root)[0]["image"].shape == (3, 1, 1)


@pytest.mark.parametrize("split", ["train", "val", "val_unseen"])
def test_minivoc_is_read_by_the_same_code(split: str) -> None:
    data = VOCDataset(root=minivoc_root(), split=split, class_names=MINIVOC_CLASSES, with_mask=True)
    assert MINIVOC_CLASSES == (
        "bottle", "car", "chair", "diningtable", "person", "pottedplant", "sofa", "tvmonitor",
    )  # fmt: skip
    assert len(data) >= 100
    assert data.labels.sum(0).min() >= 5  # every class occurs
    for index in range(0, len(data), 25):
        item = data[index]
        in_mask = {int(i) for i in item["mask"].unique()} - {0, 255}
        assert in_mask == {k + 1 for k in range(8) if item["labels"][k]}


def test_minivoc_splits_share_no_image() -> None:
    root = find_voc_root(minivoc_root())
    names = [set(read_split(root, split)) for split in ("train", "val", "val_unseen")]
    assert sum(map(len, names)) == len(set().union(*names))
