"""What labelme and CVAT write in VOC or COCO style is read by the same code."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared import contents, prepare
from trees import CLASSES_OF_PHOTOS, coco_instances, make_photos, rectangle
from voc_tree import write_xml

from wsss.cli import main
from wsss.core.files import write_atomically
from wsss.data.images import mask_png
from wsss.data.table import read_table
from wsss.data.table_module import TableDataModule

COLOURS = {"background": (0, 0, 0), "sky": (255, 0, 10), "leaf": (0, 7, 0), "apple": (9, 9, 200)}
ORDER = ("sky", "leaf", "apple")  # of the tools' files, not alphabetical


def ids_of(label: str) -> np.ndarray:
    mask = np.zeros((48, 56), np.uint8)
    mask[4:20, 9:30] = ORDER.index(label) + 1
    return mask


def photographs(root: Path, count: int = 6) -> list[str]:
    labels = make_photos(root, count)
    (root / "photos").rename(root / "JPEGImages")
    return labels


def labelme_voc(root: Path) -> list[str]:
    """As labelme2voc writes it; the last photograph holds nothing."""
    labels = photographs(root)
    (root / "class_names.txt").write_text("\n".join(["_background_", *ORDER]))
    for number, label in enumerate(labels):
        mask = ids_of(label)
        mask[0, 0] = 255
        if number == len(labels) - 1:
            mask[mask < 255] = 0
        write_atomically(root / "SegmentationClass" / f"{number:03}.png", mask_png(mask))
    return labels


def cvat_voc(root: Path, *, indexed: bool = False) -> list[str]:
    """As CVAT's "Segmentation mask 1.1" writes it: masks in the label map's colours."""
    labels = photographs(root)
    lines = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in COLOURS.items()]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines))
    (root / "SegmentationClass").mkdir()
    palette = np.array(list(COLOURS.values()), np.uint8)
    for number, label in enumerate(labels):
        picture = Image.fromarray(palette[ids_of(label)])
        if indexed:  # another order of the palette than that of the classes
            picture = picture.quantize(8)
        picture.save(root / "SegmentationClass" / f"{number:03}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    lists.joinpath("default.txt").write_text("".join(f"{n:03}\n" for n in range(len(labels))))
    return labels


def table_of(root: Path) -> TableDataModule:
    return TableDataModule(
        name="table",
        root=root,
        csv="wsss/labels.csv",
        train_transform=lambda rgb, rng: {},
        global_batch_size=1,
    )


def check_masks(root: Path, labels: list[str]) -> None:
    data = table_of(root)
    assert data.class_names == ORDER
    names = {sample.name for split in ("train", "val") for sample in data.samples(split)}
    assert len(names) == len(labels)
    for split in ("train", "val"):
        for batch in data.eval_dataloader(split):
            label = labels[int(batch["name"][0][-3:])]
            expected = ids_of(label)
            mask = batch["mask"][0].numpy()
            np.testing.assert_array_equal(mask[mask < 255], expected[mask < 255])
            assert batch["labels"][0].argmax() == ORDER.index(label)


def test_labelme_in_voc_style(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = labelme_voc(tmp_path)
    prepare("voc", f"root={tmp_path}")
    assert "1 without an object left out" in capsys.readouterr().out
    check_masks(tmp_path, labels[:-1])
    assert not (tmp_path / "wsss" / "masks").exists()  # its masks are indices already


def test_labelme_before_5_keeps_its_masks_in_another_folder(tmp_path: Path) -> None:
    labels = labelme_voc(tmp_path)
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassPNG")
    (tmp_path / "SegmentationClass").mkdir()
    np.save(tmp_path / "SegmentationClass" / "000.npy", ids_of(labels[0]).astype(np.int32))
    prepare("voc", f"root={tmp_path}")
    check_masks(tmp_path, labels[:-1])


def test_images_without_a_mask_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    (tmp_path / "SegmentationClass" / "004.png").unlink()
    prepare("voc", f"root={tmp_path}")
    assert "5 images, 3 classes, 1 without an object left out" in capsys.readouterr().out


@pytest.mark.parametrize("indexed", [False, True])
def test_cvat_in_voc_style(tmp_path: Path, indexed: bool) -> None:
    labels = cvat_voc(tmp_path, indexed=indexed)
    prepare("voc", f"root={tmp_path}")
    check_masks(tmp_path, labels)
    before = contents(tmp_path)
    prepare("voc", f"root={tmp_path}")
    assert contents(tmp_path) == before


def test_lists_of_the_export_become_splits(tmp_path: Path) -> None:
    cvat_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "Train.txt").write_text("000\n001\n002\n003\n")
    (lists / "Validation.txt").write_text("004\n005\n")
    prepare("voc", f"root={tmp_path}")
    assert [s.name for s in table_of(tmp_path).samples("val")] == [
        "JPEGImages/004",
        "JPEGImages/005",
    ]


def test_cvat_boxes_are_image_labels(tmp_path: Path) -> None:
    labels = cvat_voc(tmp_path)
    for path in (tmp_path / "SegmentationClass").iterdir():
        path.unlink()
    (tmp_path / "Annotations").mkdir()
    for number, label in enumerate(labels):
        write_xml(tmp_path, f"{number:03}", [label])
    prepare("voc", f"root={tmp_path}")
    rows = read_table(tmp_path / "wsss" / "labels.csv", tmp_path).rows
    assert [row.labels for row in rows] == [(label,) for label in labels]
    assert all(row.sample.mask is None for row in rows)


def coco_style(root: Path, *, tool: str) -> list[str]:
    """As labelme2coco and CVAT's "COCO 1.0" lay it out."""
    labels = make_photos(root, 6)
    categories = [(number, name) for number, name in enumerate(["_background_", *ORDER])]
    if tool == "cvat":
        categories = [(number * 3 + 1, name) for number, name in enumerate(ORDER)]
    keys = {name: key for key, name in categories}
    content = coco_instances("x", 1, categories=categories)
    folder = {"labelme": "JPEGImages", "cvat": "images"}[tool]
    (root / "photos").rename(root / folder)
    content["images"], content["annotations"] = [], []
    for number, label in enumerate(labels):
        prefix = "JPEGImages/" if tool == "labelme" else ""
        file_name = f"{prefix}{number:03}.jpg"
        content["images"].append({"id": number, "file_name": file_name, "height": 48, "width": 56})
        content["annotations"].append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": keys[label],
                "segmentation": [rectangle(9, 4, 21, 16)],
                "area": 336.0,
                "iscrowd": 0,
            }
        )
    name = {"labelme": "annotations.json", "cvat": "annotations/instances_default.json"}[tool]
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return labels


@pytest.mark.parametrize("tool", ["labelme", "cvat"])
def test_coco_style(tmp_path: Path, tool: str) -> None:
    labels = coco_style(tmp_path, tool=tool)
    prepare("coco", f"root={tmp_path}")
    check_masks(tmp_path, labels)


def other_colour(root: Path) -> None:
    Image.new("RGB", (56, 48), (1, 2, 3)).save(root / "SegmentationClass" / "002.png")


def no_colour(root: Path) -> None:
    (root / "labelmap.txt").write_text("background:0,0,0::\nsky:red::\n")


def no_picture(root: Path) -> None:
    (root / "JPEGImages" / "002.jpg").unlink()


def twins(root: Path) -> None:
    Image.new("RGB", (56, 48)).save(root / "JPEGImages" / "002.png")


def separator_in_a_name(root: Path) -> None:
    (root / "labelmap.txt").write_text((root / "labelmap.txt").read_text().replace("sky", "a;b"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (other_colour, "002.png has the colour (1, 2, 3)"),
        (no_colour, "line 2 reads 'sky:red::'"),
        (no_picture, "002.png has no image"),
        (twins, "002.png share the name '002'"),
        (separator_in_a_name, "the class 'a;b' holds ; or |"),
    ],
)
def test_bad_exports_are_one_line(
    tmp_path: Path, spoil: "object", expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    assert main(["data", "prepare", "voc", f"root={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1


def test_photographs_have_three_classes() -> None:
    assert {*ORDER} == {*CLASSES_OF_PHOTOS}
