"""Numbers of a search against their definitions, and what a stranger's record may say."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.comparison.search import (
    EACH,
    best_so_far,
    expected_best,
    expected_bests,
    importances,
    parallel_lines,
)
from wsss.comparison.searches import search_grids
from wsss.core.errors import WSSSError
from wsss.results.search import SEARCH_FILE, Search, read_search, write_search

SPACE = {
    "method.lr": {"low": 1e-5, "high": 1e-3, "log": True},
    "method.top_k": {"low": 1, "high": 16, "whole": True},
    "method.pce_sets": {"choices": ["training", "no_dropout"]},
}


def record(values: list[float | None], **changes: Any) -> dict[str, Any]:
    trials = [
        {
            "number": number,
            "state": "failed" if value is None else "finished",
            "by": "random" if number else "overlay",
            "settings": {
                "method.lr": 10.0 ** (-5 + 2 * number / len(values)),
                "method.top_k": 1 + number % 16,
                "method.pce_sets": ["training", "no_dropout"][number % 2],
            },
            "value": value,
            "seconds": 60.0,
            "commit": "abc",
            "error": "no memory" if value is None else None,
        }
        for number, value in enumerate(values)
    ]
    known = {n: v for n, v in enumerate(values) if v is not None}
    best = max(known, key=lambda number: known[number], default=None)
    content = {
        "status": "finished", "method": "tkp_pcl", "data": "minivoc", "study": "s",
        "objective": "seed_miou", "split": "train:holdout:3", "masks": 24, "list_sha256": "a" * 64,
        "steps": 200, "planned": len(values), "startup": 8, "seed": 0, "searcher": "Optuna",
        "overrides": ["method=tkp_pcl"], "space": SPACE, "trials": trials, "best": best,
        "choice": "tuned: 5 trials on a holdout of 24 masks",
    }  # fmt: skip
    return content | changes


def search(values: list[float | None]) -> Search:
    return Search.model_validate({"schema": 1, **record(values)})


def test_best_so_far_never_falls() -> None:
    curve = best_so_far(search([None, 0.3, None, 0.2, 0.5]))
    assert curve == [(1, 0.3), (2, 0.3), (3, 0.3), (4, 0.5)]


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_expected_best_is_the_mean_over_all_draws(trials: int) -> None:
    values = [0.4, 0.1, 0.4, 0.35]
    draws = itertools.product(values, repeat=trials)
    assert expected_best(values, trials) == pytest.approx(np.mean([max(draw) for draw in draws]))


def test_expected_bests_rise_within_their_intervals() -> None:
    values = np.random.default_rng(3).random(16).tolist()
    found = expected_bests(values, resamples=500)
    assert [one.trials for one in found] == list(range(1, 17))
    assert found[0].value == pytest.approx(np.mean(values))
    means = [one.value for one in found]
    assert means == sorted(means)
    assert means[-1] < max(values)
    for one in found:
        assert min(values) < one.low < one.value < one.high <= max(values)
    deviation = np.std(values) / 4  # of the mean of 16
    assert found[0].high - found[0].low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert expected_bests([0.3])[0].low == 0.3
    assert expected_bests([]) == []
    with pytest.raises(ValueError, match="expected values and trials"):
        expected_best([], 1)


def test_of_a_long_search_some_numbers_of_trials_are_given() -> None:
    """A record may hold ten thousand trials, which take no hours."""
    values = (np.arange(1000) / 1000).tolist()
    found = {one.trials: one for one in expected_bests(values, resamples=20)}
    assert {*range(1, EACH + 1), 1000} <= found.keys()
    assert len(found) <= 2 * EACH
    assert found[1000].value == expected_best(values, 1000)


def test_the_key_that_decides_is_the_important_one() -> None:
    pytest.importorskip("optuna")
    draws = np.random.default_rng(0).random((40, 2))
    content = record([0.0] * 40)
    for trial, (rate, top_k) in zip(content["trials"], draws, strict=True):
        trial["settings"] |= {"method.lr": 1e-5 * 100**rate, "method.top_k": 1 + int(16 * top_k)}
        trial["value"] = float(1 - (rate - 0.7) ** 2)
    content["best"] = int(np.argmin((draws[:, 0] - 0.7) ** 2))
    found = importances(Search.model_validate({"schema": 1, **content}))
    assert next(iter(found)) == "method.lr"
    assert sum(found.values()) == pytest.approx(1)
    assert found["method.lr"] > 0.5
    assert importances(search([0.1, 0.1, 0.2])) == {}


def test_parallel_lines_lie_on_the_scale_of_each_key() -> None:
    lines = parallel_lines(search([0.1, None, 0.2, 0.3]))
    assert [line.number for line in lines] == [0, 2, 3]
    assert [line.positions["method.lr"] for line in lines] == pytest.approx([0, 0.5, 0.75])
    assert [line.positions["method.top_k"] for line in lines] == pytest.approx([0, 2 / 15, 3 / 15])
    assert [line.positions["method.pce_sets"] for line in lines] == [0, 0, 1]


def test_tables_show_every_trial_and_what_fewer_give() -> None:
    pytest.importorskip("optuna")
    found = search_grids({"A": search([0.1, 0.45, None, 0.2, 0.3])})
    overview, expected, trials, keys = found
    assert overview.header[1:5] == ["best", "as it was", "trial", "ended"]
    assert [cell.text for cell in overview.rows[0][1][:5]] == ["45.0", "10.0", "1", "5 of 5", "1"]
    assert "24 masks of train:holdout:3" in trials.title
    assert [cells[1].text for _, cells in trials.rows] == [
        "10.0",
        "45.0",
        "failed",
        "20.0",
        "30.0",
    ]
    assert [cells[1].bold for _, cells in trials.rows] == [False, True, False, False, False]
    assert "trial 2 failed: no memory" in trials.notes
    assert "commit of all trials: abc" in trials.notes
    assert trials.header[5:] == ["lr", "top_k", "pce_sets"]
    assert [cell.text for cell in trials.rows[1][1][4:]] == ["2.512e-05", "2", "no_dropout"]
    assert [heading for heading, _ in expected.rows] == ["1", "2", "4"]
    assert expected.rows[0][1][0].text.startswith("26.2 [")
    assert {heading for heading, _ in keys.rows} == {"lr", "top_k", "pce_sets"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best": 0}, "best=0, but trial 1 has the best value"),
        ({"space": {}}, "trial 0 has other keys than the space"),
        ({"masks": -1}, "masks=-1"),
        ({"schema": 2}, "schema=2"),
        (
            {"space": SPACE | {"method.lr": {"low": 0.0, "high": 1.0, "log": True}}},
            "on a log scale",
        ),
        ({"space": SPACE | {"method.lr": {"low": 2.0, "high": 1.0}}}, "low=2.0 is not below"),
        (
            {"space": SPACE | {"method.top_k": {"low": 0.5, "high": 16.0, "whole": True}}},
            "0.5 to 16.0 are no ends of whole numbers",
        ),
        ({"space": SPACE | {"method.lr": {}}}, "expected low and high, or choices"),
        ({"space": SPACE | {"method.lr": {"choices": [1, True]}}}, "a choice is given twice"),
    ],
)
def test_a_record_that_says_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_search(tmp_path, record([0.1, 0.2]))
    assert read_search(tmp_path).best == 1
    path = tmp_path / SEARCH_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WSSSError, match=said):
        read_search(tmp_path)
    path.write_text("{")
    with pytest.raises(WSSSError, match="not valid JSON"):
        read_search(tmp_path)


def test_a_setting_outside_of_its_range_is_refused(tmp_path: Path) -> None:
    for key, value in (("method.lr", -1.0), ("method.top_k", 2.5)):
        content = record([0.1, 0.2])
        content["trials"][1]["settings"][key] = value
        write_search(tmp_path, content)
        with pytest.raises(WSSSError, match=f"{key}={value} of trial 1 is outside of its range"):
            read_search(tmp_path)
