"""How far an array may be off, and how far it is."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# What float32 arithmetic may move an array by with the order of its sums (another machine, another
# version), over its largest entry: 64 steps. The official runs are up to 25 from their own float64
# twins; the mistakes that count move an array by 1e-4 and more.
ROUNDING = 64 * float(np.finfo(np.float32).eps)
_OF_DOUBLE = 1e-8  # no float32 computation is given so tight a tolerance
_TIMES = 4  # what another float32 run may be off, over the official float32 run's own error


@dataclass(frozen=True)
class Tolerance:
    """How far an entry may be off: the larger of the two bounds.

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
        """Say whether all but ``spared`` entries of two arrays of one shape are within bounds."""
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


def default_tolerance(name: str, expected: Array) -> Tolerance:
    """Choose a tolerance by the golden README's rule, from an array's type and name."""
    if expected.dtype.kind in "biuUS":
        return EXACT
    if "grad" in name:
        return GRADIENT
    if "loss" in name or name.startswith(("term", "total")):
        return LOSS
    return ACTIVATION


def rounding_error(single: Array, double: Array) -> float:
    """Measure how far an official float32 run is from the float64 run of the same case.

    Returns:
        The largest absolute difference; 0 where it is too large for rounding, since then one of
        the two is wrong.
    """
    absolute, relative = deviation(single, double)
    return absolute if relative <= ROUNDING else 0.0


def widened(stated: Tolerance, expected: Array, error: float) -> Tolerance:
    """Allow at least what float32 arithmetic may move an output by.

    Args:
        stated: the tolerance of the README; an exact one, and one of a float64 computation, stays.
        expected: the output, in any type; integers and text stay as they are.
        error: rounding error of the official float32 run, absolute.
    """
    tight = max(stated.relative, stated.absolute) <= _OF_DOUBLE
    if tight or expected.dtype.kind != "f":
        return stated
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return replace(stated, absolute=max(stated.absolute, ROUNDING * largest, _TIMES * error))


def deviation(actual: Array, expected: Array) -> tuple[float, float]:
    """Measure the largest absolute deviation, and the same over the largest expected entry.

    NaN equals NaN and infinity equals infinity; everything else that is not finite is infinitely
    far away, and so is another shape (one entry may have any number of dimensions) or other text.
    Only finite entries count as the largest expected one.
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
