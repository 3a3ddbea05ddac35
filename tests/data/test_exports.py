"""What labelme and CVAT write in VOC or COCO style is read by the same code."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared import contents, in_another_process, prepare
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


def lists(root: Path, **names: str) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "default.txt").unlink(missing_ok=True)
    for split, text in names.items():
        (folder / f"{split}.txt").write_text(text)


def splits(root: Path) -> list[str | None]:
    return [row.split for row in read_table(root / "wsss" / "labels.csv", root).rows]


def test_images_in_no_list_get_a_split_that_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    lists(tmp_path, Train="000\n001\n002\n", Validation="003\n004\n", default="005\n")
    prepare("voc", f"root={tmp_path}")
    assert "warning: 1 images are in none of the lists" in capsys.readouterr().out
    assert splits(tmp_path) == ["train"] * 3 + ["val"] * 2 + ["default"]
    arguments = ["data=table", f"root={tmp_path}", "csv=wsss/labels.csv"]
    assert main(["data", "check", *arguments]) == 0
    assert "warning: splits: 1 of 6 rows" in capsys.readouterr().out


@pytest.mark.parametrize("only", ["Train", "Validation", "Test"])
def test_one_list_alone_leaves_the_splits_to_the_holdout(
    tmp_path: Path, only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    lists(tmp_path, **{only: "000\n001\n002\n"})
    prepare("voc", f"root={tmp_path}")
    assert "no column split" in capsys.readouterr().out
    assert splits(tmp_path) == [None] * 6
    assert main(["data", "check", "data=table", f"root={tmp_path}", "csv=wsss/labels.csv"]) == 0


def test_train_and_test_say_how_to_validate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    lists(tmp_path, Train="000\n001\n002\n", Test="003\n004\n005\n")
    prepare("voc", f"root={tmp_path}")
    assert capsys.readouterr().out.rstrip().endswith("wsss/labels.csv data.val_split=test")


@pytest.mark.parametrize("line", ["photo 5", '"photo 5"', "day 1/photo 5", "day 1\\photo 5"])
def test_names_in_lists_hold_blanks_quotes_and_folders(tmp_path: Path, line: str) -> None:
    cvat_voc(tmp_path)
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        path = tmp_path / folder / f"005.{suffix}"
        target = tmp_path / folder / "day 1" if "day" in line else tmp_path / folder
        target.mkdir(exist_ok=True)
        path.rename(target / f"photo 5.{suffix}")
    lists(tmp_path, Train="000\n001\n002\n003\n", Validation=f"004\n{line}\n")
    prepare("voc", f"root={tmp_path}")
    assert splits(tmp_path).count("val") == 2
    (photo,) = (s for s in table_of(tmp_path).samples("val") if s.image.stem == "photo 5")
    assert photo.image.is_file()
    assert photo.mask is not None
    assert photo.mask.is_file()


def test_listed_names_without_an_image_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    lists(tmp_path, Train="000\n001\n002\nlost\n", Validation="003\n004\n005\n")
    prepare("voc", f"root={tmp_path}")
    assert "1 listed names have no image ('lost' first)" in capsys.readouterr().out


def one_class(root: Path, *, empty: int) -> None:
    """An export of one class whose last masks show nothing."""
    photographs(root)
    (root / "labelmap.txt").write_text("background:0,0,0::\ncrack:200,30,30::\n")
    (root / "SegmentationClass").mkdir()
    for number in range(6):
        mask = np.zeros((48, 56, 3), np.uint8)
        if number < 6 - empty:
            mask[4:20, 9:30] = (200, 30, 30)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{number:03}.png")


def test_one_class_keeps_the_images_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_class(tmp_path, empty=2)
    prepare("voc", f"root={tmp_path}")
    assert "6 images, 1 classes, 2 without an object listed as sh" in capsys.readouterr().out
    rows = read_table(tmp_path / "wsss" / "labels.csv", tmp_path).rows
    assert [row.labels for row in rows] == [("crack",)] * 4 + [()] * 2


def test_an_export_that_shows_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_class(tmp_path, empty=6)
    assert main(["data", "prepare", "voc", f"root={tmp_path}"]) == 2
    assert "no mask or annotation of" in capsys.readouterr().err


def test_a_mended_label_map_makes_all_masks_anew(tmp_path: Path) -> None:
    labels = cvat_voc(tmp_path)
    text = (tmp_path / "labelmap.txt").read_text()
    swapped = text.replace("sky:255,0,10", "sky:9,9,200").replace("apple:9,9,200", "apple:255,0,10")
    (tmp_path / "labelmap.txt").write_text(swapped)
    prepare("voc", f"root={tmp_path}")
    (tmp_path / "labelmap.txt").write_text(text)
    prepare("voc", f"root={tmp_path}")
    check_masks(tmp_path, labels)


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


def label_map(*lines: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))

    return spoil


def two_lists(root: Path) -> None:
    lists(root, Train="000\n001\n", Validation="001\n002\n")


def labelme_names(root: Path) -> None:
    (root / "labelmap.txt").unlink()
    (root / "class_names.txt").write_text("sky\n_background_\nleaf\n")


def small_mask(root: Path) -> None:
    Image.new("RGB", (5, 5)).save(root / "SegmentationClass" / "005.png")


CAT = "cat:255,0,10::"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (label_map(CAT, "dog:255,0,10::"), "line 3 gives 'dog' the colour 255,0,10 again (line 2:"),
        (label_map(CAT, "void:0,0,0::"), "the colour 0,0,0 again (black is background)"),
        (label_map(CAT, "ignored:255,0,10::"), "line 3 gives 'ignored' the colour 255,0,10 again"),
        (label_map(CAT, "cat:1,2,3::"), "labelmap.txt: class_names holds 'cat' twice"),
        (label_map(CAT, "Cat:1,2,3::"), "'cat' and 'Cat', which differ only in case"),
        (label_map(CAT, ":1,2,3::"), "line 3 reads ':1,2,3::'"),
        (label_map(CAT, "dog:1,2,300::"), "line 3 reads 'dog:1,2,300::'"),
        (label_map("background:0,0,0::"), "holds 0 classes"),
        (two_lists, "'001' is listed in"),
        (labelme_names, "has '_background_' after a class"),
        (small_mask, "SegmentationClass/005.png is 5x5"),
        (other_colour, "002.png has the colour (1, 2, 3)"),
        (no_colour, "line 2 reads 'sky:red::'"),
        (no_picture, "002.png has no image"),
        (twins, "002.png share the name '002'"),
        (
            separator_in_a_name,
            "labelmap.txt: labels.csv cannot list the class 'a;b', which holds ; or |",
        ),
    ],
)
def test_bad_exports_are_one_line(
    tmp_path: Path, spoil: "object", expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cvat_voc(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    before = contents(tmp_path)
    assert main(["data", "prepare", "voc", f"root={tmp_path}"]) == 2
    assert contents(tmp_path) == before
    assert not (tmp_path / "wsss").exists()
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert ".wsss.tmp" not in error  # where it is made: no file of the user's
    assert len(error.splitlines()) == 1


def test_two_preparations_at_once_do_not_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = cvat_voc(tmp_path)
    (tmp_path / ".wsss.tmp").mkdir()
    (tmp_path / ".wsss.tmp" / "000.png").write_bytes(b"made by the other process")
    before = contents(tmp_path)
    with in_another_process(tmp_path):
        assert main(["data", "prepare", "voc", f"root={tmp_path}"]) == 2
        assert before.items() <= contents(tmp_path).items()
    assert "is preparing here; wait until it ends" in capsys.readouterr().err
    prepare("voc", f"root={tmp_path}")
    check_masks(tmp_path, labels)


def test_photographs_have_three_classes() -> None:
    assert {*ORDER} == {*CLASSES_OF_PHOTOS}
