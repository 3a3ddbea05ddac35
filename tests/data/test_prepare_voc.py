"""VOC and SBD as they are unpacked become the field's 10,582."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared import contents, in_another_process, prepare, prepare_killed
from trees import AUG, SBD_TRAIN, VOC_TRAIN, VOC_VAL, ids_of, make_official_voc
from voc_tree import write_image, write_mask, write_xml

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.prepare.voc import find_sbd, read_sbd_mask
from wsss.data.voc import VOC_CLASSES, VOCDataset, read_split


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def test_masks_lists_and_labels_are_those_of_the_field(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    prepare("voc", f"root={tmp_path}")
    assert read_split(root, "train_aug") == AUG
    assert "2007_000033" not in AUG  # SBD has it, but it is in VOC's val
    made = {path.stem for path in (root / "SegmentationClassAug").iterdir()}
    assert made == {*AUG, *VOC_VAL}
    for name in made:
        mask = read(root / "SegmentationClassAug" / f"{name}.png")
        own = root / "SegmentationClass" / f"{name}.png"
        if own.is_file():  # VOC's mask counts, with its void
            assert (
                own.read_bytes()
                == own.parent.with_name(own.parent.name + "Aug").joinpath(own.name).read_bytes()
            )
            continue
        expected = ids_of(name, *mask.shape)
        expected[26:, 30:] = 15
        np.testing.assert_array_equal(mask, expected)
    data = VOCDataset(
        root=root,
        split="train_aug",
        class_names=VOC_CLASSES,
        with_mask=True,
        mask_folder="SegmentationClassAug",
    )
    for row, name in zip(data.labels, AUG, strict=True):
        in_xml = {int(i) - 1 for i in np.unique(ids_of(name, 40, 40)) if i}
        assert {*np.flatnonzero(row)} == in_xml
    data.check_contents()


def test_a_second_call_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_official_voc(tmp_path)
    prepare("voc", f"root={tmp_path}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    prepare("voc", f"root={tmp_path}")
    assert "0 masks made" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_killed_call_goes_on_and_ends_equal(tmp_path: Path, number: int) -> None:
    straight, killed = (make_official_voc(tmp_path / name) for name in ("straight", "killed"))
    prepare("voc", f"root={straight}")
    prepare_killed(number, "voc", f"root={killed}")
    assert contents(killed) != contents(straight)
    prepare("voc", f"root={killed}")
    assert contents(killed) == contents(straight)


@pytest.mark.parametrize("place", ["VOCdevkit/SBD", "sbd/dataset", "VOCdevkit/VOC2012/sbd"])
def test_sbd_is_found_where_people_unpack_it(tmp_path: Path, place: str) -> None:
    root = make_official_voc(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "benchmark_RELEASE" / "dataset", tmp_path / place)
    assert find_sbd(root, None) == tmp_path / place


def test_two_preparations_at_once_do_not_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_official_voc(tmp_path)
    with in_another_process(root):
        assert main(["data", "prepare", "voc", f"root={tmp_path}"]) == 2
    assert "is preparing here; wait until it ends" in capsys.readouterr().err
    assert not (root / "SegmentationClassAug").exists()


def test_sbd_may_be_given(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    shutil.move(tmp_path / "benchmark_RELEASE", tmp_path / "far" / "benchmark_RELEASE")
    prepare("voc", f"root={root}", f"sbd={tmp_path / 'far'}")
    assert read_split(root, "train_aug") == AUG


def test_a_folder_of_masks_made_by_others_is_enough(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    prepare("voc", f"root={root}")
    before = contents(root)
    shutil.rmtree(tmp_path / "benchmark_RELEASE")
    for path in ("ImageSets/Segmentation/train_aug.txt", "labels_xml.csv"):
        (root / path).unlink()
    prepare("voc", f"root={root}")
    assert contents(root) == before


def test_without_sbd_voc_alone_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_official_voc(tmp_path, sbd=False)
    prepare("voc", f"root={root}", "sbd=none")
    assert not (root / "SegmentationClassAug").exists()
    assert not (root / "ImageSets" / "Segmentation" / "train_aug.txt").exists()
    assert len((root / "labels_xml.csv").read_text().splitlines()) == 6
    said = capsys.readouterr().out
    settings = ["data.train_split=train", "data.train_mask_folder=SegmentationClass"]
    assert f"without SBD: give {' '.join(settings)}" in said
    check = ["data", "check", "data=voc", f"root={root}"]
    assert main(check) == 1
    assert "list: " in (said := capsys.readouterr().out)
    assert "without SBD give data.train_split=train" in said
    assert main([*check, *settings]) == 0, "what is advised is enough"


def test_labels_of_masks_are_declared_and_then_no_mask_is_needed(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    prepare("voc", f"root={root}", "labels=mask")
    settings = {"root": root, "split": "train_aug", "class_names": VOC_CLASSES}
    masks = {"mask_folder": "SegmentationClassAug", "label_source": "mask"}
    read_from_table = VOCDataset(**settings, **masks).labels  # type: ignore[arg-type]
    (root / "labels_mask.csv").rename(root / "kept.csv")
    np.testing.assert_array_equal(
        read_from_table,
        VOCDataset(**settings, **masks).labels,  # type: ignore[arg-type]
    )
    assert (read_from_table != VOCDataset(**settings).labels).any()  # type: ignore[arg-type]
    (root / "kept.csv").rename(root / "labels_mask.csv")
    shutil.rmtree(root / "SegmentationClassAug")
    np.testing.assert_array_equal(
        read_from_table,
        VOCDataset(**settings, **masks).labels,  # type: ignore[arg-type]
    )


def test_a_list_that_is_there_is_checked_and_kept(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    path = root / "ImageSets" / "Segmentation" / "train_aug.txt"
    path.write_text("\n".join(reversed(AUG)))
    prepare("voc", f"root={root}")
    assert read_split(root, "train_aug") == AUG[::-1]
    path.write_text("\n".join([*AUG[1:], "2008_000006"]))
    assert main(["data", "prepare", "voc", f"root={root}"]) == 2
    assert read_split(root, "train_aug") == [*AUG[1:], "2008_000006"]


def mat(root: Path, name: str = SBD_TRAIN[1]) -> Path:
    return root.parents[1] / "benchmark_RELEASE" / "dataset" / "cls" / f"{name}.mat"


def truncate(root: Path) -> Path:
    mat(root).write_bytes(mat(root).read_bytes()[:200])
    return mat(root)


def replace_by_html(root: Path) -> Path:
    mat(root).write_text("<html>404</html>")
    return mat(root)


def other_structure(root: Path) -> Path:
    from scipy.io import savemat

    savemat(mat(root), {"GTinst": {"Segmentation": np.zeros((3, 3))}})
    return mat(root)


def other_ids(root: Path) -> Path:
    from scipy.io import savemat

    savemat(mat(root), {"GTcls": {"Segmentation": np.full((31, 40), 21, np.uint8)}})
    return mat(root)


def without_mat(root: Path) -> Path:
    mat(root).unlink()
    return mat(root)


def other_size(root: Path) -> Path:
    return write_image(root, SBD_TRAIN[1], height=20, width=20)


def without_image(root: Path) -> Path:
    path = root / "JPEGImages" / f"{SBD_TRAIN[1]}.jpg"
    path.unlink()
    return path


def without_sbd(root: Path) -> Path:
    shutil.rmtree(root.parents[1] / "benchmark_RELEASE")
    return root / "SegmentationClassAug"


def overlapping_lists(root: Path) -> Path:
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text(VOC_VAL[0])
    return Path("val and test share 1 images")


def train_in_test(root: Path) -> Path:
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text(VOC_TRAIN[0])
    return Path("the lists train and test share 1 images")


def coloured_mask(root: Path) -> Path:
    path = root / "SegmentationClass" / f"{VOC_TRAIN[1]}.png"
    Image.open(path).convert("RGB").save(path)
    return path


def unknown_object(root: Path) -> Path:
    return write_xml(root, VOC_TRAIN[1], ["unicorn"])


def without_objects(root: Path) -> Path:
    return write_xml(root, SBD_TRAIN[2], [])


def strange_sbd_list(root: Path) -> Path:
    path = root.parents[1] / "benchmark_RELEASE" / "dataset" / "val.txt"
    path.write_bytes(b"\xff\xfe2\x00")
    return path


SPOILT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated .mat": (truncate, "no SBD annotation"),
    "no MATLAB file": (replace_by_html, "no SBD annotation"),
    "other structure": (other_structure, "no SBD annotation"),
    "ids above 20": (other_ids, "other ids than 0..20"),
    "missing .mat": (without_mat, "is missing"),
    "image of another size": (other_size, "of the same images"),
    "missing image": (without_image, "is missing"),
    "no SBD at all": (without_sbd, "sbd=none"),
    "lists that overlap": (overlapping_lists, "expected none"),
    "train in test": (train_in_test, "expected none"),
    "RGB mask": (coloured_mask, "has mode RGB"),
    "unknown object": (unknown_object, "'unicorn'"),
    "no object": (without_objects, "no label"),
    "list that is no text": (strange_sbd_list, "cannot be read as text"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_downloads_are_one_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_official_voc(tmp_path)
    spoil, expected = SPOILT[case]
    path = spoil(root)
    assert main(["data", "prepare", "voc", f"root={root}", "jobs=1"]) == 2
    error = capsys.readouterr().err.strip()
    assert str(path) in error
    assert expected in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("labels=json", "expected xml or mask"),
        ("labels=cls_labels.npy", "never loaded"),
        ("sbd=nowhere", "holds no cls/"),
        ("jobs=0", "at least 1 process"),
        ("lables=xml", "did you mean labels"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, argument: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_official_voc(tmp_path)
    assert main(["data", "prepare", "voc", f"root={root}", argument]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1


def test_mask_of_sbd_is_read_as_ids(tmp_path: Path) -> None:
    root = make_official_voc(tmp_path)
    mask = read_sbd_mask(mat(root))
    assert mask.dtype == np.uint8
    with pytest.raises(WSSSError, match="is missing"):
        read_sbd_mask(tmp_path / "none.mat")
    write_mask(root, "x", mask)
    np.testing.assert_array_equal(read(root / "SegmentationClass" / "x.png"), mask)
