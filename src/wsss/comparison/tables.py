"""A comparison as tables."""

from collections.abc import Sequence

import numpy as np

from wsss.comparison.bootstrap import Difference
from wsss.comparison.compare import MANY, Comparison
from wsss.comparison.entries import MIOUS, class_column
from wsss.comparison.factors import Effect, means, shares
from wsss.comparison.grids import Cell, Grid
from wsss.results.store import MAP_NAMES, MAP_ROWS, ROWS, look_up

COSTS = (
    ("training, wall hours", "train_wall_hours", 1.0, ".2f"),
    ("training, GPU hours", "train_gpu_hours", 1.0, ".2f"),
    ("training, peak memory (GiB)", "train_peak_memory_bytes", 2.0**-30, ".2f"),
)
#: place of a split's seconds an image
EVALUATION = ("cost", "seconds_per_image")


def tables(comparison: Comparison) -> list[Grid]:
    """Make all tables of a comparison; those of a factorial study end with its factors."""
    return group_tables(comparison) + factor_tables(comparison)


def group_tables(comparison: Comparison) -> list[Grid]:
    """Make the tables of numbers, differences and per-class numbers: few groups are columns."""
    grids = [_numbers(comparison)]
    if comparison.draws and len(comparison.groups) > 1:
        grids.append(_differences(comparison))
    if comparison.primary is not None:
        grids.append(_details(comparison, comparison.primary))
        if comparison.same_classes:
            grids.append(_per_class(comparison, comparison.primary))
    return [_turned(grid) for grid in grids] if len(comparison.groups) > MANY else grids


def _turned(grid: Grid) -> Grid:
    """Make rows of a table's columns."""
    rows = [
        (heading, [cells[column] for _, cells in grid.rows])
        for column, heading in enumerate(grid.header[1:])
    ]
    return Grid(grid.title, ["", *(name.strip() for name, _ in grid.rows)], rows, grid.notes)


def factor_tables(c: Comparison) -> list[Grid]:
    """List each factor's share of the variance, and the mean of each of its levels."""
    factors = c.factors
    metrics = [
        (heading.strip(), key)
        for heading, key, _ in ROWS
        if key in c.draws and len(c.draws[key].observed) == len(c.groups)
    ]
    if factors is None or factors.missing or not metrics:
        return []
    design = " x ".join(f"{len(own)} {name}" for name, own in factors.levels.items())
    headings = [heading for heading, _ in metrics]
    share = Grid(
        f"share of the variance among cells ({design}), % [95 % interval]", ["factor", *headings]
    )
    share.rows = _of_effects([shares(factors, c.draws[key]) for _, key in metrics])
    share.notes = [
        "sums of squares of the cells' means over seeds; a pair's is its interaction. Draws of "
        "images and seeds scatter the cells further, so intervals of small shares lie high"
    ]
    mean = Grid("mean over all other factors, % [95 % interval]", ["level", *headings])
    by_metric = [means(factors, c.draws[key]) for _, key in metrics]
    for factor in factors.levels:
        mean.rows += _of_effects([levels[factor] for levels in by_metric])
    return [share, mean]


def _of_effects(columns: Sequence[Sequence[Effect]]) -> list[tuple[str, list[Cell]]]:
    """Write effects, one column a metric."""
    return [
        (row[0].name, [Cell(f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]")
                       for e in row])
        for row in zip(*columns, strict=True)
    ]  # fmt: skip


def _numbers(c: Comparison) -> Grid:
    """List every metric, one a row, one column a group."""
    any_entry = next(iter(c.groups.values()))[0]
    title = f"{any_entry.results['data']} {any_entry.split}, supervision: {c.supervision} (%)"
    headings = [f"{name} (n={len(es)})" for name, es in c.groups.items()]
    grid = Grid(title, ["metric", *headings], notes=c.notes)
    chosen = [dict.fromkeys(entry.card["choice"] for entry in es) for es in c.groups.values()]
    texts = ["; ".join(ways) for ways in chosen]
    if len(set(texts)) == 1:  # one line, since a row of long texts makes every column wide
        grid.notes = [f"settings of all chosen: {texts[0]}", *grid.notes]
    else:
        grid.rows.append(("settings chosen", [Cell(text) for text in texts]))
    for heading, key, percent in ROWS:
        if key not in c.metrics:
            continue
        clear = c.best(key) if key in c.draws and c.is_clear(key) else None
        cells = [
            Cell(mean_and_deviation([e.metrics.get(key) for e in es], percent), name == clear)
            for name, es in c.groups.items()
        ]
        grid.rows.append((heading, cells))
    for heading, key, scale, form in COSTS:
        found = [[(e.results.get("cost") or {}).get(key) for e in es] for es in c.groups.values()]
        if any(value is not None for values in found for value in values):
            cells = [Cell(plain_mean(values, scale, form)) for values in found]
            grid.rows.append((heading, cells))
    spent = [[look_up(e.metrics, EVALUATION) for e in es] for es in c.groups.values()]
    if any(value is not None for values in spent for value in values):
        cells = [Cell(plain_mean(values, 1.0, ".3f")) for values in spent]
        grid.rows.append(("evaluation, s/image", cells))
    return grid


def heading_of(metric: str) -> str:
    """Give the words for a key of ``results.json``."""
    return next(heading for heading, key, _ in ROWS if key == metric).strip()


def mean_and_deviation(values: Sequence[float | None], percent: bool) -> str:
    """Write ``61.2 ± 0.4`` over seeds, one seed without deviation; ``-`` where any is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    scale, digits = (100, 1) if percent else (1, 2)
    text = f"{scale * np.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {scale * np.std(known, ddof=1):.{digits}f}"


def plain_mean(values: Sequence[float | None], scale: float, form: str) -> str:
    """Write the mean of what is known, ``-`` where nothing is."""
    known = [value for value in values if value is not None]
    return f"{scale * np.mean(known):{form}}" if known else "-"


def reference(c: Comparison, metric: str) -> str:
    """Give the group that differences of a metric are taken to."""
    if c.baseline is not None and c.baseline in c.draws[metric].observed:
        return c.baseline
    return c.best(metric)


def _differences(c: Comparison) -> Grid:
    """Compare every group with the baseline, or the best one, with intervals."""
    grid = Grid(
        f"difference to {c.baseline or 'the best'}, points [95 % interval]",
        ["metric", *c.groups],
    )
    for heading, key, _ in ROWS:
        if key not in c.draws:
            continue
        draws, base = c.draws[key], reference(c, key)
        cells = []
        for name in c.groups:
            if name not in draws.observed:
                cells.append(Cell("-"))
            elif name == base:
                cells.append(Cell("reference"))
            else:
                cells.append(Cell(interval(draws.difference(name, base))))
        grid.rows.append((heading, cells))
    return grid


def interval(d: Difference) -> str:
    """Write a difference in points with its 95 % interval, and whether it is a tie."""
    text = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    return f"{text} tie" if d.is_tie else text


def _details(c: Comparison, primary: str) -> Grid:
    """List precision, boundaries, sizes of the primary kind of label map."""
    kind = MIOUS[primary][0]
    grid = Grid(f"{MAP_NAMES[kind]} in detail (%)", ["", *c.groups])
    for heading, path in MAP_ROWS:
        values = [
            [look_up(e.metrics["maps"].get(kind, {}), path) for e in es] for es in c.groups.values()
        ]
        grid.rows.append((heading, [Cell(mean_and_deviation(v, True)) for v in values]))
    return grid


def _per_class(c: Comparison, primary: str) -> Grid:
    """List the IoU of every class, mean over seeds."""
    grid = Grid(f"{heading_of(primary)}: per class (%)", ["class", *c.groups])
    for row, name in enumerate(c.entries[0].classes):
        cells = []
        for members in c.groups.values():
            values = [e.metrics["per_class"][class_column(primary)][row] for e in members]
            cells.append(Cell(mean_and_deviation(values, True)))
        grid.rows.append((name, cells))
    return grid
