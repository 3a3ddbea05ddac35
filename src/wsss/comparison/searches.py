"""A search as tables."""

from wsss.comparison.grids import Cell, Grid
from wsss.comparison.search import best_so_far, expected_bests, importances
from wsss.results.search import Search, Setting
from wsss.results.store import ROWS

#: numbers of trials in the table of what fewer would give
SHOWN = (1, 2, 4, 8, 16, 32, 64)


def search_grids(search: Search) -> list[Grid]:
    """Make the tables of trials, of the expected best and of importances."""
    known = {key: (heading, 100 if percent else 1) for heading, key, percent in ROWS}
    heading, scale = known.get(search.objective, (search.objective, 1))
    return [_trials(search, heading, scale), _expected(search, scale), _importances(search)]


def _trials(search: Search, heading: str, scale: int) -> Grid:
    """List every trial, the best one bold."""
    best = dict(best_so_far(search))
    title = (
        f"{search.method} on {search.data}: {heading}, {search.steps} steps, "
        f"{search.masks} masks of {search.split}"
    )
    grid = Grid(title, ["trial", "by", "value", "so far", "s", "settings"])
    for trial in search.trials:
        bold = trial.number == search.best
        value = trial.error or "failed" if trial.value is None else f"{scale * trial.value:.1f}"
        cells = [trial.by, value, _number(best.get(trial.number), scale)]
        cells.append("-" if trial.seconds is None else f"{trial.seconds:.0f}")
        cells.append(", ".join(f"{_short(k)} {_setting(v)}" for k, v in trial.settings.items()))
        grid.rows.append((str(trial.number), [Cell(text, bold) for text in cells]))
    grid.notes.append(f"{search.searcher}; seed {search.seed}")
    if search.choice:
        grid.notes.append(search.choice)
    return grid


def _number(value: float | None, scale: int) -> str:
    return "-" if value is None else f"{scale * value:.1f}"


def _short(key: str) -> str:
    return key.removeprefix("method.")


def _setting(value: Setting) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _expected(search: Search, scale: int) -> Grid:
    """List what a reader would get with fewer trials."""
    found = {each.trials: each for each in expected_bests(search.values)}
    last = len(search.values)
    grid = Grid("expected best [95 % interval]", ["trials", "value"])
    for trials in sorted({n for n in (*SHOWN, last) if n in found}):
        one = found[trials]
        text = f"{scale * one.value:.1f} [{scale * one.low:.1f}, {scale * one.high:.1f}]"
        grid.rows.append((str(trials), [Cell(text)]))
    grid.notes.append("Dodge et al. 2019, as if all trials were independent draws")
    return grid


def _importances(search: Search) -> Grid:
    """List the share of each key."""
    grid = Grid("what the best quarter of the trials has in common (%)", ["key", "importance"])
    for key, share in importances(search).items():
        grid.rows.append((_short(key), [Cell(f"{100 * share:.0f}")]))
    if not grid.rows:
        grid.notes.append("fewer than four different values say nothing")
    return grid
