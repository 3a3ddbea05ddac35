"""``wsss report``: one page that shows methods beside each other."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from wsss.comparison.charts import (
    SHAPES,
    Chart,
    Series,
    colour_of,
    dash_of,
    line_chart,
    row_chart,
    scatter,
    small_multiples,
)
from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, class_column, logged_series
from wsss.comparison.grids import Grid
from wsss.comparison.headline import headline_of
from wsss.comparison.panels import gallery_of
from wsss.comparison.render import render
from wsss.comparison.tables import EVALUATION, heading_of, tables
from wsss.evaluation.ledger import past_readings
from wsss.results.store import MAP_NAMES, look_up

PAGE = "index.html"
#: logged series -> run -> (step, value)
Logged = dict[str, list[tuple[float, float]]]
SYMBOLS = dict(zip(SHAPES, "●■▲◆✚▼", strict=True))
SIZES = (
    ("below 1 %", ("size_iou", "small")),
    ("1 to 10 %", ("size_iou", "medium")),
    ("over 10 %", ("size_iou", "large")),
)
BOUNDARIES = (
    ("3 px", ("trimap_iou", "3")),
    ("5 px", ("trimap_iou", "5")),
    ("10 px", ("trimap_iou", "10")),
    ("all", ("miou",)),
    ("B-IoU", ("boundary_iou",)),
)


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Attributes:
        id: its anchor.
        title: its heading.
        charts: drawn below the tables.
        grids: the tables.
    """

    id: str
    title: str
    charts: Sequence[Chart] = ()
    grids: Sequence[Grid] = ()


def page_of(comparisons: Sequence[Comparison], *, gallery: int) -> str:
    """Write the whole page as HTML.

    Args:
        comparisons: one a supervision.
        gallery: images of each kind (best, median, worst, largest disagreement); 0: no pictures.
    """
    first = comparisons[0].entries[0]
    sections = [_section(c, f"s{k}", gallery) for k, c in enumerate(comparisons)]
    contents = []
    for section in sections:
        several = f" ({section['supervision']})" if len(sections) > 1 else ""
        contents.append((section["id"], f"Outcome{several}"))
        contents += [(part.id, part.title) for part in section["parts"]]
        contents += [(f"{section['id']}-gallery", "The same images")] if section["gallery"] else []
        contents.append((f"{section['id']}-protocols", "Protocols"))
    return render(
        "report.html",
        title=f"{first.results['data']} {first.split}",
        made=f"wsss report, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        contents=contents,
        sections=sections,
    )


def _section(c: Comparison, name: str, gallery: int) -> dict[str, Any]:
    """Gather all about one supervision."""
    grids = tables(c)
    first = 2 if c.draws and len(c.groups) > 1 else 1  # numbers, and where ranked differences
    logged = {group: [logged_series(e.home) for e in es] for group, es in c.groups.items()}
    results = _seed_charts(c)
    if c.primary is not None:
        results += _class_chart(c, c.primary) if c.same_classes else []
        results += _shape_charts(c, c.primary) + _cost_charts(c, c.primary)
    parts = [
        Part(f"{name}-numbers", "Numbers", grids=grids[:first]),
        Part(f"{name}-charts", "Charts", charts=results),
        Part(f"{name}-training", "Training", charts=training_charts(logged)),
        Part(f"{name}-details", "In detail", grids=grids[first:]),
    ]
    return {
        "id": name,
        "supervision": c.supervision,
        "headline": headline_of(c),
        "legend": legend(c.groups),
        "parts": [part for part in parts if part.charts or part.grids],
        "gallery": gallery_of(c, gallery, f"{name}-image") if gallery > 0 else None,
        "cards": _cards(c),
    }


def legend(names: Iterable[str]) -> list[dict[str, str]]:
    """Give the looks of the groups of a page, in their order."""
    return [
        {
            "name": name,
            "colour": colour_of(k),
            "dash": " ".join(map(str, dash_of(k))),
            "symbol": SYMBOLS[SHAPES[k % len(SHAPES)]],
        }
        for k, name in enumerate(names)
    ]


def _mean(values: Sequence[float | None]) -> float:
    """Give the mean over seeds, NaN where one is missing."""
    known = [math.nan if value is None else value for value in values]
    return float(np.mean(known)) if known else math.nan


def _seed_charts(c: Comparison) -> list[Chart]:
    """Draw the threshold curve with the declared, the holdout's and the oracle threshold."""
    series = []
    for k, (name, members) in enumerate(c.groups.items()):
        if any("seed_curve" not in e.metrics for e in members):
            continue
        curves = [e.metrics["seed_curve"] for e in members]
        first = members[0].metrics
        if any(curve["thresholds"] != curves[0]["thresholds"] for curve in curves):
            curves = curves[:1]
        points = [
            (t, 100 * _mean([curve["miou"][i] for curve in curves]))
            for i, t in enumerate(curves[0]["thresholds"])
        ]
        at = dict(points)
        marks = [
            (first[key], at[first[key]], f"{label} {first[key]}: {at[first[key]]:.1f}")
            for key, label in (
                ("seed_threshold", "declared"),
                ("seed_threshold_holdout", "holdout's"),
                ("seed_threshold_oracle", "oracle"),
            )
            if first.get(key) in at
        ]
        series.append(Series(name, k, points, marks))
    title = "CAM seeds: mIoU by threshold (dots: declared, holdout's, oracle)"
    return line_chart(title, series, x_label="CAM threshold", y_label="mIoU (%)")


def _class_chart(c: Comparison, primary: str) -> list[Chart]:
    """Draw IoU per class of the primary metric."""
    classes, column = c.entries[0].classes, class_column(primary)
    rows = [name if classes.count(name) == 1 else f"{k} {name}" for k, name in enumerate(classes)]
    series = []
    for k, (name, members) in enumerate(c.groups.items()):
        values = [
            [e.metrics["per_class"][column][row] for e in members] for row in range(len(rows))
        ]
        points = [(100 * _mean(found), row) for row, found in enumerate(values)]
        series.append(Series(name, k, points))
    return row_chart(f"{heading_of(primary)}: IoU per class", rows, series, x_label="IoU (%)")


def _shape_charts(c: Comparison, primary: str) -> list[Chart]:
    """Draw IoU by object size, and near boundaries, of the primary kind of label map."""
    kind = MIOUS[primary][0]
    charts = []
    for title, label, steps in (
        ("IoU by object size", "share of the image", SIZES),
        ("mIoU near boundaries", "pixels within; B-IoU: Boundary IoU", BOUNDARIES),
    ):
        series = []
        for k, (name, members) in enumerate(c.groups.items()):
            scores = [e.metrics["maps"][kind] for e in members]
            points = [
                (i, 100 * _mean([look_up(one, path) for one in scores]))
                for i, (_, path) in enumerate(steps)
            ]
            series.append(Series(name, k, points))
        charts += line_chart(
            f"{MAP_NAMES[kind]}: {title}", series, x_label=label, y_label="IoU (%)",
            x_names=[step for step, _ in steps], dots=True,
        )  # fmt: skip
    return charts


def _cost_charts(c: Comparison, primary: str) -> list[Chart]:
    """Draw accuracy against hours of training and against time an image."""

    def against(what: str, label: str, costs: dict[str, list[float | None]]) -> list[Chart]:
        series = []
        for k, (name, members) in enumerate(c.groups.items()):
            scores = [100 * e.metrics[primary] for e in members]
            mean, spread = float(np.mean(scores)), float(np.std(scores, ddof=len(scores) > 1))
            bars = [(mean - spread, mean + spread)]
            series.append(Series(name, k, [(_mean(costs[name]), mean)], bars=bars))
        title = f"{heading_of(primary)} against {what} (bars: deviation over seeds)"
        return scatter(title, series, x_label=label, y_label="mIoU (%)")

    training: list[Chart] = []
    for path, label in (("train_gpu_hours", "GPU hours"), ("train_wall_hours", "wall hours")):
        training = training or against(
            "training",
            f"training, {label}",
            {
                n: [(e.results.get("cost") or {}).get(path) for e in es]
                for n, es in c.groups.items()
            },
        )
    spent = {n: [look_up(e.metrics, EVALUATION) for e in es] for n, es in c.groups.items()}
    return training + against("evaluation", "seconds an image", spent)


def training_charts(logged: dict[str, list[Logged]]) -> list[Chart]:
    """Draw validations during training, which are no results, and every loss.

    A loss has one colour and dash pattern in the whole page, and an axis of its own.

    Args:
        logged: group -> what each of its runs logged.
    """
    charts = []
    for key, label in (("val/seed_miou", "CAM seed"), ("val/seg_miou", "segmentation")):
        series = [
            Series(name, k, [(step, 100 * value) for step, value in mean_by_step(runs, key)])
            for k, (name, runs) in enumerate(logged.items())
        ]
        title = f"validation during training: {label}"
        charts += line_chart(title, series, x_label="step", y_label="mIoU (%)", dots=True)
    names = sorted(
        {key for runs in logged.values() for run in runs for key in run if _is_loss(key)}
    )
    for group, runs in logged.items():
        losses = [
            Series(name.removeprefix("train/"), k, run[name])
            for k, name in enumerate(names)
            for run in runs
            if name in run
        ]
        charts += small_multiples(f"{group}: losses by step, one line a seed", losses)
    return charts


def mean_by_step(runs: Sequence[Logged], key: str) -> list[tuple[float, float]]:
    """Give the mean over those runs that logged a step, in the order of the steps."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run.get(key, []):
            values.setdefault(step, []).append(value)
    return [(step, float(np.mean(found))) for step, found in sorted(values.items())]


def _is_loss(key: str) -> bool:
    return key.startswith("train/") and key.endswith("loss")


def _cards(c: Comparison) -> list[dict[str, str]]:
    """Give every run's protocol card and ledger."""
    return [
        {
            "name": f"{name}, seed {entry.results['seed']}: {entry.folder.name}",
            "text": json.dumps({**entry.card, "cost": entry.results.get("cost")}, indent=1),
            "ledger": "\n".join(json.dumps(line) for line in past_readings(entry.home))
            or "no ledger",
        }
        for name, members in c.groups.items()
        for entry in members
    ]
