"""One's own data: a CSV with the columns ``image,labels[,mask][,split]``.

::

    image,labels,mask,split
    photos/0001.jpg,cat;dog,masks/0001.png,train
    photos/0002.jpg,dog,,val

Paths are relative to the data's root and stay inside it. Labels are separated by ``;`` or ``|``;
an empty cell says that the image shows none of the classes. A mask is an index PNG whose ids
follow the order of the classes: that of ``data.class_names``, else of a ``classes.txt`` (one name
a line) beside the table. Without either the classes are the labels in alphabetical order, which is
refused beside masks, since a mistyped label would shift their ids. Rows without a mask are trained
on and are not scored per pixel. `wsss data prepare` writes COCO and the exports of annotation
tools as such tables, so this is the only reader they need.
"""

import csv
import difflib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wsss.core.errors import WSSSError
from wsss.data.dataset import Sample, same_spelling, spelling, wrong_names
from wsss.maps.pixels import IGNORE_INDEX

COLUMNS = ("image", "labels", "mask", "split")
CLASSES_FILE = "classes.txt"
FOLDER = "wsss"  # below the data's root: what we make never lies among the user's files
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # how an absolute path of Windows begins
# what people write between two labels in one cell; 1.0 and 16:9 are numbers
JOINTS = re.compile(r"[\s,/+&_\-，、；：]+|(?<!\d)[.:]|[.:](?!\d)")
COMMAS = {
    ",": "a comma",
    "，": "the comma '，'",
    "、": "the comma '、'",
    "；": "the separator '；'",
}
# what programs write into a cell without a value, less its brackets, dashes and the like
NO_VALUE = frozenset({"", "none", "na", "nan", "null", "nolabel", "unlabeled", "unlabelled"})
PICKLES = frozenset({".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth"})


class Row(NamedTuple):
    """One image of a table.

    Attributes:
        line: of the CSV, for messages.
        sample: its files; the name is the image's path without suffix.
        labels: class names; none where the image shows none of the classes.
        split: as written, or None without such a column.
    """

    line: int
    sample: Sample
    labels: tuple[str, ...]
    split: str | None


class Table(NamedTuple):
    """A table that has been read.

    Attributes:
        path: the CSV.
        rows: the images.
        class_names: all classes, in the order of the mask ids.
        problems: what is wrong, one line each; empty unless `all_problems` is set.
        undeclared: why the classes must be declared; empty unless `all_problems` is set.
        declared: whether a list gave the classes; else they are the labels.
    """

    path: Path
    rows: list[Row]
    class_names: tuple[str, ...]
    problems: list[str]
    undeclared: str
    declared: bool


def refuse_pickle(path: Path) -> None:
    """Raise WSSSError for a label file that only a pickle loader reads (``cls_labels.npy``)."""
    if path.suffix.lower() in PICKLES:
        raise WSSSError(
            f"{path} is a pickle or NumPy file, which is never loaded here (reading a stranger's "
            "pickle runs his code); `wsss data prepare voc|coco` makes the labels anew from the "
            "annotations, own labels go into a CSV with the columns image,labels"
        )


def read_table(
    path: Path, root: Path, class_names: Sequence[str] | None = None, *, all_problems: bool = False
) -> Table:
    """Read a table and check every row; no image is opened.

    Args:
        path: the CSV.
        root: folder to which its paths are relative.
        class_names: the classes; None takes them from ``classes.txt`` or from the labels.
        all_problems: collect what is wrong with single rows instead of raising the first.

    Raises:
        WSSSError: no UTF-8 CSV, a missing column, a path outside the root, an image listed twice,
            labels that cannot be told apart or are several in one, an unknown class, masks whose
            ids nothing orders; with `all_problems` only the first two.
    """
    root = Path(os.path.normpath(root))
    records = _records(path)
    listed = None if class_names else read_classes(path.parent / CLASSES_FILE)
    known = class_names or listed
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for line, record in records:
        try:
            row = _row(path, root, line, record, known, seen)
        except WSSSError as error:
            if not all_problems:
                raise
            problems.append(str(error))
            continue
        seen[row.sample.name] = line
        rows.append(row)
    found = tuple(known or sorted({label for row in rows for label in row.labels}))
    if wrong := wrong_names(found):
        where = path.parent / CLASSES_FILE if listed else "data.class_names" if known else path
        problems.append(f"{where} {wrong}")
    if not known and len(found) < IGNORE_INDEX:  # more cannot be classes; it says so elsewhere
        problems += _joined_labels(path, rows)
    if not rows and not problems:
        problems.append(f"{path} has no row below its header; expected one image a line")
    if not found and not problems:
        problems.append(f"{path} has no label in any row; expected at least one class")
    undeclared = "" if known else _undeclared(path, rows, found)
    if not all_problems and (problems or undeclared):
        raise WSSSError(problems[0] if problems else undeclared)
    return Table(path, rows, found, problems, undeclared, declared=bool(known))


def _joined_labels(path: Path, rows: Sequence[Row]) -> list[str]:
    """Find labels that look like several, where no list of classes says that they are one."""
    problems = []
    lines = {label: row.line for row in reversed(rows) for label in row.labels}  # the first one
    orders: dict[tuple[str, ...], str] = {}
    numbers: dict[float | str, str] = {}
    for label in sorted(lines):
        if re.sub(r"[-–—_./#<>()?]", "", spelling(label)) in NO_VALUE:
            problems.append(
                f"{path} line {lines[label]} has the label {label!r}, which says that there is "
                "none; leave the cell empty for an image that shows none of the classes or, if it "
                f"is a class, list the classes in {path.parent / CLASSES_FILE}, one a line"
            )
            continue
        if (same := numbers.setdefault(_number(label), label)) != label:
            problems.append(
                f"{path} line {lines[label]} has the label {label!r}, the same number as {same!r} "
                f"(line {lines[same]}); write one of them, or list the classes in "
                f"{path.parent / CLASSES_FILE}, one a line"
            )
            continue
        parts = joined(label, lines)
        comma = next((COMMAS[c] for c in label if c in COMMAS), "")
        words = _words(label)
        other = orders.setdefault(tuple(sorted(words)), label)
        if parts:
            what = f"which joins the labels {' and '.join(map(repr, parts))}"
        elif comma:
            what = f"which has {comma}"
        elif len(words) > 1 and other != label:
            what = f"which has the words of {other!r}"
        else:
            continue
        problems.append(
            f"{path} line {lines[label]} has the label {label!r}, {what}; separate labels by ; or, "
            f"if it is one class, list the classes in {path.parent / CLASSES_FILE}, one a line"
        )
    return problems


def joined(label: str, names: Iterable[str]) -> list[str]:
    """Give the names that a label joins by blanks, commas or the like; none if it is no such."""
    by_words = {_words(name): name for name in names if name != label}

    def cut(words: tuple[str, ...]) -> list[str] | None:
        if not words:
            return []
        for count in range(1, len(words) + 1):
            head = by_words.get(words[:count])
            rest = cut(words[count:]) if head else None
            if head and rest is not None:
                return [head, *rest]
        return None

    parts = cut(_words(label)) or []
    return parts if len(parts) > 1 else []


def _number(label: str) -> float | str:
    """Give the number that a label is, or the label where it is none."""
    try:
        return float(label)
    except ValueError:
        return label


def _words(name: str) -> tuple[str, ...]:
    """Split a label where several may be joined; the word ``and`` is a joint too."""
    words = (spelling(word) for word in JOINTS.split(name))
    return tuple(word for word in words if word and word != "and")


def _undeclared(path: Path, rows: Sequence[Row], names: Sequence[str]) -> str:
    """Say why classes must be declared: beside masks their order is what an id means."""
    masks = sum(row.sample.mask is not None for row in rows)
    if not masks or len(names) < 2:
        return ""
    counts = Counter(label for row in rows for label in row.labels)
    shown = ", ".join(f"{name} ({counts[name]})" for name in names[:20])
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"{path} has {masks} masks, and nothing says which class is which id in them; list the "
        f"classes in {path.parent / CLASSES_FILE}, one a line, id 1 first (or give "
        f"data.class_names=[...]); its labels are {shown}{more}"
    )


def read_classes(path: Path) -> tuple[str, ...] | None:
    """Read class names, one a line; None if there is no such file.

    Raises:
        WSSSError: it is no text, is empty, or has a name twice.
    """
    if not path.is_file():
        return None
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if name in lines:
            raise WSSSError(
                f"{path} has the class {name!r} twice (lines {lines[name]} and {number}), so that "
                "the ids of all that follow are unsure; remove one"
            )
        if name:
            lines[name] = number
    if not lines:
        raise WSSSError(f"{path} is empty; list the classes, one a line, or remove it")
    return tuple(lines)


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte-order mark.

    Raises:
        WSSSError: no such file, or another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise WSSSError(f"{path} cannot be read ({error.strerror}); expected a text file") from None
    except UnicodeDecodeError as error:
        raise WSSSError(
            f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text"
        ) from error


def _records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Read line numbers and fields of a CSV with checked header and equally long rows."""
    refuse_pickle(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    records: list[tuple[int, dict[str, str]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise WSSSError(
                    f"{path} line {reader.line_num} has {len(fields)} fields, expected "
                    f"{len(header)} ({','.join(header)}); separate labels by ; and quote commas"
                )
            record = {name: text.strip() for name, text in zip(header, fields, strict=True)}
            records.append((reader.line_num, record))
    except csv.Error as error:
        raise WSSSError(f"{path} line {reader.line_num} is no CSV ({error}); mend it") from error
    return records


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in ("image", "labels"):
        if column not in header:
            raise WSSSError(
                f"{path} has no column {column!r} (its first line reads {','.join(header)[:80]!r});"
                " expected image,labels[,mask][,split], separated by commas"
            )
    for name in header:
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.75)
        if name not in COLUMNS and near:  # a mistyped split would silently make a holdout
            raise WSSSError(f"{path} has a column {name!r}; did you mean {near[0]!r}? rename it")
    doubled = [name for name, count in Counter(header).items() if count > 1]
    if doubled:
        raise WSSSError(f"{path} has the column {doubled[0]!r} twice; remove one")


def _row(
    path: Path,
    root: Path,
    line: int,
    record: dict[str, str],
    known: Sequence[str] | None,
    seen: dict[str, int],
) -> Row:
    where = f"{path} line {line}"
    image = inside(root, record["image"], where)
    mask = inside(root, record["mask"], where) if record.get("mask") else None
    name = image.relative_to(root).with_suffix("").as_posix()
    if name in seen:
        raise WSSSError(f"{where} lists {name!r} again (first in line {seen[name]}); remove one")
    labels = tuple(dict.fromkeys(filter(None, map(str.strip, split_labels(record["labels"])))))
    if record["labels"] and not labels:
        raise WSSSError(
            f"{where} gives {name!r} no label but a separator; name a class, or leave the cell "
            "empty for an image that shows none of the classes"
        )
    for label in labels:
        if known and label not in known:
            raise WSSSError(f"{where} has the label {label!r}, {_meant(label, known)}")
    if record.get("split") == "":
        raise WSSSError(f"{where} has no split; fill the column in every row, or remove it")
    return Row(line, Sample(name, image, mask), labels, record.get("split"))


def _meant(label: str, known: Sequence[str]) -> str:
    """Say what an unknown label may be meant to be."""
    if parts := joined(label, known):
        return f"which joins the classes {' and '.join(map(repr, parts))}; separate them by ;"
    alike = [name for name in known if spelling(name) == spelling(label)]
    if pair := same_spelling([label, *alike]):
        return f"which is no known class: there are {pair}; write it as the class"
    near = difflib.get_close_matches(label, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "correct it or data.class_names"
    return f"which is no known class; {hint}"


def split_labels(text: str) -> list[str]:
    """Split ``cat;dog`` or ``cat|dog``."""
    return re.split(r"[;|]", text)


def inside(root: Path, text: str, where: str) -> Path:
    """Give a table's path below the root.

    Backslashes separate folders, as Windows writes them, unless a file has that very name.

    Raises:
        WSSSError: it is empty or leads out of the root. Links are followed, not judged.
    """
    if "\\" in text and not os.path.exists(root / text):
        if WINDOWS.match(text):
            raise WSSSError(
                f"{where} names {text!r}, an absolute path of Windows; expected a file below the "
                f"data's root {root}, relative to it"
            )
        text = text.replace("\\", "/")
    path = Path(os.path.normpath(root / text))
    if not text or path == root or not path.is_relative_to(root):
        raise WSSSError(
            f"{where} names {text!r}; expected a file below the data's root {root}, relative to it"
        )
    return path


def holdout(rows: Sequence[Row], share: float) -> set[str]:
    """Choose the images to validate on where a table does not say.

    They are drawn by the hash of their names, so that every seed and every machine holds out the
    same ones and a new image moves few others; no class loses its last training image.

    Returns:
        Names of about a `share` of the images, at least one.

    Raises:
        WSSSError: no image can be spared.
    """
    # images that show none of the classes are one more thing to learn from
    shown = {row.sample.name: row.labels or ("",) for row in rows}
    left = Counter(label for labels in shown.values() for label in labels)
    wanted = max(1, round(share * len(rows)))
    chosen: set[str] = set()
    order = sorted(rows, key=lambda row: hashlib.sha256(row.sample.name.encode()).digest())
    for row in order:
        labels = shown[row.sample.name]
        if len(chosen) < wanted and all(left[label] > 1 for label in labels):
            chosen.add(row.sample.name)
            left.subtract(labels)
    if not chosen:
        raise WSSSError(
            "no image can be held out for validation without emptying a class; add images, or a "
            "split column with train and val"
        )
    return chosen
