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
from wsss.parity.cases import Case, Kind, Produced, read_case, tolerance_of
from wsss.parity.tolerances import Array, Tolerance, deviation

METHODS = ("toco", "clustercam", "getam")


@dataclass(frozen=True)
class Report:
    """The result of one case; ``problem`` is empty where all is well."""

    name: str
    compared: int
    absolute: float
    relative: float
    problem: str
    covered: bool = True

    def line(self) -> str:
        """Format one line for the terminal."""
        if not self.covered:
            return f"{self.name:<28} not covered: {self.problem}"
        verdict = f"FAILED: {self.problem}" if self.problem else "ok"
        return (
            f"{self.name:<28} {self.compared:>3} arrays  max abs {self.absolute:.2e}  "
            f"max rel {self.relative:.2e}  {verdict}"
        )


def _as_array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asanyarray(value)


def compare(kind: Kind, case: Case, produced: Produced) -> Report:
    """Compare every stored output; the float64 ones of marked files with the same product value."""
    worst, problems = [0.0, 0.0], []
    compared = 0
    for key, expected in case.outputs.items():
        plain = key.partition("_")[2] if kind.inputs is None else key
        if plain not in produced:
            problems.append(f"{key} was not produced")
            continue
        actual = _as_array(produced[plain])
        if isinstance(actual, np.ma.MaskedArray):
            expected = np.where(np.ma.getmaskarray(actual), actual.data, expected)
            actual = actual.data
        absolute, relative = deviation(actual, expected)
        compared += 1
        allowed = tolerance_of(kind, plain, expected)
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
    return Report(case.name, compared, worst[0], worst[1], "; ".join(problems))


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
        return compare(kind, case, kind.run(case))
    except Exception as error:
        # A corrupt file can break anything from the zip reader to a tensor shape.
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ValueError | OSError | zipfile.BadZipFile) and not _readable(path):
            reason = "not a readable .npz file"
        return Report(path.stem, 0, 0.0, 0.0, reason)


def run_parity(method: str, folder: Path) -> int:
    """Run every case in a folder and print one line each and a total.

    Args:
        method: Method name, one of :data:`METHODS`.
        folder: Folder of ``*.npz`` files.

    Returns:
        Exit code: 0 only when there is at least one case and every one is ok.

    Raises:
        WSSSError: Unknown method or missing folder.
    """
    if method not in METHODS:
        raise WSSSError(f"no parity cases for method '{method}'; known: {', '.join(METHODS)}")
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
