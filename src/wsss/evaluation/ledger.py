"""A run's ledger: one line for every time that a split's ground truth was read.

A split that was read often has been selected on, knowingly or not. Results are reported from one
reading; the ledger shows whether that is so.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    handle = os.open(folder / LEDGER_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)
    return sum(entry["split"] == split for entry in past_readings(folder))


def past_readings(folder: Path) -> list[dict[str, Any]]:
    """Read all entries of a run's ledger, in order; none where there is no ledger."""
    path = folder / LEDGER_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
