"""The part of a report about searches for settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wsss.comparison.charts import Axis, Chart, Point, Strand, draw, draw_parallel
from wsss.comparison.entries import Entry
from wsss.comparison.grids import Grid
from wsss.comparison.search import Line, best_so_far, expected_bests, parallel_lines
from wsss.comparison.searches import (
    SHOWN,
    chosen_in_words,
    expected_grid,
    objective_in_words,
    overview_grid,
    scale_of,
    shares_of,
    short_key,
    trials_grid,
    written_setting,
    written_value,
)
from wsss.results.search import Range, Search
from wsss.results.store import look_up

MOST_STRANDS = 200  # lines of one chart; of a longer search the best ones


@dataclass(frozen=True)
class SearchPart:
    """What is shown of one search.

    Attributes:
        id: its anchor.
        name: of the search.
        facts: what judged, who searched, what was chosen.
        charts: its trials on parallel axes, and the importance of each key.
        trials: all of them.
    """

    id: str
    name: str
    facts: list[tuple[str, str]]
    charts: list[Chart]
    trials: Grid


@dataclass(frozen=True)
class SearchesPart:
    """What is shown of all searches.

    Attributes:
        overview: one a row.
        charts: curves of those that have one objective, each search a line.
        expected: what fewer trials would give.
        searches: each of them.
    """

    overview: Grid
    charts: list[Chart]
    expected: Grid
    searches: list[SearchPart]


def searches_part(searches: Mapping[str, Search], entries: Sequence[Entry]) -> SearchesPart:
    """Gather all about some searches.

    Args:
        searches: by the name that each has among the others.
        entries: runs of the same page, which may have their settings.
    """
    alike: dict[tuple[str, ...], dict[str, Search]] = {}
    for name, search in searches.items():
        key = (search.objective, search.data, search.split, search.list_sha256)
        alike.setdefault(key, {})[name] = search
    return SearchesPart(
        overview_grid(searches),
        [chart for members in alike.values() for chart in _curves([*searches], members)],
        expected_grid(searches),
        [
            _search_part(f"search-{number}", name, [*searches], search, entries)
            for number, (name, search) in enumerate(searches.items())
        ],
    )


def _search_part(
    anchor: str, name: str, names: Sequence[str], search: Search, entries: Sequence[Entry]
) -> SearchPart:
    """Gather all about one search."""
    shares, why = shares_of(search)
    points = [Point(name, 100 * share, short_key(key)) for key, share in shares.items()]
    title = f"{name}: importance of each key for being among the best quarter"
    charts = _settings_chart(name, search) + draw(title, names, points, x="share (%)", rows=22)
    facts = _facts(search) + _taken_by(search, entries) + [("importance", why)][: bool(why)]
    return SearchPart(anchor, name, facts, charts, trials_grid(name, search))


def _curves(names: Sequence[str], searches: Mapping[str, Search]) -> list[Chart]:
    """Draw how far searches had come, and what fewer trials of them would give.

    Args:
        names: of all searches of the page, whose looks are those of the page.
        searches: those that are judged by one number on one list.
    """
    first = next(iter(searches.values()))
    said = f"{objective_in_words(first)}, {first.data} {first.split}"
    unit = _unit(first)
    so_far = [point for name, search in searches.items() for point in _steps(name, search)]
    expected = [
        Point(
            name,
            one.trials,
            scale_of(search) * one.value,
            low=scale_of(search) * one.low,
            high=scale_of(search) * one.high,
            line=0,
            dot=one.trials in (*SHOWN, len(search.values)),
        )
        for name, search in searches.items()
        for one in expected_bests(search.values)
    ]
    return [
        *draw(f"best so far: {said}", names, so_far, x="trial", y=unit, zero=""),
        *draw(
            f"expected best of so many trials, 95 % interval: {said}",
            names, expected, x="trials", y=unit, zero="", bands=True,
        ),
    ]  # fmt: skip


def _unit(search: Search) -> str:
    return f"{search.objective} (%)" if scale_of(search) == 100 else search.objective


def _steps(name: str, search: Search) -> list[Point]:
    """Give the best value up to each trial as stairs, with a dot where it rose."""
    points: list[Point] = []
    for trial, best in best_so_far(search):
        value = scale_of(search) * best
        if points and points[-1].y != value:
            points.append(Point(name, trial, points[-1].y, line=0, dot=False))
        rose = not points or points[-1].y != value
        text = f"{name}: {written_value(search, best)} by trial {trial}"
        points.append(Point(name, trial, value, text, line=0, dot=rose))
    return points


def _settings_chart(name: str, search: Search) -> list[Chart]:
    """Draw the trials on parallel axes, one a key and one for the value."""
    lines = sorted(parallel_lines(search), key=lambda line: line.value)[-MOST_STRANDS:]
    if not lines:
        return []
    low, high = lines[0].value, lines[-1].value
    axes = [_axis(key, choice) for key, choice in search.space.items()]
    ends = dict.fromkeys((written_value(search, low), written_value(search, high)))
    axes.append(Axis(_unit(search), [*zip((0.0, 1.0), ends, strict=False)]))
    levels = {
        line.number: (line.value - low) / (high - low) if low < high else 1.0 for line in lines
    }
    lines.sort(key=lambda line: (line.number == search.best, line.number == 0))
    strands = [_strand(search, line, levels[line.number]) for line in lines]
    which = "all" if len(lines) == len(search.values) else f"the best {len(lines)}"
    title = f"{name}: settings of {which} trials that have a value"
    return draw_parallel(title, axes, strands)


def _axis(key: str, choice: Range) -> Axis:
    """Make the axis of a key, with its ends or its choices."""
    if choice.choices is not None:
        last = max(len(choice.choices) - 1, 1)
        ticks = [(k / last, written_setting(each)) for k, each in enumerate(choice.choices)]
        return Axis(short_key(key), ticks)
    title = f"{short_key(key)}{' (log)' if choice.log else ''}"
    return Axis(title, [(0.0, f"{choice.low:g}"), (1.0, f"{choice.high:g}")])


def _strand(search: Search, line: Line, level: float) -> Strand:
    """Make the line of a trial; the chosen one stands out, the settings as they were are dashed."""
    settings = {short_key(key): written_setting(line.settings[key]) for key in search.space}
    value = written_value(search, line.value)
    listed = ", ".join(f"{key} {text}" for key, text in settings.items())
    chosen = line.number == search.best
    return Strand(
        [*(line.positions[key] for key in search.space), level],
        f"trial {line.number}: {value}; {listed}",
        level,
        [*settings.values(), value] if chosen else (),
        dashed=line.number == 0,
    )


def _facts(search: Search) -> list[tuple[str, str]]:
    """Say what judged, who searched and what came of it."""
    trained = search.masks_trained_on
    failed = len(search.trials) - len(search.values)
    seconds = sum(trial.seconds or 0 for trial in search.trials)
    return [
        ("judged by", f"{objective_in_words(search)} ({search.objective})"),
        ("on", f"{search.data} {search.split}, {search.masks} masks "
               f"(list {search.list_sha256[:8]})"),
        *([("masks trained on", str(trained))] if trained is not None else []),
        ("trials", f"{len(search.trials)} of {search.planned} ended, {failed} failed; "
                   f"{search.steps} steps each, {seconds:.0f} s together"),
        ("searcher", f"{search.searcher}; seed {search.seed}"),
        ("began from", " ".join(search.overrides)),
        ("chosen", chosen_in_words(search)),
        ("declared as", search.choice or "nothing yet, trials are missing"),
    ]  # fmt: skip


def _taken_by(search: Search, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Name the groups of runs that declare this search's choice and have its settings."""
    if search.best_trial is None:
        return []
    chosen = search.best_trial.settings.items()
    runs = Counter(
        entry.group
        for entry in entries
        if entry.card["choice"] == search.choice
        and all(
            look_up(entry.results, ["config", *key.split(".")]) == value for key, value in chosen
        )
    )
    listed = ", ".join(f"{group} (n={number})" for group, number in runs.items())
    return [("taken by", listed)] if listed else []
