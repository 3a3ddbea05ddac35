"""Own data: the CSV, what is refused in it, and the data module on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trees import CLASSES_OF_PHOTOS, make_photos, write_photo_table

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.data.images import mask_png
from wsss.data.table import read_table
from wsss.data.table_module import TableDataModule


def whole(rgb: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"image": torch.from_numpy(rgb[:40, :40].copy())}


def module(root: Path, **changes: Any) -> TableDataModule:
    settings: dict[str, Any] = {
        "name": "table",
        "root": root,
        "csv": "labels.csv",
        "train_transform": whole,
        "global_batch_size": 2,
    }
    return TableDataModule(**(settings | changes))


def write(root: Path, *lines: str, name: str = "labels.csv") -> Path:
    path = root / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_have_two_separators_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    text = 'image,labels,mask\r\n"a,b/1.jpg", cat ;dog,m/1.png\r\n\r\nc.png,dog|cat|dog,\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = read_table(path, tmp_path, ["cat", "dog"])
    first, second = table.rows
    assert first.sample.name == "a,b/1"
    assert first.sample.image == tmp_path / "a,b" / "1.jpg"
    assert first.sample.mask == tmp_path / "m" / "1.png"
    assert first.labels == ("cat", "dog")
    assert second.sample.mask is None
    assert second.labels == ("dog", "cat")
    assert table.class_names == ("cat", "dog")


def test_order_of_classes_is_given_of_a_file_or_alphabetical(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, "image,labels", "1.jpg,b;a")
    assert read_table(path, tmp_path).class_names == ("a", "b")
    (tmp_path / "classes.txt").write_text("b\na\nc\n")
    assert read_table(path, tmp_path).class_names == ("b", "a", "c")
    assert read_table(path, tmp_path, ["a", "b"]).class_names == ("a", "b")


BAD = {
    "no column": (["image,label;s", "1.jpg,a"], "no column 'labels'"),
    "semicolons": (["image;labels", "1.jpg;a"], "separated by commas"),
    "empty file": ([""], "no column 'image'"),
    "mistyped column": (["image,labels,spilt", "1.jpg,a,val"], "did you mean 'split'"),
    "column twice": (["image,labels,image", "1.jpg,a,2.jpg"], "'image' twice"),
    "no rows": (["image,labels"], "no row"),
    "too many fields": (["image,labels", "1.jpg,a,b"], "line 2 has 3 fields, expected 2"),
    "unknown class": (["image,labels", "1.jpg,appel"], "did you mean 'apple'"),
    "empty labels": (["image,labels", "1.jpg,apple", "2.jpg, ;"], "line 3 gives '2' no label"),
    "listed twice": (["image,labels", "1.jpg,apple", "./1.jpg,leaf"], "again (first in line 2)"),
    "same name": (["image,labels", "1.jpg,apple", "1.png,leaf"], "again (first in line 2)"),
    "absolute path": (["image,labels", "/etc/passwd,apple"], "line 2 names '/etc/passwd'"),
    "path upwards": (["image,labels", "x/../../1.jpg,apple"], "below the data's root"),
    "mask outside": (["image,labels,mask", "1.jpg,apple,../m.png"], "below the data's root"),
    "no image": (["image,labels", ",apple"], "line 2 names ''"),
    "path of Windows": (
        ["image,labels", "C:\\\\data\\\\1.jpg,apple"],
        "an absolute path of Windows",
    ),
    "backslashes upwards": (["image,labels", "..\\\\1.jpg,apple"], "below the data's root"),
    "empty split": (["image,labels,split", "1.jpg,apple,"], "line 2 has no split"),
    "open quote": (["image,labels", '"1.jpg,apple'], "is no CSV"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line(tmp_path: Path, case: str) -> None:
    lines, expected = BAD[case]
    path = write(tmp_path, *lines)
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path, ["apple", "leaf"])
    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels", "1.jpg,Cat", "2.jpg,cat")
    with pytest.raises(WSSSError, match="differ only in case"):
        read_table(path, tmp_path)


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels,mask", "a\\b\\1.jpg,x,m\\1.png", "c\\2.jpg,x,")
    (tmp_path / "c\\2.jpg").touch()  # a file of that very name, as bad archives unpack them
    first, second = (row.sample for row in read_table(path, tmp_path).rows)
    assert (first.name, first.image) == ("a/b/1", tmp_path / "a" / "b" / "1.jpg")
    assert first.mask == tmp_path / "m" / "1.png"
    assert second.image == tmp_path / "c\\2.jpg"


def test_an_empty_cell_says_that_no_class_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels", "1.jpg,", "2.jpg,cat", "3.jpg,  ")
    rows = read_table(path, tmp_path).rows
    assert [row.labels for row in rows] == [(), ("cat",), ()]
    labels_of = module(tmp_path, global_batch_size=1).label_reader()
    assert [labels_of(row.sample).tolist() for row in rows] == [[0], [1], [0]]
    path = write(tmp_path, "image,labels", "1.jpg,", "2.jpg,")
    with pytest.raises(WSSSError, match="no label in any row"):
        read_table(path, tmp_path)


def test_other_encodings_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    with pytest.raises(WSSSError, match="cannot be read"):
        read_table(path, tmp_path)
    path.write_bytes("image,labels\n1.jpg,Bär\n".encode("latin-1"))
    with pytest.raises(WSSSError, match="not UTF-8"):
        read_table(path, tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".pkl"])
def test_a_pickle_is_never_loaded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cls_labels{suffix}"
    with path.open("wb") as stream:
        np.save(stream, np.array({"2007_000032": np.ones(20)}, dtype=object), allow_pickle=True)
    with pytest.raises(WSSSError, match=r"never loaded.*wsss data prepare") as error:
        read_table(path, tmp_path)
    assert str(path) in str(error.value)


def test_no_code_of_ours_loads_pickles() -> None:
    import wsss

    # CAM folders of IRN and PSA are pickled dictionaries; what reads them builds nothing but arrays
    # (tests/evaluation/test_folders.py)
    reader = Path("evaluation/folders.py")
    package = Path(str(wsss.__file__)).parent
    sources = [p for p in package.rglob("*.py") if p.relative_to(package) != reader]
    text = "".join(path.read_text() for path in sources)
    assert "allow_pickle=True" not in text + (package / reader).read_text()
    assert "weights_only=False" not in text
    assert "import pickle" not in text


def test_all_problems_can_be_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "image,labels", "1.jpg,appel", "2.jpg,apple", "/x.jpg,leaf")
    table = read_table(path, tmp_path, ["apple", "leaf"], all_problems=True)
    assert [row.line for row in table.rows] == [3]
    assert [f"line {p.split(' line ')[1][0]}" for p in table.problems] == ["line 2", "line 4"]


def names(data: TableDataModule, split: str) -> list[str]:
    return [sample.name for sample in data.samples(split)]


def test_holdout_is_fixed_and_leaves_every_class_an_image(tmp_path: Path) -> None:
    labels = [*make_photos(tmp_path, 20)[:19], "rare"]
    write_photo_table(tmp_path, labels)
    data = module(tmp_path)
    train, val = names(data, "train"), names(data, "val")
    assert sorted([*train, *val]) == [f"photos/{i:03}" for i in range(20)]
    assert len(val) == 4
    assert "photos/019" in train
    assert names(module(tmp_path, seed=5), "val") == val
    assert len(names(module(tmp_path, holdout=0.5), "val")) == 10
    with pytest.raises(WSSSError, match=r"holdout=1\.0: expected a number less than 1"):
        module(tmp_path, holdout=1.0)


def test_holdout_leaves_an_image_without_a_class(tmp_path: Path) -> None:
    rows = [f"{number}.jpg,{'' if number in (2, 3) else 'crack'}" for number in range(12)]
    write(tmp_path, "image,labels", *rows)
    for share in (0.2, 0.5, 0.9):
        train = names(module(tmp_path, holdout=share), "train")
        assert {"2", "3"} & {*train}


def test_a_table_too_small_for_a_holdout_says_so(tmp_path: Path) -> None:
    write(tmp_path, "image,labels", "1.jpg,a", "2.jpg,b")
    with pytest.raises(WSSSError, match="no image can be held out"):
        module(tmp_path).samples("train")


def test_splits_of_the_file_are_used_and_unknown_ones_named(tmp_path: Path) -> None:
    write(tmp_path, "image,labels,split", "1.jpg,a,train", "2.jpg,a,train", "3.jpg,a,test")
    data = module(tmp_path, val_split="test")
    assert names(data, "train") == ["1", "2"]
    assert names(data, "test") == ["3"]
    with pytest.raises(WSSSError, match=r"no row of split 'val' \(it has test, train\)"):
        data.samples("val")


def test_rows_of_splits_not_in_use_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photos(tmp_path, 6)
    splits = ["train", "train", "val", "vla", "trian", "vla"]
    rows = [f"photos/{number:03}.jpg,a,{split}" for number, split in enumerate(splits)]
    write(tmp_path, "image,labels,split", *rows)
    data = module(tmp_path)
    assert "3 of 6 rows" in data.left_out()
    assert "not in use (train, val): 'vla' (2), 'trian' (1); did you mean" in data.left_out()
    data.check_contents()
    assert capsys.readouterr().err == f"warning: {data.left_out()}\n"
    assert module(tmp_path, test_splits=["vla", "trian"]).left_out() == ""


def test_masks_of_0_and_255_only_are_named_before_training(tmp_path: Path) -> None:
    table_with_masks(tmp_path, with_mask=range(8))
    for path in (tmp_path / "masks").iterdir():
        ids = np.zeros((48, 56), np.uint8)
        ids[:9] = 255
        Image.fromarray(ids).save(path)
    data = module(tmp_path)
    with pytest.raises(WSSSError) as error:
        data.check_contents()
    assert "none of 4 masks of labelled images shows a pixel of a class" in str(error.value)
    assert "255 means ignored" in str(error.value)
    assert "1 for 'apple' (mask[mask == 255] = 1)" in str(error.value)
    assert data.eval_dataset("val").mask_sha256() is not None  # an evaluation gives no score
    Image.fromarray(np.ones((48, 56), np.uint8)).save(tmp_path / "masks" / "005.png")
    module(tmp_path).check_contents()


def test_a_missing_file_under_another_spelling_is_named(tmp_path: Path) -> None:
    make_photos(tmp_path, 4)
    photos = tmp_path / "photos"
    photos.joinpath("000.jpg").rename(photos / "B\u00e4r.JPG")
    rows = ["photos/000.jpg,a", *(f"photos/{n:03}.jpg,a" for n in range(1, 4))]
    for spelt, shown in (("Ba\u0308r.jpg", r"'B\\xe4r.JPG'"), ("b\u00e4r.jpg", "'B\u00e4r.JPG'")):
        rows[0] = f"photos/{spelt},a"
        write(tmp_path, "image,labels,split", *(f"{row},train" for row in rows))
        with pytest.raises(WSSSError, match=f"is missing .*there is {shown}, name it so"):
            module(tmp_path).unmasked_dataset("train")


def table_with_masks(root: Path, with_mask: Sequence[int]) -> None:
    labels = make_photos(root, 8)
    write(root, *CLASSES_OF_PHOTOS, name="classes.txt")
    lines = ["image,labels,mask,split"]
    for number, label in enumerate(labels):
        mask = ""
        if number in with_mask:
            mask = f"masks/{number:03}.png"
            write_atomically(root / mask, mask_png(np.full((48, 56), number % 3 + 1, np.uint8)))
        split = "train" if number < 4 else "val"
        lines.append(f"photos/{number:03}.jpg,{label},{mask},{split}")
    write(root, *lines)


def test_images_without_masks_are_ignored_pixels(tmp_path: Path) -> None:
    table_with_masks(tmp_path, with_mask=[0, 5])
    data = module(tmp_path)
    batches = list(data.eval_dataloader("val"))
    assert [batch["mask"].unique().tolist() for batch in batches] == [[255], [3], [255], [255]]
    assert batches[0]["mask"].shape == (1, 48, 56)
    assert data.eval_dataset("val").mask_sha256() is not None
    table_with_masks(tmp_path / "none", with_mask=[])
    assert module(tmp_path / "none").eval_dataset("val").mask_sha256() is None


def test_training_samples_have_no_mask(tmp_path: Path) -> None:
    table_with_masks(tmp_path, with_mask=range(8))
    data = module(tmp_path)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "labels", "name", "index"}
    assert all(sample.mask is None for sample in data._make_train_dataset().samples)


def test_missing_files_are_named_in_setup(tmp_path: Path) -> None:
    table_with_masks(tmp_path, with_mask=range(8))
    (tmp_path / "photos" / "002.jpg").unlink()
    with pytest.raises(WSSSError, match=r"002\.jpg is missing \(1 of 4 entries of .*labels\.csv"):
        module(tmp_path).setup("fit")
    (tmp_path / "masks" / "006.png").unlink()
    with pytest.raises(WSSSError, match=r"mask .*006\.png is missing"):
        module(tmp_path).eval_dataset("val")
    with pytest.raises(WSSSError, match=r"data folder .*nowhere is missing"):
        module(tmp_path / "nowhere", class_names=["a"]).setup("fit")


def test_mask_with_too_many_ids_is_found_at_once(tmp_path: Path) -> None:
    table_with_masks(tmp_path, with_mask=range(8))
    Image.fromarray(np.full((48, 56), 7, np.uint8)).save(tmp_path / "masks" / "006.png")
    data = module(tmp_path)
    data.setup("fit")
    with pytest.raises(WSSSError, match=r"006\.png holds class id 7; expected 0\.\.3"):
        data.check_contents()
