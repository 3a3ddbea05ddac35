"""``wsss parity METHOD DIR``: compare the product with numbers of the official code.

The numbers lie in ``*.npz`` files: ``in_*`` arrays go in, ``out_*`` came out of a float32 run and
``out64_*`` of a float64 run, ``cfg`` is a JSON string of settings. Files of other methods carry
plain names and ``config``; there the kind says what goes in, and all else came out. The kind of a
case is the longest known stem that its file name begins with. Whatever the file holds is compared;
an output that the product does not produce fails the case.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line

METHODS = ("toco", "clustercam", "getam")
# in files with plain names: how weights are made, and how far mistakes and rounding move a result
NOT_OUTPUTS = (
    "param_names",
    "param_shapes",
    "control_*",
    "*fp32_error",
    "*_fp64_diff",
    "*margin_*",
)

Array = npt.NDArray[Any]
Produced = Mapping[str, Array | Tensor | float | bool | list[str]]


@dataclass(frozen=True)
class Tolerance:
    """What an entry may be off: the larger of the two bounds.

    Attributes:
        absolute: Bound of the deviation itself.
        relative: Bound of the deviation over the array's largest finite entry.
        entrywise: The relative bound is over each single entry instead.
        spare: Share of the entries that may be further off, or the name of the file's array that
            says how many may.
    """

    absolute: float = 0.0
    relative: float = 0.0
    entrywise: bool = False
    spare: float | str = 0.0

    def holds(self, actual: Array, expected: Array, spared: int = 0) -> bool:
        """Whether all but ``spared`` entries of two arrays of one shape are within the bounds."""
        a, b = actual.astype(np.float64), expected.astype(np.float64)
        finite = np.abs(b[np.isfinite(b)])
        scale = np.abs(b) if self.entrywise else finite.max(initial=0.0)
        with np.errstate(invalid="ignore"):
            near = np.abs(a - b) <= np.maximum(self.absolute, self.relative * scale)
        fits = near | (a == b) | (np.isnan(a) & np.isnan(b))
        return int(np.count_nonzero(~fits)) <= spared


EXACT = Tolerance()
ACTIVATION = Tolerance(absolute=5e-5)
LOSS = Tolerance(relative=1e-5, entrywise=True)
GRADIENT = Tolerance(relative=1e-4)


@dataclass(frozen=True)
class Case:
    """The contents of one file.

    Attributes:
        name: File name without suffix.
        inputs: The arrays that go in, ``in_`` removed.
        settings: The ``cfg`` or ``config`` dictionary.
        extra: All other arrays that are not outputs (``param_names`` and the like).
        outputs: The arrays that came out, named as in the file.
    """

    name: str
    inputs: dict[str, Array]
    settings: dict[str, Any]
    extra: dict[str, Array]
    outputs: dict[str, Array]


@dataclass(frozen=True)
class Kind:
    """One kind of case.

    Attributes:
        run: Computes the outputs, named as in the file without ``out_``. Masked entries are not
            compared.
        tolerances: Tolerances by output name where the general rule does not fit; the longest key
            with which the name begins counts.
        inputs: For files with plain names: patterns of the arrays that go in. None: the file marks
            them by ``in_``.
    """

    run: Callable[[Case], Produced]
    tolerances: Mapping[str, Tolerance]
    inputs: tuple[str, ...] | None = None


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
        """One line for the terminal."""
        if not self.covered:
            return f"{self.name:<28} not covered: {self.problem}"
        verdict = f"FAILED: {self.problem}" if self.problem else "ok"
        return (
            f"{self.name:<28} {self.compared:>3} arrays  max abs {self.absolute:.2e}  "
            f"max rel {self.relative:.2e}  {verdict}"
        )


def default_tolerance(name: str, expected: Array) -> Tolerance:
    """The golden README's rule: by what the array is, told by its type and name."""
    if expected.dtype.kind in "biuUS":
        return EXACT
    if "grad" in name:
        return GRADIENT
    if "loss" in name or name.startswith(("term", "total")):
        return LOSS
    return ACTIVATION


def tolerance_of(kind: Kind, name: str, expected: Array) -> Tolerance:
    """The kind's own tolerance for an output where it has one, else the general rule."""
    own = [key for key in kind.tolerances if name.startswith(key)]
    return kind.tolerances[max(own, key=len)] if own else default_tolerance(name, expected)


def _as_array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asanyarray(value)


def deviation(actual: Array, expected: Array) -> tuple[float, float]:
    """Largest absolute deviation, and the same over the largest finite expected entry.

    NaN equals NaN and infinity equals infinity; everything else that is not finite is infinitely
    far away, and so is another shape (one entry may have any number of dimensions) or other text.
    """
    if actual.size == expected.size == 1:
        actual = actual.reshape(expected.shape)
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    if expected.size == 0:
        return 0.0, 0.0
    if expected.dtype.kind in "US" or actual.dtype.kind in "US":
        far = 0.0 if np.array_equal(actual.astype(str), expected.astype(str)) else float("inf")
        return far, far
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    absolute = float(np.where(np.isfinite(difference), difference, np.inf).max())
    finite = np.abs(b[np.isfinite(b)])
    largest = float(finite.max()) if finite.size else 0.0
    if absolute == 0:
        return 0.0, 0.0
    return absolute, absolute / largest if largest else float("inf")


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
    """How many entries of an output may be off."""
    if isinstance(allowed.spare, str):
        return int(case.extra.get(allowed.spare, np.array(0)))
    return int(allowed.spare * expected.size)


def read_case(path: Path, inputs: tuple[str, ...] | None = None) -> Case:
    """Read a file; ``inputs`` as of :class:`Kind`."""
    case = Case(path.stem, {}, {}, {}, {})
    with np.load(path, allow_pickle=False) as content:
        for key in content.files:
            if key in ("cfg", "config"):
                case.settings.update(json.loads(str(content[key])))
            elif inputs is not None:
                place = case.outputs
                if any(fnmatchcase(key, pattern) for pattern in NOT_OUTPUTS):
                    place = case.extra
                elif any(fnmatchcase(key, pattern) for pattern in inputs):
                    place = case.inputs
                place[key] = content[key]
            elif key.startswith("in_"):
                case.inputs[key.removeprefix("in_")] = content[key]
            elif key.startswith(("out_", "out64_")):
                case.outputs[key] = content[key]
            else:
                case.extra[key] = content[key]
    return case


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
