"""A run's ledger: one line for every time that a split's ground truth was read.

A split that was read often has been selected on, knowingly or not. Results are reported from one
reading; the ledger shows whether that is so.

A line that is damaged (a process was killed while it wrote, a disk was full) stays in the file, is
named in a warning and counts for no split. It never stands in the way of an evaluation.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import append_line, cannot_write, reason

LEDGER_FILE = "ledger.jsonl"


def record_reading(folder: Path, *, split: str, purpose: str, **details: Any) -> int:
    """Record one reading of ground truth.

    Args:
        folder: the run folder; the ledger is made at the first reading.
        split: whose ground truth was read.
        purpose: ``report``, ``watching training``, ``choosing a threshold``, ...
        details: whatever identifies the reading: step, protocol, list hash.

    Returns:
        How many times the split has been read, this one included.

    Raises:
        WSSSError: the ledger cannot be read or written.
    """
    line = json.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "split": split,
            "purpose": purpose,
            **details,
        }
    )
    # one write of one line in append mode: a reader never meets half an entry
    append_line(folder / LEDGER_FILE, line)
    return sum(entry["split"] == split for entry in past_readings(folder))


def past_readings(folder: Path) -> list[dict[str, Any]]:
    """Read all whole entries of a run's ledger, in order; none where there is no ledger.

    Raises:
        WSSSError: the ledger cannot be read.
    """
    return [entry for _, _, entry in _lines(folder) if entry is not None]


def check_ledger(folder: Path) -> None:
    """Prove that the ledger can be read and written before hours of work go into an evaluation.

    Lines that are damaged are named in a warning.

    Raises:
        WSSSError: it cannot be read or written.
    """
    path = folder / LEDGER_FILE
    damaged = [(number, text) for number, text, entry in _lines(folder) if entry is None]
    if damaged:
        number, text = damaged[0]
        more = f", as are {len(damaged) - 1} more" if len(damaged) > 1 else ""
        print(
            f"warning: {path}: line {number} is damaged ({one_line(text, 60)}){more}; it stays "
            "there and is not counted",
            file=sys.stderr,
        )
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error


def _lines(folder: Path) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Give number, text and entry of every line that is not blank; no entry where it is damaged."""
    path = folder / LEDGER_FILE
    try:
        if path.exists() and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        text = path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):  # of a checkpoint file there is none
        return
    except OSError as error:
        raise WSSSError(
            f"{path}: cannot be read ({reason(error)}); move it away or let it be read"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line, _entry(line)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("time", "split", "purpose")
    )
    return entry if whole else None
