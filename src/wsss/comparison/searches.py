"""Searches for settings as tables: what they found, on which terms, every trial."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from wsss.comparison.entries import finished_below
from wsss.comparison.grids import Cell, Grid
from wsss.comparison.search import best_so_far, expected_bests, importances
from wsss.core.errors import WSSSError
from wsss.results.search import SEARCH_FILE, Search, Setting, read_search
from wsss.results.store import ROWS

#: numbers of trials in the table of what fewer would give
SHOWN = (1, 2, 4, 8, 16, 32, 64)
#: what searches have in common that are on equal terms
TERMS = ("data", "objective", "split", "list_sha256", "steps", "planned", "startup", "seed",
         "searcher")  # fmt: skip


def part_searches(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Part what was given into folders of runs and searches, those below a given one among them.

    A folder that holds searches is one of runs too where a finished run lies beside them.

    Raises:
        WSSSError: results are damaged.
    """
    runs, searches = [], []
    for path in paths:
        folder = path.parent if path.name == SEARCH_FILE else path
        found = sorted(file.parent for file in folder.rglob(SEARCH_FILE))
        searches += found
        if not found or (folder not in found and finished_below(folder)):
            runs.append(path)
    return runs, list(dict.fromkeys(searches))


def read_searches(folders: Sequence[Path]) -> dict[str, Search]:
    """Read searches, by method, or by folder where methods are alike.

    Raises:
        WSSSError: a folder holds none, or its record is damaged.
    """
    found = {folder: read_search(folder) for folder in folders}
    named = [[search.method, folder.name, str(folder)] for folder, search in found.items()]
    for names in zip(*named, strict=True):
        if len({*names}) == len(names):
            break
    return dict(zip(names, found.values(), strict=True)) if found else {}


def search_grids(searches: Mapping[str, Search]) -> list[Grid]:
    """Make the tables of some searches: overview, expected best, then those of each.

    Args:
        searches: by the name that each has among the others.
    """
    grids = [overview_grid(searches), expected_grid(searches)]
    for name, search in searches.items():
        grids += [trials_grid(name, search), _importances(name, search)]
    return grids


def objective_in_words(search: Search) -> str:
    """Give the heading of a search's objective."""
    return next(
        (head.strip() for head, key, _ in ROWS if key == search.objective), search.objective
    )


def scale_of(search: Search) -> int:
    """Give the factor by which values are shown: shares are in per cent, thresholds are not."""
    return next((1 for _, key, percent in ROWS if key == search.objective and not percent), 100)


def written_value(search: Search, value: float | None) -> str:
    """Write a value of the objective as tables have it; ``-`` where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if scale_of(search) == 100 else f"{value:.3g}"


def written_setting(value: Setting) -> str:
    """Write a setting, a rate with four digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_key(key: str) -> str:
    """Give a key without the group that nearly all are of."""
    return key.removeprefix("method.")


def chosen_in_words(search: Search) -> str:
    """Name the best trial and its settings."""
    if search.best_trial is None:
        return "none, no trial has a value"
    settings = search.best_trial.settings.items()
    listed = ", ".join(f"{short_key(key)} {written_setting(value)}" for key, value in settings)
    return f"trial {search.best_trial.number}: {listed}"


def overview_grid(searches: Mapping[str, Search]) -> Grid:
    """List searches, what each found and what its first trial, the settings as they were, gave."""
    header = ["search", "best", "as it was", "trial", "ended", "failed", "s", "objective"]
    grid = Grid("searches: value of the objective (%)", header)
    for name, search in searches.items():
        first = next((trial.value for trial in search.trials if trial.number == 0), None)
        best = search.best_trial
        value = None if best is None else best.value
        seconds = [trial.seconds for trial in search.trials if trial.seconds is not None]
        cells = [
            written_value(search, value),
            written_value(search, first),
            "-" if best is None else str(best.number),
            f"{len(search.trials)} of {search.planned}",
            str(len(search.trials) - len(search.values)),
            f"{sum(seconds):.0f}" if seconds else "-",
            objective_in_words(search),
        ]
        grid.rows.append((name, [Cell(text) for text in cells]))
    for key in TERMS:
        values: dict[str, list[str]] = {}
        for name, search in searches.items():
            values.setdefault(str(getattr(search, key))[:200], []).append(name)
        if len(values) > 1:
            said = " / ".join(f"{value} of {', '.join(names)}" for value, names in values.items())
            grid.notes.append(f"differs: {key}: {said}")
    return grid


def trials_grid(name: str, search: Search) -> Grid:
    """List every trial with its settings, the best one bold; why trials failed stands below."""
    so_far = dict(best_so_far(search))
    title = (
        f"{name} on {search.data}: {objective_in_words(search)}, {search.steps} steps, "
        f"{search.masks} masks of {search.split}"
    )
    commits = list(dict.fromkeys(t.commit for t in search.trials if t.commit is not None))
    several = len(commits) > 1
    keys = [short_key(key) for key in search.space]
    grid = Grid(title, ["trial", "by", "value", "so far", "s", *keys, *["commit"][:several]])
    for trial in search.trials:
        bold = trial.number == search.best
        cells = [trial.by, "failed", written_value(search, so_far.get(trial.number))]
        if trial.value is not None:
            cells[1] = written_value(search, trial.value)
        else:
            grid.notes.append(
                f"trial {trial.number} failed: {trial.error or 'for no stated reason'}"
            )
        cells.append("-" if trial.seconds is None else f"{trial.seconds:.0f}")
        cells += [written_setting(trial.settings[key]) for key in search.space]
        cells += [(trial.commit or "-")[:12]][:several]
        grid.rows.append((str(trial.number), [Cell(text, bold) for text in cells]))
    grid.notes.append(f"{search.searcher}; seed {search.seed}")
    grid.notes += [f"commit of all trials: {commits[0]}"] if len(commits) == 1 else []
    grid.notes += [search.choice] if search.choice else []
    return grid


def expected_grid(searches: Mapping[str, Search]) -> Grid:
    """List what a reader would get with fewer trials of each search."""
    found = {
        name: {one.trials: one for one in expected_bests(search.values)}
        for name, search in searches.items()
    }
    last = {max(each, default=0) for each in found.values()}
    grid = Grid("expected best [95 % interval]", ["trials", *searches])
    for trials in sorted({*SHOWN, *last}):
        cells = []
        for name, search in searches.items():
            one = found[name].get(trials)
            if one is None:
                cells.append(Cell("-"))
                continue
            low, high = (written_value(search, end) for end in (one.low, one.high))
            cells.append(Cell(f"{written_value(search, one.value)} [{low}, {high}]"))
        if any(cell.text != "-" for cell in cells):
            grid.rows.append((str(trials), cells))
    grid.notes.append("Dodge et al. 2019, as if all trials were independent draws")
    return grid


def shares_of(search: Search) -> tuple[dict[str, float], str]:
    """Give the importance of each key, or nothing and why."""
    try:
        found = importances(search)
    except WSSSError as error:  # a page may be made where Optuna is missing
        return {}, str(error)
    return found, "" if found else "fewer than four different values say nothing"


def _importances(name: str, search: Search) -> Grid:
    """List the share of each key."""
    title = f"{name}: what the best quarter of the trials has in common (%)"
    grid = Grid(title, ["key", "importance"])
    found, why = shares_of(search)
    for key, share in found.items():
        grid.rows.append((short_key(key), [Cell(f"{100 * share:.0f}")]))
    grid.notes += [why] if why else []
    return grid
