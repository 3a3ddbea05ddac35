"""What `wsss data prepare` needs for every data set: many small files in parallel, written once.

Preparing is resumable because each mask is a file that appears whole or not at all and is left
alone when it is there, and because lists and tables are written last.
"""

import csv
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from rich.progress import track

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.core.processes import serve
from wsss.data.dataset import check_class_names
from wsss.data.table import CLASSES_FILE, COLUMNS, FOLDER, read_table, read_text

TABLE_FILE = "labels.csv"
MARKER_FILE = "prepare.json"
FEW = 200  # fewer files are done sooner than worker processes start
Item = TypeVar("Item")
Result = TypeVar("Result")


class TableRow(NamedTuple):
    """A line of a table; paths are relative to the data's root."""

    image: str
    labels: Sequence[str]
    mask: str | None
    split: str | None


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], *, description: str, jobs: int | None
) -> list[Result]:
    """Call a module-level function for every item, in processes, behind a progress bar.

    Args:
        work: must leave things as they are when it is called again.
        items: its arguments.
        description: title of the bar.
        jobs: processes; None: one a core.

    Returns:
        What it gave for each item, in their order.

    Raises:
        WSSSError: what `work` raised first, or a process was killed.
    """
    if not items:
        return []
    if jobs is None:
        jobs = 1 if len(items) < FEW else (os.cpu_count() or 1)
    if jobs < 1:
        raise WSSSError(f"jobs={jobs}: expected at least 1 process")
    if jobs == 1:
        return [work(item) for item in track(items, description=description)]
    # spawned, not forked: the progress bar is a thread
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=serve, initargs=(os.getpid(),))
    try:
        results = pool.map(work, items, chunksize=16)
        return list(track(results, description=description, total=len(items)))
    except BrokenProcessPool as error:
        raise WSSSError(
            f"{description}: a process was killed, most likely out of memory; repeat with fewer "
            "processes (jobs=1), what is done stays"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_text(path: Path, text: str) -> str:
    """Write a list or table if it is not there already, and say which."""
    if path.is_file() and path.read_bytes() == text.encode():
        return "as it was"
    write_atomically(path, text.encode())
    return "written"


def write_table(folder: Path, rows: Iterable[TableRow], class_names: Sequence[str]) -> str:
    """Write ``labels.csv`` and ``classes.txt`` into a folder, without columns that nobody fills.

    Raises:
        WSSSError: see `check_table`.
    """
    listed = list(rows)
    check_table(folder, listed)
    write_text(folder / CLASSES_FILE, "".join(f"{name}\n" for name in class_names))
    return write_text(folder / TABLE_FILE, table_text(listed))


def check_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Check that our table can list the classes which a file names, and give them as a tuple.

    Raises:
        WSSSError: see `check_class_names`, or a name holds a separator.
    """
    try:
        checked = check_class_names(names)
    except WSSSError as error:
        raise WSSSError(f"{path}: {error}") from error
    for name in checked:
        if {*name} & {*";|"} or name != name.strip() or len(name.splitlines()) != 1:
            raise WSSSError(
                f"{path}: {TABLE_FILE} cannot list the class {name!r}, which holds ; or |, a line "
                "break or blanks at its ends; rename it"
            )
    return checked


def check_readable(root: Path, rows: Sequence[TableRow], class_names: Sequence[str]) -> None:
    """Write the table of a data set elsewhere and read it, before anything lies in its place.

    Raises:
        WSSSError: the reader refuses it, or would read something else.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            write_table(Path(elsewhere), rows, class_names)
            table = read_table(Path(elsewhere) / TABLE_FILE, root)
        except WSSSError as error:
            raise WSSSError(str(error).replace(elsewhere, str(root / FOLDER))) from error
    for row, read in zip(rows, table.rows, strict=True):
        files = [os.path.relpath(path, root) if path else "" for path in read.sample[1:]]
        # a backslash is part of a name only where such a file is there, as no mask is yet
        written, found = (
            [path.replace("\\", "/") for path in pair]
            for pair in ((row.image, row.mask or ""), files)
        )
        if (written, tuple(row.labels), row.split) != (found, read.labels, read.split):
            raise WSSSError(f"{row.image} cannot be listed in a table under this name; rename it")


def check_table(folder: Path, rows: Sequence[TableRow]) -> None:
    """Check that rows can be written which the reader of tables takes.

    Raises:
        WSSSError: there is no row, two images share a name, or a path has blanks at its ends.
    """
    if not rows:
        raise WSSSError(f"nothing to list in {folder / TABLE_FILE}: no image has a label")
    by_name: dict[PurePosixPath, str] = {}
    for row in rows:
        if row.image != row.image.strip():
            raise WSSSError(
                f"{folder / TABLE_FILE} cannot list the image {row.image!r}, which has blanks at "
                "the ends of its path; rename it"
            )
        name = PurePosixPath(row.image).with_suffix("")
        if name in by_name:
            raise WSSSError(
                f"{by_name[name]} and {row.image} would be one row of {folder / TABLE_FILE}; list "
                "each image once, and rename one where only the suffixes differ"
            )
        by_name[name] = row.image


def table_text(rows: Sequence[TableRow]) -> str:
    """Give rows as CSV."""
    columns = [name for name in COLUMNS if any(getattr(row, name) for row in rows)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        fields = row._replace(labels=";".join(row.labels))._asdict()
        writer.writerow([fields[name] or "" for name in columns])
    return stream.getvalue()


def rules_are_new(folder: Path, rules: dict[str, Any]) -> bool:
    """Say whether a folder of masks is not begun yet; write nothing.

    Raises:
        WSSSError: it was begun by other rules, so that two kinds of masks would mix.
    """
    path = folder / MARKER_FILE
    if not path.is_file():
        return True
    try:
        before = json.loads(read_text(path))
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != rules.keys():
        raise WSSSError(
            f"{path} does not say by which rules {folder} was prepared; remove {folder} to "
            "prepare it anew"
        )
    for key, now in rules.items():
        if before[key] != now:
            raise WSSSError(
                f"{folder} was prepared with {key}={before[key]}, now it is {now}; remove "
                f"{folder} to prepare it anew, or give the former"
            )
    return False


def note_rules(folder: Path, rules: dict[str, Any]) -> None:
    """Write down by which rules a folder of masks is made, before the first of them.

    What can be refused is refused before: a refused call leaves nothing.
    """
    write_text(folder / MARKER_FILE, json.dumps(rules, indent=2) + "\n")


def split_of(name: str) -> str | None:
    """Give train, val or test for the name of a list (``train2014``, ``Validation``)."""
    plain = name.lower().rstrip("0123456789")
    plain = {"validation": "val", "valid": "val"}.get(plain, plain)
    return plain if plain in ("train", "val", "test") else None
