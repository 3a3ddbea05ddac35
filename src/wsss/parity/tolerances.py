"""How far an array may be off, and how far it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
