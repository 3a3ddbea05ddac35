"""Run the cases of a folder and say how far each is off."""

import importlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.parity import check_method
from wsss.parity.cases import (
    AbsentError,
    Case,
    Found,
    Kind,
    Produced,
    allowed_for,
    read_case,
)
from wsss.parity.tolerances import Array, Tolerance, deviation

NAMED = 4  # of the arrays that could not be compared


@dataclass(frozen=True)
class Report:
    """The result of one case; ``problem`` is empty where all is well.

    ``note`` says what the file lacks and what could not be compared for that.
    """

    name: str
    compared: int
    absolute: float
    relative: float
    problem: str
    covered: bool = True
    note: str = ""

    def line(self) -> str:
        """Format one line for the terminal."""
        if not self.covered:
            return f"{self.name:<28} not covered: {self.problem}"
        verdict = f"FAILED: {self.problem}" if self.problem else "ok"
        if self.note:
            verdict += f" ({self.note})"
        return (
            f"{self.name:<28} {self.compared:>3} arrays  max abs {self.absolute:.2e}  "
            f"max rel {self.relative:.2e}  {verdict}"
        )


def _as_array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asanyarray(value)


def compare(kind: Kind, case: Case, produced: Produced) -> Report:
    """Compare every stored output; the float64 ones of marked files with the same product value.

    What could not be computed because the file lacks something that goes in is only named.
    """
    worst, problems = [0.0, 0.0], []
    absent = produced.absent if isinstance(produced, Found) else []
    compared, left = 0, []
    for key, expected in case.outputs.items():
        plain = key.partition("_")[2] if kind.inputs is None else key
        if plain not in produced:
            if absent:
                left.append(key)
            else:
                problems.append(f"{key} was not produced")
            continue
        actual = _as_array(produced[plain])
        if isinstance(actual, np.ma.MaskedArray):
            expected = np.where(np.ma.getmaskarray(actual), actual.data, expected)
            actual = actual.data
        absolute, relative = deviation(actual, expected)
        compared += 1
        allowed = allowed_for(kind, case, key, expected)
        spared = _spared(allowed, case, expected)
        worst = [max(worst[0], absolute), max(worst[1], relative)]
        # An infinite deviation is another shape, text or NaN: no tolerance covers it.
        within = np.isfinite(absolute) and (
            absolute == 0 or allowed.holds(actual.reshape(expected.shape), expected, spared)
        )
        if actual.shape != expected.shape and max(actual.size, expected.size) > 1:
            problems.append(f"{key} has shape {actual.shape} instead of {expected.shape}")
        elif not within:
            problems.append(f"{key} is off by {absolute:.2e} (relative {relative:.2e})")
    if not case.outputs:
        problems.append(f"the file holds no {'out_* ' if kind.inputs is None else 'output '}array")
    elif not compared and left:
        problems.append("nothing could be compared")
    note = ""
    if left:
        named = f"{', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''}"
        lacking = ", ".join(dict.fromkeys(absent))
        note = f"the file lacks {lacking}; {len(left)} arrays not compared: {named}"
    return Report(case.name, compared, worst[0], worst[1], "; ".join(problems), note=note)


def _produce(kind: Kind, case: Case) -> Produced:
    """Run a case; a missing part that everything needs leaves nothing."""
    try:
        return kind.run(case)
    except AbsentError as error:
        nothing = Found()
        nothing.absent.append(str(error))
        return nothing


def _spared(allowed: Tolerance, case: Case, expected: Array) -> int:
    """Count the entries of an output that may be off."""
    if isinstance(allowed.spare, str):
        return int(case.extra.get(allowed.spare, np.array(0)))
    return int(allowed.spare * expected.size)


def _readable(path: Path) -> bool:
    try:
        read_case(path)
    except Exception:
        return False
    return True


def run_case(path: Path, kinds: Mapping[str, Kind]) -> Report:
    """Run one file. Whatever goes wrong in it is its own failure and not that of the others."""
    stems = [stem for stem in kinds if path.stem.startswith(stem)]
    if not stems:
        known = ", ".join(sorted(kinds))
        return Report(path.stem, 0, 0.0, 0.0, f"known kinds are {known}", covered=False)
    kind = kinds[max(stems, key=len)]
    try:
        case = read_case(path, kind.inputs)
        return compare(kind, case, _produce(kind, case))
    except Exception as error:
        # A corrupt file can break anything from the zip reader to a tensor shape.
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ValueError | OSError | zipfile.BadZipFile) and not _readable(path):
            reason = "not a readable .npz file"
        return Report(path.stem, 0, 0.0, 0.0, reason)


def run_parity(method: str, folder: Path) -> int:
    """Run every case in a folder and print one line each and a total.

    Args:
        method: Method name, one of :data:`wsss.parity.METHODS`.
        folder: Folder of ``*.npz`` files.

    Returns:
        Exit code: 0 only when there is at least one case and every one is ok.

    Raises:
        WSSSError: Unknown method or missing folder.
    """
    check_method(method)
    if not folder.is_dir():
        raise WSSSError(f"{folder} is not a folder; pass the folder that holds the *.npz cases")
    files = sorted(folder.glob("*.npz"))
    if not files:
        print(f"no *.npz case in {folder}: nothing was compared")
        return 1
    kinds: Mapping[str, Kind] = importlib.import_module(f"wsss.parity.{method}").KINDS
    reports = []
    for path in files:
        reports.append(run_case(path, kinds))
        print(reports[-1].line(), flush=True)
    good = sum(r.covered and not r.problem for r in reports)
    missing = sum(not r.covered for r in reports)
    arrays = sum(r.compared for r in reports)
    print(
        f"{method}: {good} of {len(reports)} cases ok, {len(reports) - good - missing} failed, "
        f"{missing} not covered; {arrays} arrays compared"
    )
    return 0 if good == len(reports) else 1
