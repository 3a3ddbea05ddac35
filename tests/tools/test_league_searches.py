"""The figure of the league's searches, from the records that are committed."""

import sys
from pathlib import Path
from statistics import fmean

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from league_searches import NAMES, PARTS, figure, rows

from wsss.core.places import config_root
from wsss.results.search import read_search

SEARCHES = config_root() / "experiments" / "league_minivoc" / "searches"


def test_every_search_is_a_curve_from_the_mean_to_the_best() -> None:
    folders = [path.parent for path in SEARCHES.rglob("search.json")]
    searches = [read_search(folder) for folder in folders]
    assert sorted(search.study for search in searches) == sorted(NAMES)
    drawn = rows(SEARCHES)
    assert {row["part"] for row in drawn} == {*PARTS}
    for search in searches:
        values = [100 * trial.value for trial in search.trials if trial.value is not None]
        named = [row for row in drawn if row["search"] == NAMES[search.study]]
        assert {row["trials"] for row in named} == {*range(1, 17)}
        assert all(row["low"] <= row["value"] <= row["high"] for row in named)
        firsts = [row["value"] for row in named if row["trials"] == 1]
        assert any(first == pytest.approx(fmean(values), abs=0.01) for first in firsts)
        lasts = [row["high"] for row in named if row["trials"] == 16]
        assert any(max(values) - 1 < last <= max(values) + 0.01 for last in lasts)
    svg = figure(drawn)
    assert all(f">{name}<" in svg for name in {*NAMES.values(), *PARTS})
