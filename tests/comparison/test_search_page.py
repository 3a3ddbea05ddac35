"""Searches in the report: curves, axes, tables, terms, and what a stranger's record may say."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from runs_on_disk import make_run
from test_report import parsed
from test_search_numbers import SPACE, record, search

from wsss.cli import main
from wsss.comparison.charts import CHOSEN
from wsss.comparison.entries import load
from wsss.comparison.search import expected_bests
from wsss.comparison.search_page import MOST_STRANDS, SearchesPart, searches_part
from wsss.comparison.searches import part_searches, read_searches
from wsss.results.search import Search, write_search

ATTACK = "</script><img src=x onerror=alert(1)>\x00"
VALUES = [0.2, 0.1, None, 0.4, 0.35, 0.3]


def part(**values: list[float | None]) -> SearchesPart:
    return searches_part({name: search(found) for name, found in values.items()}, [])


def page_of(paths: list[Path], out: Path, *arguments: str) -> str:
    line = [*map(str, paths), f"out={out}", "gallery=0", "resamples=50", *arguments]
    assert main(["report", *line]) == 0
    page = (out / "index.html").read_text()
    parsed(page)
    return page


def strands_of(svg: str) -> dict[str, dict[str, str]]:
    """The attributes of each trial's line."""
    found = {}
    for path in re.findall(r'<path aria-label="trial [^>]*>', svg):
        attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', path))
        found[attributes["aria-label"].partition(":")[0]] = attributes
    return found


def places_of(path: str) -> list[tuple[float, float]]:
    """The corners of a line."""
    return [(float(x), float(y)) for x, _, y in (at.partition(",") for at in path.split("L"))]


def test_curves_of_searches_have_the_looks_of_the_legend() -> None:
    best, expected = part(A=VALUES, B=[0.1, 0.1, 0.2]).charts
    assert best.title == "best so far: CAM seed mIoU, image labels given, minivoc train:holdout:3"
    texts = re.findall(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="point"',
                       str(best.svg))  # fmt: skip
    assert texts == ["A: 20.0 by trial 0", "A: 40.0 by trial 3", "B: 10.0 by trial 0",
                     "B: 20.0 by trial 2"]  # fmt: skip
    four = next(one for one in expected_bests(search(VALUES).values) if one.trials == 4)
    said = f"A: 4, {100 * four.value:.4g} [{100 * four.low:.1f}, {100 * four.high:.1f}]"
    assert f'aria-label="{said}"' in str(expected.svg)
    assert str(expected.svg).count('aria-roledescription="area mark"') == 2, "a band a search"
    for chart in (best, expected):
        lines = re.findall(r'"line mark" [^>]* stroke="([^"]*)"[^>]*dasharray="([^"]*)"',
                           str(chart.svg))  # fmt: skip
        assert lines == [("var(--c0)", "1,0"), ("var(--c1)", "6,3")]
    stairs = places_of(re.findall(r'"line mark" d="M([^"]*)"', str(best.svg))[0])
    steps = [(x1 - x0, y0 - y1) for (x0, y0), (x1, y1) in itertools.pairwise(stairs)]
    assert [(dx > 0, dy > 0) for dx, dy in steps] == [
        (True, False), (True, False), (True, False), (False, True), (True, False), (True, False)
    ]  # fmt: skip
    for chart in part(A=[0.1, 0.2, 0.3]).charts:
        assert not re.search(r">[12]\.[05]<", str(chart.svg)), "trials are whole"


def test_every_trial_with_a_value_is_a_line_through_all_keys() -> None:
    (found,) = part(A=VALUES).searches
    chart = found.charts[0]
    strands = strands_of(str(chart.svg))
    assert [*strands] == [f"trial {k}" for k in (1, 5, 4, 0, 3)], "the chosen one above all"
    assert strands["trial 3"]["stroke"] == CHOSEN
    assert strands["trial 0"]["stroke-dasharray"] == "4,3"
    assert strands["trial 1"]["stroke"] == "var(--v0)", "the lowest value"
    assert strands["trial 4"]["stroke"] == "var(--v4)"
    points = places_of(strands["trial 3"]["d"][1:])
    places = [x / points[-1][0] for x, _ in points]
    assert places == pytest.approx([0.5, 3 / 15, 1, 1], abs=1e-3), "lr lies in the middle: log"
    heights = [y for _, y in points]
    assert heights == sorted(heights)
    for text in ("lr (log)", "top_k", "pce_sets", "seed_miou (%)", "1e-05", "0.001", "no_dropout",
                 "10.0", "40.0", "0.0001"):  # fmt: skip
        assert f">{text}<" in str(chart.svg), text
    assert part(A=[None, None]).searches[0].charts == []


def test_of_a_long_search_the_best_lines_are_drawn() -> None:
    values: list[float | None] = [k / 1000 for k in range(MOST_STRANDS + 100)]
    chart = part(A=values).searches[0].charts[0]
    assert chart.title == f"A: settings of the best {MOST_STRANDS} trials that have a value"
    strands = strands_of(str(chart.svg))
    assert len(strands) == MOST_STRANDS
    assert "trial 100" in strands
    assert "trial 99" not in strands


def test_other_terms_are_named_and_drawn_apart() -> None:
    searches = {name: search(VALUES) for name in "AB"}
    searches["B"] = Search.model_validate(
        {"schema": 1, **record(VALUES, objective="seed_threshold_oracle", steps=50)}
    )
    found = searches_part(searches, [])
    assert found.overview.notes == [
        "differs: objective: seed_miou of A / seed_threshold_oracle of B",
        "differs: steps: 200 of A / 50 of B",
    ]
    assert len(found.charts) == 4
    assert [cells[0].text for _, cells in found.overview.rows] == ["40.0", "0.4"], "no per cent"
    assert searches_part({"A": searches["A"]}, []).overview.notes == []


def test_runs_and_searches_share_a_page(tmp_path: Path) -> None:
    """Trials are no runs of it; a run that has the chosen settings is named."""
    content = record(VALUES)
    runs = tmp_path / "runs"
    tuned = runs / "searches" / "tkp_pcl-minivoc-s0-1a2b3c4d"
    make_run(runs / "other", method="Other", choice=content["choice"])
    make_run(tuned / "trials" / "one", method="Trial")
    make_run(runs / "searches" / "killed_early" / "trials" / "one", method="Killed")
    write_search(tuned, content)
    assert part_searches([runs]) == ([runs], [tuned])
    assert part_searches([runs / "searches", tuned, tuned / "search.json"]) == ([], [tuned])
    page = page_of([runs], tmp_path / "both")
    assert "<h1>tiny val</h1>" in page
    assert "Trial (n=1)" not in page
    assert "Killed (n=1)" not in page
    assert '<a href="#search-0">Search: tkp_pcl</a>' in page
    assert "<dt>taken by</dt>" not in page, "its choice is the same, its settings are not"
    for kind in ("md", "csv", "tex"):
        assert "expected best" in (tmp_path / "both" / f"table.{kind}").read_text()
    alone = page_of([tuned], tmp_path / "alone")
    assert "<h1>Searches for settings: minivoc</h1>" in alone
    assert "http" not in alone


def test_the_runs_that_took_the_chosen_settings_are_named(tmp_path: Path) -> None:
    content = record(VALUES)
    chosen = content["trials"][3]["settings"]
    method = {key.removeprefix("method."): value for key, value in chosen.items()}
    for name, settings, choice in (
        ("a", method, content["choice"]),
        ("b", method | {"lr": 1e-5}, content["choice"]),
        ("c", method, f"{content['choice']}, then changed"),
    ):
        make_run(tmp_path / name, method=name, choice=choice, config={"method": settings})
    entries = load([tmp_path], by="method", split=None)
    (found,) = searches_part({"A": search(VALUES)}, entries).searches
    assert dict(found.facts)["taken by"] == "a (n=1)"


def test_show_takes_what_report_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searches = tmp_path / "runs" / "searches"
    for name in "ab":
        write_search(searches / name, record(VALUES))
    (searches / "a" / "chosen.yaml").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    for given in (searches, tmp_path / "runs", searches / "a" / "search.json"):
        assert main(["tune", "--show", str(given)]) == 0
        printed = capsys.readouterr().out
        assert ("\nb " in printed) == (given.suffix == ""), "all below a folder"
        assert printed.endswith(f"{searches / 'a' / 'chosen.yaml'}\n")
    for missing in (empty, empty / "search.json", searches / "c"):
        assert main(["tune", "--show", str(searches), str(missing)]) == 2
        assert f"{missing}: no search.json there or below" in capsys.readouterr().err


def test_unfinished_runs_beside_searches_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(tmp_path / "searches" / "x", record(VALUES))
    run = tmp_path / "study" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    page_of([tmp_path], tmp_path / "out")
    assert "left out, not finished (1): run" in capsys.readouterr().err


def test_searches_of_one_method_go_by_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name / "x" for name in "ab"] + [tmp_path / "a" / "y"]
    for folder in folders:
        write_search(folder, record(VALUES))
    assert [*read_searches(folders[1:])] == ["x", "y"]
    assert [*read_searches(folders)] == [str(folder) for folder in folders]


def test_a_strangers_record_is_text_and_nothing_else(tmp_path: Path) -> None:
    space = {f"method.{ATTACK}": SPACE["method.lr"], "url": {"choices": [ATTACK, "https://a.b"]}}
    changes = dict.fromkeys(("method", "data", "study", "objective", "split", "searcher", "choice",
                             "list_sha256"), ATTACK)  # fmt: skip
    content: dict[str, Any] = record(VALUES, **changes, space=space, overrides=[ATTACK])
    for trial in content["trials"]:
        trial |= dict.fromkeys(("commit", "run"), ATTACK)
        trial["settings"] = {f"method.{ATTACK}": 1e-4, "url": ATTACK}
    content["trials"][2]["error"] = ATTACK
    for name in ("<img src=x>", "x"):  # by which searches of one method go
        write_search(tmp_path / "searches" / name, content)
    page = page_of([tmp_path], tmp_path / "out")
    assert "<img" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in (tmp_path / "out" / "table.md").read_text()


def test_without_optuna_importances_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    (found,) = part(A=VALUES).searches
    assert [chart.title for chart in found.charts][1:] == [
        "A: importance of each key for being among the best quarter"
    ]
    monkeypatch.setitem(sys.modules, "optuna", None)
    (found,) = part(A=VALUES).searches
    assert len(found.charts) == 1
    assert dict(found.facts)["importance"] == "importances need Optuna: pip install 'wsss[optuna]'"
