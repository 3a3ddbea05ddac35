"""Names of classes that clash: what is refused, and what the check shows of all that was read."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_tree import write_xml

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.data.dataset import check_class_names
from wsss.data.table import joined, read_classes, read_table
from wsss.data.voc import labels_from_xml

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "B\u00e4r") for form in ("NFC", "NFD"))


def write(root: Path, *rows: str, header: str = "image,labels") -> Path:
    path = root / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


CLASHES = {
    "case": (["Cat", "cat"], "'Cat' and 'cat', which differ only in case"),
    "blanks": (["hot dog", "hotdog"], "which differ only in case or blanks"),
    "two blanks": (["hot dog", "hot  dog"], "which differ only in case or blanks"),
    "unseen blank": (["cat", "c\u200bat"], r"'cat' and 'c\u200bat', which differ only in case or"),
    "Unicode forms": ([DECOMPOSED, COMPOSED], r"'Ba\u0308r' and 'B\xe4r', which differ only in Un"),
    "background": (["cat", "Background"], "'Background', which is no class"),
    "labelme's background": (["_background_", "cat"], "'_background_', which is no class"),
    "control character": (["cat", "d\x1bog"], "cannot be printed"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_names_that_clash_are_refused_everywhere(tmp_path: Path, case: str) -> None:
    names, expected = CLASHES[case]
    rows = [f"{number}.jpg,{name}" for number, name in enumerate(names)]
    with pytest.raises(WSSSError) as error:
        check_class_names(names)
    assert expected in str(error.value)
    path = write(tmp_path, *rows)
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path)
    assert expected in str(error.value)
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path)
    assert expected in str(error.value)
    assert "classes.txt" in str(error.value)


def test_a_class_twice_in_the_list_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog\n\n cat\n")
    with pytest.raises(WSSSError, match=r"'cat' twice \(lines 1 and 4\)"):
        read_classes(path)
    path.write_text("\n \n")
    with pytest.raises(WSSSError, match="is empty"):
        read_classes(path)


def test_a_label_in_another_form_than_its_class_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, f"1.jpg,{DECOMPOSED}")
    with pytest.raises(WSSSError, match="differ only in Unicode form; write it as the class"):
        read_table(path, tmp_path, [COMPOSED, "cat"])
    path = write(tmp_path, "1.jpg,Cat")
    with pytest.raises(WSSSError, match="differ only in case; write it as the class"):
        read_table(path, tmp_path, [COMPOSED, "cat"])
    (tmp_path / "Annotations").mkdir()
    xml = write_xml(tmp_path, "a", [DECOMPOSED])
    with pytest.raises(WSSSError, match="differ only in Unicode form"):
        labels_from_xml(xml, [COMPOSED])


JOINED = {
    "blank": "scab rust",
    "comma": '"scab,rust"',
    "comma and blank": '"scab, rust"',
    "slash": "scab/rust",
    "plus": "scab + rust",
    "and": "scab and rust",
    "other case": "Scab rust",
    "underscore": "scab_rust",
    "three": "scab rust scab",
    "colon": "scab:rust",
    "full-width colon": "scab：rust",
    "dot": "scab.rust",
    "full-width separator": "scab；rust",
    "full-width comma": "scab，rust",
    "ideographic comma": "scab、rust",
}


@pytest.mark.parametrize("case", JOINED)
def test_labels_joined_in_a_cell_are_refused(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, "1.jpg,scab", "2.jpg,rust", f"3.jpg,{JOINED[case]}")
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path)
    assert f"{path} line 4 has the label {JOINED[case].strip(chr(34))!r}" in str(error.value)
    assert "which joins the labels 'scab' and 'rust'" in str(error.value)
    assert f"separate labels by ; or, if it is one class, list the classes in {tmp_path}" in str(
        error.value
    )


def test_labels_never_seen_alone_are_refused_where_they_show(tmp_path: Path) -> None:
    path = write(tmp_path, '1.jpg,"scab,rust"')
    with pytest.raises(WSSSError, match="'scab,rust', which has a comma"):
        read_table(path, tmp_path)
    path = write(tmp_path, "1.jpg,scab rust", "2.jpg,rust scab")
    with pytest.raises(WSSSError, match="which has the words of 'rust scab'"):
        read_table(path, tmp_path)


@pytest.mark.parametrize("sign", "，、；")
def test_full_width_separators_are_refused_where_they_show(tmp_path: Path, sign: str) -> None:
    with pytest.raises(WSSSError, match=f"'scab{sign}rust', which has the .* '{sign}'; separate"):
        read_table(write(tmp_path, f"1.jpg,scab{sign}rust"), tmp_path)


NO_LABELS = ("None", "N/A", "n.a.", "NULL", "-", "--", "NaN", "<NA>", "no_label", "No label")


@pytest.mark.parametrize("text", [*NO_LABELS, "unlabeled", "Unlabelled", "?"])
def test_cells_that_mean_nothing_are_no_class(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "1.jpg,cat", f"2.jpg,{text}", f"3.jpg,cat;{text}")
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path)
    said = f"{path} line 3 has the label {text!r}, which says that there is none"
    assert str(error.value).startswith(said)
    assert "leave the cell empty" in str(error.value)
    (tmp_path / "classes.txt").write_text(f"cat\n{text}\n")
    assert read_table(path, tmp_path).class_names == ("cat", text)


def test_one_number_written_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "1.jpg,1.0", "2.jpg,2", "3.jpg,1")
    with pytest.raises(WSSSError, match=r"line 2 has the label '1.0', the same number as '1' \("):
        read_table(path, tmp_path)
    (tmp_path / "classes.txt").write_text("1\n1.0\n2\n")
    assert read_table(path, tmp_path).class_names == ("1", "1.0", "2")
    (tmp_path / "classes.txt").unlink()
    path = write(tmp_path, "1.jpg,1.5", "2.jpg,5.1", "3.jpg,1", "4.jpg,5", "5.jpg,16:9")
    assert read_table(path, tmp_path).class_names == ("1", "1.5", "16:9", "5", "5.1")


def test_names_of_several_words_are_no_joined_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "1.jpg,hot dog;dog", "2.jpg,traffic light")
    assert read_table(path, tmp_path).class_names == ("dog", "hot dog", "traffic light")
    names = ["powdery mildew", "rust", "mildew"]
    assert joined("rust powdery mildew", names) == ["rust", "powdery mildew"]
    assert joined("powdery mildew", names) == []
    assert joined("rust powdery", names) == []


def test_a_list_of_classes_settles_what_is_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{number}.png,{name},{split}" for number, (name, split) in enumerate(SIX)]
    path = write(tmp_path, *rows, header="image,labels,split")
    for number in range(6):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")
    names = ["scab", "rust", "scab rust"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert read_table(path, tmp_path).class_names == tuple(names)
    status, out = check(tmp_path, capsys)
    assert status == 0
    assert "the class 'scab rust' has the names of others (scab, rust)" in out
    assert "classes of train: scab (1), rust (2), scab rust (1)\n" in out
    assert "classes of val: scab (1), rust (0), scab rust (0), none of them (1)\n" in out
    (tmp_path / "classes.txt").write_text("scab\nrust")
    with pytest.raises(WSSSError, match="'scab rust', which joins the classes 'scab' and 'rust'"):
        read_table(path, tmp_path)


SIX = (
    ("scab", "train"),
    ("rust", "train"),
    ("scab rust", "train"),
    ("rust", "train"),
    ("scab", "val"),
    ("", "val"),
)


def check(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["data", "check", "data=table", f"root={root}", *arguments])
    return status, capsys.readouterr().out


def test_the_check_of_a_refused_table_lists_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "1.jpg,scab rust", "2.jpg,scab", "3.jpg,rust", "4.jpg,scab rust")
    status, out = check(tmp_path, capsys)
    assert status == 1
    assert "note: labels: 4 rows can be read: rust (1), scab (1), scab rust (2)\n" in out


def with_masks(root: Path, labels: list[str]) -> Path:
    lines = []
    for number, label in enumerate(labels):
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(root / f"{number}.png")
        Image.fromarray(np.full((8, 8), 1, np.uint8)).save(root / f"m{number}.png")
        split = "train" if number % 2 else "val"
        lines.append(f"{number}.png,{label},m{number}.png,{split}")
    return write(root, *lines, header="image,labels,mask,split")


def test_classes_beside_masks_must_be_declared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_masks(tmp_path, ["cat", "cat", "dog", "dog", "aog", "cat"])
    with pytest.raises(WSSSError) as error:
        read_table(path, tmp_path)
    assert "list the classes in" in str(error.value)
    assert "its labels are aog (1), cat (3), dog (2)" in str(error.value)
    Image.new("RGB", (3, 3)).save(tmp_path / "m1.png")
    status, out = check(tmp_path, capsys)
    assert status == 1
    assert "error: classes: " in out
    assert "error: mask [train]: mask " in out, "one call finds all"
    assert read_table(path, tmp_path, ["dog", "cat", "aog"]).class_names == ("dog", "cat", "aog")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(WSSSError, match="'aog', which is no known class; did you mean 'dog'"):
        read_table(path, tmp_path)


def test_one_class_needs_no_list(tmp_path: Path) -> None:
    assert read_table(with_masks(tmp_path, ["cat", "", "cat"]), tmp_path).class_names == ("cat",)


def test_a_list_that_is_not_in_use_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_masks(tmp_path, ["cat", "dog", "dog", "cat"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    _, out = check(tmp_path, capsys, "class_names=[dog,cat]")
    assert "warning: classes: data.class_names is another list" in out
    assert "is another list" not in check(tmp_path, capsys)[1]


def test_labels_that_may_be_mistyped_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["apple"] * 5 + ["appel"]
    for number in range(6):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")
    write(tmp_path, *(f"{number}.png,{label}" for number, label in enumerate(labels)))
    _, out = check(tmp_path, capsys)
    assert "warning: classes: 'appel' (1 images) and 'apple' (5) differ little" in out


def test_many_kinds_of_labels_are_read_at_once(tmp_path: Path) -> None:
    """A column of captions is refused, and takes no time to be."""
    rows = [f"{n}.jpg,{n % 7} a b c d e f g h i {n}" for n in range(20_000)]
    assert len(read_table(write(tmp_path, *rows), tmp_path).class_names) == 20_000
