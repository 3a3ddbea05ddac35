"""`wsss data check`: every ailment is found, named in one line with its mend, and counted."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared import contents, prepare
from trees import COCO_IDS, VOC_TRAIN, VOC_VAL, make_coco, make_official_voc, make_photos
from trees import write_photo_table as write_table
from voc_tree import write_mask, write_xml

from wsss.cli import main
from wsss.data.images import mask_png, read_rgb
from wsss.data.prepare.coco import COCO_CLASSES
from wsss.data.voc_module import VOCDataModule


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit status and the lines of a call."""
    capsys.readouterr()
    status = main(["data", "check", *arguments])
    output = capsys.readouterr()
    assert not output.err, output.err
    return status, output.out.splitlines()


def findings(lines: list[str], level: str) -> list[str]:
    return [line for line in lines if line.startswith(f"{level}: ")]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = make_official_voc(tmp_path)
    prepare("voc", f"root={root}")
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = make_coco(tmp_path)
    prepare("coco", f"root={root}")
    return root


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_a_healthy_tree_has_no_error_and_is_left_as_it_is(
    voc: Path, fast: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(voc)
    status, lines = check(capsys, "data=voc", f"root={voc}", *fast)
    assert status == 0
    assert not findings(lines, "error")
    assert contents(voc) == before
    counted = [line for line in findings(lines, "warning") if "count" in line]
    assert "6 images, the field has 10582" in counted[0]
    assert lines[-1].startswith("0 errors")


def test_hashes_are_those_that_a_run_records(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = check(capsys, "data=voc", f"root={voc}")
    data = VOCDataModule(
        name="voc",
        root=voc,
        class_names=[*_voc_classes()],
        train_split="train_aug",
        val_split="val",
        train_transform=lambda rgb, rng: {},
        global_batch_size=1,
    )
    recorded = data.fingerprint()
    for split, what in (
        ("train_aug", "list"),
        ("train_aug", "labels"),
        ("val", "list"),
        ("val", "labels"),
        ("val", "masks"),
    ):
        assert f"sha256 of {split} {what}: {recorded[split][f'{what}_sha256']}" in lines


def _voc_classes() -> tuple[str, ...]:
    from wsss.data.voc import VOC_CLASSES

    return VOC_CLASSES


def break_image(root: Path) -> None:
    path = root / "JPEGImages" / f"{VOC_TRAIN[0]}.jpg"
    path.write_bytes(path.read_bytes()[:-40])


def coloured_mask(root: Path) -> None:
    path = root / "SegmentationClass" / f"{VOC_VAL[0]}.png"
    Image.open(path).convert("RGB").save(path)


def small_mask(root: Path) -> None:
    write_mask(root, VOC_VAL[0], np.zeros((3, 3)))


def id_21(root: Path) -> None:
    with Image.open(root / "JPEGImages" / f"{VOC_VAL[0]}.jpg") as image:
        write_mask(root, VOC_VAL[0], np.full((image.height, image.width), 21))


def without_mask(root: Path) -> None:
    (root / "SegmentationClass" / f"{VOC_VAL[0]}.png").unlink()


def without_image(root: Path) -> None:
    (root / "JPEGImages" / f"{VOC_VAL[1]}.jpg").unlink()


def shared_image(root: Path) -> None:
    path = root / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text(path.read_text() + VOC_VAL[0])


def same_pixels(root: Path) -> None:
    images = root / "JPEGImages"
    shutil.copy(images / f"{VOC_VAL[0]}.jpg", images / f"{VOC_TRAIN[0]}.jpg")


def stale_labels(root: Path) -> None:
    write_xml(root, VOC_TRAIN[0], ["cow"])


def unknown_object(root: Path) -> None:
    (root / "labels_xml.csv").unlink()
    write_xml(root, VOC_TRAIN[0], ["cwo"])


def without_list(root: Path) -> None:
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()


ERRORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "broken image": (break_image, "error: image [train_aug]"),
    "RGB mask": (coloured_mask, "error: mask [val]"),
    "mask of another size": (small_mask, "error: mask [val]"),
    "id above K": (id_21, "error: mask [val]"),
    "missing mask": (without_mask, "error: missing mask [val]: 1 of 2"),
    "missing image": (without_image, "error: missing image [val]: 1 of 2"),
    "image in two splits": (shared_image, "error: overlap [train_aug, val]: 1 images are in both"),
    "same file twice": (same_pixels, "error: overlap [train_aug, val]: 1 images are the same"),
    "stale labels": (stale_labels, "error: labels [train_aug]"),
    "unknown object": (unknown_object, "error: labels [train_aug]"),
    "missing list": (without_list, "error: list [val]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_every_error_is_found(voc: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = ERRORS[case]
    spoil(voc)
    status, lines = check(capsys, "data=voc", f"root={voc}")
    assert status == 1
    assert any(line.startswith(expected) for line in findings(lines, "error"))


def test_all_errors_are_found_in_one_call(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spoil in (break_image, coloured_mask, without_image, stale_labels):
        spoil(voc)
    _, lines = check(capsys, "data=voc", f"root={voc}")
    kinds = {line.split(":")[1].split("[")[0].strip() for line in findings(lines, "error")}
    assert kinds == {"image", "mask", "missing image", "labels"}


def test_masks_that_training_does_not_read_are_a_note(
    voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(voc / "SegmentationClassAug")
    status, lines = check(capsys, "data=voc", f"root={voc}")
    assert status == 0
    assert any("missing mask [train_aug]: 6 of 6" in line for line in findings(lines, "note"))


def test_labels_are_compared_with_masks(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (voc / "labels_xml.csv").unlink()
    write_xml(voc, VOC_VAL[0], ["cow", "cat", "dog"])
    status, lines = check(capsys, "data=voc", f"root={voc}")
    assert status == 0
    text = "\n".join(findings(lines, "warning"))
    assert "labels and masks [val]: 1 of 2 masks show a class that their labels lack" in text
    assert "labels and masks [val]: 1 of 2 masks lack a class that their labels name" in text


def test_palettes_surplus_files_and_pickles_are_notes(
    voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = voc / "SegmentationClass" / f"{VOC_VAL[0]}.png"
    with Image.open(path) as image:
        image.putpalette([value for value in range(256) for _ in range(3)])
        image.save(path)
    (voc / "cls_labels.npy").write_bytes(b"x")
    status, lines = check(capsys, "data=voc", f"root={voc}")
    assert status == 0
    text = "\n".join(findings(lines, "note"))
    assert "another palette" in text
    assert "JPEGImages has 1 files in no split" in text
    assert "cls_labels.npy is never loaded" in text


def raw_ids(root: Path, *, only_low: bool) -> None:
    """Turns contiguous ids back into category ids, as coco2voc writes them."""
    for path in (root / "wsss" / "masks" / "val2014").iterdir():
        with Image.open(path) as image:
            ids = np.asarray(image)
        table = np.array([0, *COCO_IDS], np.uint8)
        shift = 40 if only_low else 77  # classes whose raw ids stay below or go beyond 80
        path.write_bytes(mask_png(table[np.where(ids > 0, (ids - 1) % 3 + shift, 0)]))


def test_raw_category_ids_of_coco_are_recognised(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_ids(coco, only_low=False)
    status, lines = check(capsys, "data=coco", f"root={coco}")
    assert status == 1
    line = next(line for line in findings(lines, "error") if "raw COCO ids [val]" in line)
    assert "wsss data prepare coco" in line


def test_raw_category_ids_in_range_are_recognised_by_labels(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_ids(coco, only_low=True)
    path = coco / "wsss" / "labels.csv"
    names = [COCO_CLASSES[39], COCO_CLASSES[40], COCO_CLASSES[41]]
    rows = path.read_text().splitlines()
    for number, row in enumerate(rows):
        image, _, rest = row.partition(",")
        if "val2014" in image:
            rows[number] = ",".join([image, ";".join(names), *rest.split(",")[1:]])
    path.write_text("\n".join(rows))
    status, lines = check(capsys, "data=coco", f"root={coco}")
    assert status == 1
    assert any("raw COCO ids [val]" in line for line in findings(lines, "error"))


def test_a_table_tells_every_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = make_photos(tmp_path, 6)
    write_table(tmp_path, [*labels[:3], ";", " | ", labels[5]])
    status, lines = check(capsys, "data=table", f"root={tmp_path}", "csv=labels.csv")
    assert status == 1
    assert [line.split(" line ")[1][0] for line in findings(lines, "error")] == ["5", "6"]


def test_a_table_of_other_data_is_reported_row_by_row(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = coco / "wsss" / "labels.csv"
    path.write_text(path.read_text().replace("bicycle", "bycicle"))
    status, lines = check(capsys, "data=coco", f"root={coco}")
    assert status == 1
    assert len(findings(lines, "error")) == 4
    assert all("did you mean 'bicycle'" in line for line in findings(lines, "error")[:3])


def masked_photos(root: Path, values: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Photographs whose masks hold the given values, half of them of each split."""
    make_photos(root, len(values))
    (root / "masks").mkdir()
    lines = ["image,labels,mask,split"]
    for number, (held, label) in enumerate(zip(values, labels, strict=True)):
        mask = np.zeros((48, 56), np.uint8)
        for row, value in enumerate(held):
            mask[row] = value
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        split = "train" if number < len(values) // 2 else "val"
        lines.append(f"photos/{number:03}.jpg,{label},masks/{number}.png,{split}")
    (root / "labels.csv").write_text("\n".join(lines))


def test_masks_of_0_and_255_only_are_an_error_with_its_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked_photos(tmp_path, [[255], [0], [255], [255], [0], [255]], ["cat", "", "cat"] * 2)
    status, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert status == 1
    errors = findings(lines, "error")
    assert [line.split(":")[1] for line in errors] == [" empty masks [train]", " empty masks [val]"]
    assert "none of 2 masks of labelled images shows a pixel of a class" in errors[0]
    assert "only 0 and 255 occur, and 255 means ignored" in errors[0]
    assert "1 for 'cat' (mask[mask == 255] = 1)" in errors[0]


def test_single_masks_without_a_class_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked_photos(tmp_path, [[1], [255], [], [], [1], [1]], ["cat", "cat", "", "cat", "cat", "cat"])
    status, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert status == 0
    warnings = [line for line in findings(lines, "warning") if "empty masks" in line]
    assert "[train]: 1 of 2 masks of labelled images show no pixel" in warnings[0]
    assert "[val]: 1 of 3 masks" in warnings[1]
    assert "only 0 occur, and 0 is background; a pixel of 'cat' must be 1" in warnings[1]


def test_masks_of_several_images_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked_photos(tmp_path, [[1], [1], [1], [1]], ["cat", "", "cat", ""])
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace("masks/2", "masks/0"))
    _, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert any("1 masks belong to more than one image" in line for line in lines)


def test_one_class_without_negatives_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photos(tmp_path, 8)
    write_table(tmp_path, ["crack"] * 8)
    status, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert status == 0
    (line,) = [line for line in findings(lines, "warning") if "negatives" in line]
    assert "crack: in every one of the 6 images" in line
    write_table(tmp_path, ["crack", ""] * 4)
    status, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert status == 0
    assert not findings(lines, "warning")
    (line, _) = findings(lines, "note")
    assert "have an empty labels cell" in line
    assert any("none of them (" in line for line in lines if line.startswith("classes of train"))


def test_an_empty_cell_among_several_classes_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = make_photos(tmp_path, 12)
    write_table(tmp_path, [*labels[:10], "", ""])
    _, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert any("no label [" in line for line in findings(lines, "warning"))


@pytest.mark.parametrize(
    "name", ["a,b", "a=b", "a, b", "(a", "{a}", "[a]", "a b", "a'b", "$a", "a:b"]
)
def test_any_folder_can_be_checked(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / name
    write_table(root, make_photos(root, 12), name="l,1=2.csv")
    status, lines = check(capsys, "data=table", f"root={root}", "csv=l,1=2.csv")
    assert status == 0
    assert any(line.startswith("classes of train: ") for line in lines)


def test_a_healthy_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path, make_photos(tmp_path, 12))
    status, lines = check(capsys, "data=table", f"data.root={tmp_path}")
    assert status == 0
    assert not findings(lines, "error")


def test_many_findings_of_a_kind_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path, make_photos(tmp_path, 12))
    for path in (tmp_path / "photos").iterdir():
        path.write_bytes(b"no image")
    _, lines = check(capsys, "data=table", f"root={tmp_path}")
    train = [line for line in findings(lines, "error") if "image [train]" in line]
    assert len(train) == 4
    assert train[-1].endswith("and 7 more of this kind")


def test_the_built_in_data_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = check(capsys, "data=minivoc", "--fast")
    assert status == 0
    assert not findings(lines, "error")
    assert not findings(lines, "warning")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=vco"], "did you mean voc"),
        (["data=voc", "rot=x"], "did you mean data.root"),
        (["data=voc"], "data.root is missing"),
        (["data=voc", "--fats"], "expected data=NAME"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1


def test_the_doctor_looks_as_closely_as_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow passes over what lies between the parts of a JPEG; a run refuses it."""
    write_table(tmp_path, make_photos(tmp_path))
    path = tmp_path / "photos" / "003.jpg"
    content = path.read_bytes()
    at = content.index(b"\xff\xdb")
    path.write_bytes(content[:at] + b"\0junk" + content[at:])
    read_rgb(path)
    status, lines = check(capsys, "data=table", f"root={tmp_path}")
    assert status == 1
    assert "003.jpg is no complete image" in findings(lines, "error")[0]
