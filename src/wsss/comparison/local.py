"""A study's dashboard as a local page: what its runs logged, in any logger, without a server.

It has the panels of `wsss.comparison.dashboard`, drawn with the report's charts and tables. Runs
are grouped in the same way: by method and by the settings that vary.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import quote

import numpy as np

from wsss.comparison.charts import Chart, Point, draw
from wsss.comparison.compare import NotRankedError
from wsss.comparison.dashboard import (
    ERRORS,
    FINALS,
    SEEDS,
    SEGMENTATIONS,
    LoggedRun,
    compared,
    varying,
)
from wsss.comparison.entries import logged_series
from wsss.comparison.grids import Cell, Grid
from wsss.comparison.page import Part, is_loss, legend, mean_lines, training_charts
from wsss.comparison.render import render
from wsss.comparison.tables import COSTS, EVALUATION, heading_of, mean_and_deviation
from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.results.store import MAP_NAMES, look_up, short_names

PAGE_FILE = "dashboard.html"
DRAWN = ("val/seed_miou", "val/seg_miou")  # by the charts of training
LONGEST_VALUE = 60  # characters of a protocol's field
Groups = Mapping[str, Sequence[LoggedRun]]


def local_dashboard(name: str, runs: Sequence[LoggedRun]) -> str:
    """Write the page of a study.

    Args:
        name: of the study.
        runs: all of its runs, finished or not.
    """
    varied = varying([run.config for run in runs])
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        settings = _settings(run, varied)
        title = " ".join([run.method, *(f"{key}={value}" for key, value in settings.items())])
        groups.setdefault(title, []).append(run)
    logged = {
        group: [logged_series(run.folder) for run in members] for group, members in groups.items()
    }
    keys = sorted({key for series in logged.values() for run in series for key in run} - {*DRAWN})
    rest = [key for key in keys if not is_loss(key)]
    splits = list(dict.fromkeys(split for run in runs for split in run.splits))
    done = {group: found for group, es in groups.items() if (found := [e for e in es if e.splits])}
    parts = [
        Part("final", "Final numbers", _finals(done, splits), [_summary(done, splits, varied)]),
        Part("compared", "Compared", grids=_compared(runs, varied)),
        Part("training", "Training", training_charts(logged)),
        Part(
            "logged", "Rates and scalars", [c for key in rest for c in mean_lines(key, logged, key)]
        ),
        Part("curves", "CAM threshold curves", _curves(done, splits)),
        Part("errors", "Precision, recall, activation", _errors(done, splits)),
        Part("classes", "Per class", grids=_classes(done, splits)),
        Part("cost", "Cost", _costs(done, splits)),
    ]
    sheets = [
        (f"{run.folder.name}/{path.name}", quote(path.relative_to(run.folder.parent).as_posix()))
        for run in runs
        for path in sorted(run.folder.glob("gallery/sheet_*.png"))
    ]
    shown = [part for part in parts if part.charts or part.grids]
    return render(
        "dashboard.html",
        title=f"Study {name}",
        made=f"wsss dashboard, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {len(runs)} runs",
        contents=[
            *((part.id, part.title) for part in shown),
            *[("gallery", "Gallery")][: len(sheets)],
        ],
        legend=legend(groups),
        parts=shown,
        sheets=sheets,
    )


def _settings(run: LoggedRun, varied: Sequence[str]) -> dict[str, str]:
    """Give a run's values of the settings that vary, by their short names."""
    names = short_names(varied)
    found = {name: look_up(run.config, key.split(".")) for key, name in names.items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def _values(runs: Sequence[LoggedRun], split: str, path: Sequence[str]) -> list[float]:
    """Give the numbers that runs have at a place of a split."""
    found = [look_up(run.splits.get(split, {}), path) for run in runs]
    return [float(value) for value in found if isinstance(value, int | float)]


def _summary(groups: Groups, splits: Sequence[str], varied: Sequence[str]) -> Grid:
    """List the varied settings of every group and its mIoUs: mean and deviation over its runs."""
    keys = [
        (split, key)
        for split in splits
        for key in (*SEGMENTATIONS, *SEEDS)
        if any(_values(runs, split, [key]) for runs in groups.values())
    ]
    names = [*short_names(varied).values()]
    heads = [f"{split}: {heading_of(key)}" for split, key in keys]
    grid = Grid("finished runs: mean ± deviation (%)", ["group", "runs", *names, *heads])
    for group, runs in groups.items():
        settings = _settings(runs[0], varied)
        cells = [str(len(runs)), *(settings.get(name, "-") for name in names)]
        cells += [mean_and_deviation(_values(runs, *_at(key)), True) for key in keys]
        grid.rows.append((group, [Cell(text) for text in cells]))
    return grid


def _compared(runs: Sequence[LoggedRun], varied: Sequence[str]) -> list[Grid]:
    """Give means and intervals as ``wsss compare`` does; where it refuses, say why."""
    grids = []
    for methods, found in compared(runs, varied):
        if isinstance(found, NotRankedError):
            rows = [
                (name, [Cell(one_line(value, LONGEST_VALUE)), Cell(", ".join(holders))])
                for name, values in found.different.items()
                for value, holders in values.items()
            ]
            title = f"not ranked: {', '.join(methods)}; protocols differ"
            notes = [f"for `wsss compare`: {found.advice}"]
            grids.append(Grid(title, ["what differs", "value", "groups"], rows, notes))
        elif isinstance(found, WSSSError):
            grids.append(Grid(f"not compared: {', '.join(methods)}", ["group"], notes=[str(found)]))
        else:
            grids += found
    return grids


def _at(key: tuple[str, str]) -> tuple[str, list[str]]:
    return key[0], [key[1]]


def _means(
    title: str, groups: Groups, split: str, rows: Mapping[str, Sequence[str]], x: str = "%"
) -> list[Chart]:
    """Draw each group's mean and deviation of several numbers, one a row."""
    points = []
    for row, path in rows.items():
        for group, runs in groups.items():
            if values := _values(runs, split, path):
                scaled = np.array(values) * (100 if x == "%" else 1)
                mean, spread = scaled.mean(), scaled.std(ddof=len(values) > 1)
                ends = (float(mean - spread), float(mean + spread))
                points.append(Point(group, float(mean), row, low=ends[0], high=ends[1]))
    return draw(f"{split}: {title}", [*groups], points, x=x, rows=24)


def _finals(groups: Groups, splits: Sequence[str]) -> list[Chart]:
    return [
        chart
        for split in splits
        for title, keys in FINALS.items()
        for chart in _means(title, groups, split, {key: [key] for key in keys})
    ]


def _curves(groups: Groups, splits: Sequence[str]) -> list[Chart]:
    """Draw seed scores over the threshold, of each group's first run; the top is the oracle."""
    charts = []
    for split in splits:
        for score in ("miou", "precision", "recall"):
            points = []
            for group, runs in groups.items():
                curve = runs[0].splits.get(split, {}).get("seed_curve") or {}
                pairs = zip(curve.get("thresholds", ()), curve.get(score, ()), strict=False)
                points += [Point(group, t, 100 * v, line=0, dot=False) for t, v in pairs]
            title = f"{split}: seed {score}, first run"
            charts += draw(title, [*groups], points, x="CAM threshold", y="%", zero="y")
    return charts


def _errors(groups: Groups, splits: Sequence[str]) -> list[Chart]:
    return [
        chart
        for split in splits
        for kind, title in MAP_NAMES.items()
        for chart in _means(
            title, groups, split, {error: ["maps", kind, error] for error in ERRORS}
        )
    ]


def _classes(groups: Groups, splits: Sequence[str]) -> list[Grid]:
    """List per-class scores, and the confusions of each kind of label map, of the first runs."""
    grids = []
    for split in splits:
        for group, runs in groups.items():
            metrics = runs[0].splits.get(split, {})
            columns = metrics.get("per_class") or {}
            classes = columns.get("class", [])
            scores = [key for key in columns if key.endswith("_iou")]
            grid = Grid(f"{split}, {group}: per class (%), first run", ["class", *scores])
            for row, name in enumerate(classes):
                cells = [Cell(mean_and_deviation([columns[key][row]], True)) for key in scores]
                grid.rows.append((name, cells))
            grids.append(grid)
            for kind in [key for key in MAP_NAMES if key in (metrics.get("confusion") or {})]:
                title = (
                    f"{split}, {group}: {MAP_NAMES[kind]}, % of the true class that is predicted as"
                )
                confusion = Grid(title, ["true class", *classes])
                for name, counts in zip(classes, metrics["confusion"][kind], strict=False):
                    shares = [100 * count / max(sum(counts), 1) for count in counts]
                    confusion.rows.append((name, [Cell(f"{share:.1f}") for share in shares]))
                grids.append(confusion)
    return grids


def _costs(groups: Groups, splits: Sequence[str]) -> list[Chart]:
    charts = []
    for title, key, scale, _ in COSTS:
        points = [
            Point(group, scale * value, group)
            for group, runs in groups.items()
            for run in runs
            if isinstance(value := run.cost.get(key), int | float)
        ]
        charts += draw(title, [*groups], points, x="", rows=24)
    for split in splits:
        charts += _means("evaluation", groups, split, {"seconds an image": EVALUATION}, x="s")
    return charts
