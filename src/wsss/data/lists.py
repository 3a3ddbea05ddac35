"""Lists that are made of other lists: a holdout, and what is left without it.

``train:holdout:3`` are the images that a holdout of three a class takes from the list ``train``,
``train:without:3`` all others of that list. Both can be cut again: ``train:holdout:3:holdout:1``.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError

CUT = re.compile(r"(.*):(holdout|without):([^:]*)", re.DOTALL)


@dataclass(frozen=True)
class Cut:
    """What a list takes from another one.

    Attributes:
        source: name of the other list, which may be cut itself.
        kept: the images of the holdout, or all without them.
        per_class: images a class of the holdout.
    """

    source: str
    kept: Literal["holdout", "without"]
    per_class: int

    def indices(self, names: Sequence[str], labels: NDArray[np.float32]) -> NDArray[np.int64]:
        """Give the ascending indices that it keeps.

        Args:
            names: the M names of the source.
            labels: (M, K) their image-level labels.

        Raises:
            WSSSError: none is left.
        """
        chosen = choose_names(names, labels, self.per_class)
        if self.kept == "holdout":
            return chosen
        rest = np.setdiff1d(np.arange(len(names)), chosen)
        if not len(rest):
            raise WSSSError(
                f"list {self.source}:without:{self.per_class} is empty: the holdout takes all "
                f"{len(names)} images; take fewer a class"
            )
        return rest


def cut_of(split: str) -> Cut | None:
    """Read how a list is made of another one; None for a list of its own.

    Raises:
        WSSSError: the number of images a class is none.
    """
    match = CUT.fullmatch(split)
    if match is None:
        return None
    source, kept, number = match.groups()
    if not re.fullmatch(r"[1-9]\d{0,8}", number):
        raise WSSSError(
            f"list {split!r}: {number!r} is no number of images a class; expected "
            f"{source}:{kept}:3 or another one"
        )
    return Cut(source, "holdout" if kept == "holdout" else "without", int(number))


def own_list(split: str) -> str:
    """Give the list of its own that a split is cut from, or is."""
    cut = cut_of(split)
    return split if cut is None else own_list(cut.source)


def is_few_shot(split: str) -> bool:
    """Say whether a list holds no more images than a holdout takes."""
    cut = cut_of(split)
    return cut is not None and (cut.kept == "holdout" or is_few_shot(cut.source))


def choose_names(
    names: Sequence[str], labels: NDArray[np.float32], per_class: int
) -> NDArray[np.int64]:
    """Choose a holdout's indices, which depend on names and labels alone, not on a run's seed.

    Names are ordered by their hash; each class in turn takes images until it has ``per_class``,
    counting those that other classes took (fewer where a class has fewer).

    Args:
        names: the M image names.
        labels: (M, K) image-level labels.
        per_class: images a class.

    Returns:
        Ascending indices.
    """
    order = np.array(sorted(range(len(names)), key=lambda i: _digest(names[i])))
    chosen = np.zeros(len(names), bool)
    for k in range(labels.shape[1]):
        missing = per_class - int((labels[chosen, k] > 0).sum())
        free = order[(labels[order, k] > 0) & ~chosen[order]]
        chosen[free[: max(missing, 0)]] = True
    return np.flatnonzero(chosen)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
