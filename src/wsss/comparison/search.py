"""Numbers of a search: how far it had come, what fewer trials would give, which key mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsss.core.extras import import_optuna
from wsss.results.search import Range, Search, Setting

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: share of the best trials that a key's importance is about: with 16 trials, the best four
BEST_SHARE = 0.25
EACH = 64  # trials up to which the expected best of every number is given


def best_so_far(search: Search) -> list[tuple[int, float]]:
    """Give (trial, best value up to it) for every trial; one that failed adds none.

    Trials before the first value are left out.
    """
    found: list[tuple[int, float]] = []
    for trial in sorted(search.trials, key=lambda each: each.number):
        values = [
            each for each in (trial.value, found[-1][1] if found else None) if each is not None
        ]
        if values:
            found.append((trial.number, max(values)))
    return found


def expected_best(values: Sequence[float], trials: int) -> float:
    """Give the expected best of so many trials drawn from those that were run.

    With the values in ascending order v_1 <= ... <= v_N, as Dodge et al. (EMNLP 2019, equation 6)
    have it: sum_i v_i ((i / N)^n - ((i - 1) / N)^n). It takes trials for independent draws, as
    those of a random search are; TPE's are not.

    Args:
        values: N of all finished trials.
        trials: n, 1 or more.

    Raises:
        ValueError: there is no value, or ``trials`` is below one.
    """
    return float(_expected(np.sort(np.asarray(values, float)[None]), trials)[0])


def _expected(ascending: NDArray[np.float64], trials: int) -> NDArray[np.float64]:
    """Give the expected best of each row of (R, N) values, which ascend."""
    number = ascending.shape[1]
    if number < 1 or trials < 1:
        raise ValueError(f"expected values and trials, got {number} and {trials}")
    steps = (np.arange(number + 1) / number) ** trials
    expected: NDArray[np.float64] = ascending @ np.diff(steps)
    return expected


@dataclass(frozen=True)
class Expected:
    """What so many trials give.

    Attributes:
        trials: n.
        value: expected best.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    trials: int
    value: float
    low: float
    high: float


def expected_bests(
    values: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> list[Expected]:
    """Give the expected best of 1 to N trials with intervals: trials are drawn with replacement.

    Of a long search not every number is given, but those up to ``EACH``, and N.

    Args:
        values: N of all finished trials.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    known = np.asarray(values, float)
    if not len(known):
        return []
    drawn = np.random.default_rng(seed).choice(known, size=(resamples, len(known)))
    drawn.sort(axis=1)
    step = -(-len(known) // EACH)
    numbers = {*range(1, min(EACH, len(known)) + 1), *range(EACH, len(known), step), len(known)}
    found = []
    for trials in sorted(numbers):
        low, high = np.percentile(_expected(drawn, trials), (2.5, 97.5))
        found.append(Expected(trials, expected_best(values, trials), float(low), float(high)))
    return found


def importances(search: Search) -> dict[str, float]:
    """Give the share that each key has in a trial being among the best quarter, largest first.

    It is Optuna's PED-ANOVA (Watanabe et al., IJCAI 2023), which draws nothing at random. With few
    trials it is a hint.

    Returns:
        Shares that sum to one; nothing where fewer than four trials or equal values tell nothing.

    Raises:
        WSSSError: Optuna is missing.
    """
    if len(set(search.values)) < 4:
        return {}
    optuna = import_optuna("importances need Optuna")
    distributions = {key: _distribution(choice) for key, choice in search.space.items()}
    study = optuna.create_study(direction="maximize")
    for trial in search.trials:
        if trial.value is not None:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(trial.settings), distributions=distributions, value=trial.value
                )
            )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def _distribution(choice: Range) -> "BaseDistribution":
    """Give Optuna's form of a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if choice.choices is not None:
        return CategoricalDistribution(choice.choices)
    assert choice.low is not None
    assert choice.high is not None
    if choice.whole:
        return IntDistribution(int(choice.low), int(choice.high), log=choice.log)
    return FloatDistribution(choice.low, choice.high, log=choice.log)


@dataclass(frozen=True)
class Line:
    """A trial as a line through parallel axes.

    Attributes:
        number: of the trial.
        settings: value of each key, one an axis.
        positions: of these values between the ends of their axes, 0 to 1.
        value: of the trial.
    """

    number: int
    settings: dict[str, Setting]
    positions: dict[str, float]
    value: float


def parallel_lines(search: Search) -> list[Line]:
    """Give the finished trials as lines through one axis a key; a log scale is a log axis."""
    return [
        Line(
            trial.number,
            trial.settings,
            {key: _position(search.space[key], value) for key, value in trial.settings.items()},
            trial.value,
        )
        for trial in search.trials
        if trial.value is not None
    ]


def _position(choice: Range, value: Setting) -> float:
    """Say where a value lies between the ends of its range; the first choice lies at 0."""
    if choice.choices is not None:
        return choice.choices.index(value) / max(len(choice.choices) - 1, 1)
    assert choice.low is not None
    assert choice.high is not None
    assert isinstance(value, int | float)
    low, high, at = choice.low, choice.high, float(value)
    if choice.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if low < high else 0.0  # ends may have one logarithm
