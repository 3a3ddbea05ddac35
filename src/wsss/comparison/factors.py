"""A balanced factorial study: how much of the variance among its cells each factor explains.

A cell is a group of runs, its number their mean over seeds. The sums of squares are the classical
ones of a balanced design: of a set of factors, the mean over all other factors, less the effects of
its subsets, squared and summed over the cells. They add up to the whole, so shares add up to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np
from numpy.typing import NDArray

from wsss.comparison.bootstrap import Draws

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """The design of a factorial study.

    Attributes:
        levels: factor -> its levels in their order, for factors with several.
        cells: one level of each factor -> the group that has them.
    """

    levels: Mapping[str, Sequence[str]]
    cells: Mapping[tuple[str, ...], str]

    @property
    def ordered(self) -> list[str]:
        """The groups of a design without missing cells, the last factor running fastest."""
        return [self.cells[cell] for cell in product(*self.levels.values())]

    @property
    def missing(self) -> int:
        """How many combinations of levels no group has; the sums of squares need all."""
        return prod(len(own) for own in self.levels.values()) - len(self.cells)

    @property
    def first_missing(self) -> tuple[str, ...]:
        """The first of these."""
        return next(cell for cell in product(*self.levels.values()) if cell not in self.cells)


@dataclass(frozen=True)
class Effect:
    """A number of a factorial study with its 95 % percentile interval.

    Attributes:
        name: of the factor, of a pair, of a level, or ``higher orders``.
        value: a share of the variance, or a mean mIoU.
        low: lower end.
        high: upper end.
    """

    name: str
    value: float
    low: float
    high: float


def factors_of(keys: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Factors | None:
    """Find the design behind groups; None where fewer than two factors vary.

    Args:
        keys: names of the factors.
        groups: group -> its level of every factor.
    """
    every = {key: sorted({levels[k] for levels in groups.values()}) for k, key in enumerate(keys)}
    varied = [k for k, key in enumerate(keys) if len(every[key]) > 1]
    if len(varied) < 2:
        return None
    cells = {tuple(levels[k] for k in varied): name for name, levels in groups.items()}
    return Factors({keys[k]: every[keys[k]] for k in varied}, cells)


def shares(factors: Factors, draws: Draws) -> list[Effect]:
    """Give the share of the variance of each factor, of each pair, and of all higher orders.

    Args:
        factors: a design without missing cells.
        draws: a metric's bootstrap, over all its groups.
    """
    observed, drawn = (_sums_of_squares(one, len(factors.levels)) for one in _cells(factors, draws))
    names = list(factors.levels)
    found = [
        _effect(" x ".join(names[k] for k in chosen), observed[chosen], drawn[chosen])
        for chosen in observed
        if len(chosen) <= 2
    ]
    if len(names) > 2:
        rest = [chosen for chosen in observed if len(chosen) > 2]
        higher = (np.sum([of[chosen] for chosen in rest], axis=0) for of in (observed, drawn))
        found.append(_effect("higher orders", *higher))
    return found


def means(factors: Factors, draws: Draws) -> dict[str, list[Effect]]:
    """Give factor -> the mean mIoU of each of its levels over all cells that have it.

    Args:
        factors: a design without missing cells.
        draws: a metric's bootstrap, over all its groups.
    """
    observed, drawn = _cells(factors, draws)
    found = {}
    for axis, (factor, levels) in enumerate(factors.levels.items()):
        others = tuple(k + 1 for k in range(len(factors.levels)) if k != axis)
        means_observed, means_drawn = observed.mean(axis=others), drawn.mean(axis=others)
        found[factor] = [
            _effect(level, means_observed[:, k], means_drawn[:, k])
            for k, level in enumerate(levels)
        ]
    return found


def _effect(name: str, observed: Values, drawn: Values) -> Effect:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Effect(name, float(observed[0]), float(low), float(high))


def _cells(factors: Factors, draws: Draws) -> tuple[Values, Values]:
    """Lay mIoUs out by levels: (1, l_1, ..., l_F) as observed, (R, l_1, ..., l_F) as drawn."""
    names = factors.ordered
    shape = [len(levels) for levels in factors.levels.values()]
    observed = np.array([draws.observed[name] for name in names]).reshape(1, *shape)
    return observed, np.stack([draws.drawn[name] for name in names], axis=1).reshape(-1, *shape)


def _sums_of_squares(cells: Values, count: int) -> dict[tuple[int, ...], Values]:
    """Give each set of factors' share (R,) of the sum of squares; 0 where all cells are equal.

    Args:
        cells: (R, l_1, ..., l_F).
        count: F.
    """
    axes = tuple(range(1, count + 1))
    effects: dict[tuple[int, ...], Values] = {}
    for order in range(count + 1):
        for chosen in combinations(range(count), order):
            others = tuple(axis for axis in axes if axis - 1 not in chosen)
            lower = [own for subset, own in effects.items() if {*subset} < {*chosen}]
            effects[chosen] = cells.mean(axis=others, keepdims=True) - sum(lower)
    sums = {
        chosen: (np.broadcast_to(effect, cells.shape) ** 2).sum(axis=axes)
        for chosen, effect in effects.items()
        if chosen
    }
    total = np.sum(list(sums.values()), axis=0)
    return {c: np.divide(s, total, out=np.zeros_like(s), where=total > 0) for c, s in sums.items()}
