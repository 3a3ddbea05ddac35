"""One's own data: a CSV with the columns ``image,labels[,mask][,split]``.

::

    image,labels,mask,split
    photos/0001.jpg,cat;dog,masks/0001.png,train
    photos/0002.jpg,dog,,val

Paths are relative to the data's root and stay inside it. Labels are separated by ``;`` or ``|``.
A mask is an index PNG whose ids follow the order of the classes: that of ``data.class_names``,
else of a ``classes.txt`` (one name a line) beside the table, else alphabetical. Rows without a
mask are trained on and are not scored per pixel. `wsss data prepare` writes COCO and the exports
of annotation tools as such tables, so this is the only reader they need.
"""

import csv
import difflib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wsss.core.errors import WSSSError
from wsss.data.dataset import Sample

COLUMNS = ("image", "labels", "mask", "split")
CLASSES_FILE = "classes.txt"
FOLDER = "wsss"  # below the data's root: what we make never lies among the user's files
PICKLES = frozenset({".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth"})


class Row(NamedTuple):
    """One image of a table.

    Attributes:
        line: of the CSV, for messages.
        sample: its files; the name is the image's path without suffix.
        labels: class names, at least one.
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
    """

    path: Path
    rows: list[Row]
    class_names: tuple[str, ...]
    problems: list[str]


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
            a row without labels, an unknown class; with `all_problems` only the first two.
    """
    root = Path(os.path.normpath(root))
    records = _records(path)
    known = class_names or read_classes(path.parent / CLASSES_FILE)
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
    clash = [name for name, count in Counter(name.lower() for name in found).items() if count > 1]
    if clash:
        problems.append(f"{path} has classes that differ only in case ({clash[0]!r}); unite them")
    if not rows and not problems:
        problems.append(f"{path} has no row below its header; expected one image a line")
    if problems and not all_problems:
        raise WSSSError(problems[0])
    return Table(path, rows, found, problems)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """Read class names, one a line; None if there is no such file."""
    if not path.is_file():
        return None
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


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
    if not labels:
        raise WSSSError(f"{where} gives {name!r} no label; expected at least one class, or remove")
    for label in labels:
        if known and label not in known:
            near = difflib.get_close_matches(label, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "correct it or data.class_names"
            raise WSSSError(f"{where} has the label {label!r}, which is no known class; {hint}")
    if record.get("split") == "":
        raise WSSSError(f"{where} has no split; fill the column in every row, or remove it")
    return Row(line, Sample(name, image, mask), labels, record.get("split"))


def split_labels(text: str) -> list[str]:
    """Split ``cat;dog`` or ``cat|dog``."""
    return re.split(r"[;|]", text)


def inside(root: Path, text: str, where: str) -> Path:
    """Give a table's path below the root.

    Raises:
        WSSSError: it is empty or leads out of the root. Links are followed, not judged.
    """
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
    left = Counter(label for row in rows for label in row.labels)
    wanted = max(1, round(share * len(rows)))
    chosen: set[str] = set()
    order = sorted(rows, key=lambda row: hashlib.sha256(row.sample.name.encode()).digest())
    for row in order:
        if len(chosen) < wanted and all(left[label] > 1 for label in row.labels):
            chosen.add(row.sample.name)
            left.subtract(row.labels)
    if not chosen:
        raise WSSSError(
            "no image can be held out for validation without emptying a class; add images, or a "
            "split column with train and val"
        )
    return chosen
