"""``wsss report``: one page that shows methods beside each other."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from wsss.comparison.charts import SYMBOLS, Chart, Point, draw, look_of
from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, Entry, class_column, logged_series
from wsss.comparison.grids import Grid
from wsss.comparison.headline import headline_of
from wsss.comparison.panels import gallery_of
from wsss.comparison.render import render
from wsss.comparison.search_page import searches_part
from wsss.comparison.tables import EVALUATION, factor_tables, group_tables, heading_of
from wsss.evaluation.ledger import past_readings
from wsss.results.search import Search
from wsss.results.store import MAP_NAMES, look_up

PAGE = "index.html"
#: logged series -> run -> (step, value)
Logged = dict[str, list[tuple[float, float]]]
MOST_POINTS, MOST_DOTS = 200, 20  # of a line, which is drawn about 200 pixels wide
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


def page_of(
    comparisons: Sequence[Comparison],
    searches: Mapping[str, Search],
    *,
    gallery: int,
    trust: Sequence[str] = (),
) -> str:
    """Write the whole page as HTML.

    Args:
        comparisons: one a supervision.
        searches: for settings, by name.
        gallery: images of each kind (best, median, worst, largest disagreement); 0: no pictures.
        trust: packages beside ``wsss`` whose classes a run may name; their code is run.
    """
    sections = [_section(c, f"s{k}", gallery, trust) for k, c in enumerate(comparisons)]
    contents = []
    for section in sections:
        several = f" ({section['supervision']})" if len(sections) > 1 else ""
        contents.append((section["id"], f"Outcome{several}"))
        contents += [(part.id, part.title) for part in section["parts"]]
        contents += [(f"{section['id']}-gallery", "The same images")] if section["gallery"] else []
        contents.append((f"{section['id']}-protocols", "Protocols"))
    entries = [entry for c in comparisons for entry in c.entries]
    tuned = searches_part(searches, entries) if searches else None
    if tuned is not None:
        contents.append(("searches", "Searches"))
        contents += [(search.id, f"Search: {search.name}") for search in tuned.searches]
    return render(
        "report.html",
        title=_title(comparisons, searches),
        made=f"wsss report, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        contents=contents,
        sections=sections,
        tuned=tuned,
        looks=legend(searches),
        pictures=any(section["gallery"] and section["gallery"].tables for section in sections),
    )


def _title(comparisons: Sequence[Comparison], searches: Mapping[str, Search]) -> str:
    """Name what the runs, or else the searches, were judged on."""
    if comparisons:
        first = comparisons[0].entries[0]
        return f"{first.results['data']} {first.split}"
    data = dict.fromkeys(search.data for search in searches.values())
    return f"Searches for settings: {', '.join(data)}"


def _section(c: Comparison, name: str, gallery: int, trust: Sequence[str]) -> dict[str, Any]:
    """Gather all about one supervision."""
    grids = group_tables(c)
    first = 2 if c.draws and len(c.groups) > 1 else 1  # numbers, and where ranked differences
    logged = {group: [logged_series(e.home) for e in es] for group, es in c.groups.items()}
    results = _seed_charts(c)
    if c.primary is not None:
        results += _class_chart(c, c.primary) if c.same_classes else []
        results += _shape_charts(c, c.primary) + _cost_charts(c, c.primary)
    parts = [
        Part(f"{name}-numbers", "Numbers", grids=grids[:first]),
        Part(f"{name}-factors", "Factors", grids=factor_tables(c)),
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
        "gallery": gallery_of(c, gallery, f"{name}-image", trust) if gallery > 0 else None,
        "cards": _cards(c),
    }


def legend(names: Iterable[str]) -> list[dict[str, Any]]:
    """Give the looks of the groups of a page, in their order."""
    looks = [(name, look_of(number)) for number, name in enumerate(names)]
    return [
        {"name": name, "colour": look["color"], "symbol": SYMBOLS[look["shape"]],
         "dash": " ".join(map(str, look["strokeDash"]))}
        for name, look in looks
    ]  # fmt: skip


def _mean(values: Sequence[float | None]) -> float:
    """Give the mean over seeds, NaN where one is missing."""
    known = [math.nan if value is None else value for value in values]
    return float(np.mean(known)) if known else math.nan


def _seed_charts(c: Comparison) -> list[Chart]:
    """Draw the threshold curve with the declared, the holdout's and the oracle threshold."""
    points = []
    for name, members in c.groups.items():
        if any("seed_curve" not in e.metrics for e in members):
            continue
        curves = [e.metrics["seed_curve"] for e in members]
        first = members[0].metrics
        if any(curve["thresholds"] != curves[0]["thresholds"] for curve in curves):
            curves = curves[:1]
        at = {
            t: 100 * _mean([curve["miou"][i] for curve in curves])
            for i, t in enumerate(curves[0]["thresholds"])
        }
        points += [Point(name, t, miou, line=0, dot=False) for t, miou in at.items()]
        points += [
            Point(
                name,
                first[key],
                at[first[key]],
                f"{name}: {label} {first[key]}: {at[first[key]]:.1f}",
            )
            for key, label in (
                ("seed_threshold", "declared"),
                ("seed_threshold_holdout", "holdout's"),
                ("seed_threshold_oracle", "oracle"),
            )
            if first.get(key) in at
        ]
    title = "CAM seeds: mIoU by threshold (dots: declared, holdout's, oracle)"
    return draw(title, [*c.groups], points, x="CAM threshold", y="mIoU (%)", zero="y")


def _class_chart(c: Comparison, primary: str) -> list[Chart]:
    """Draw IoU per class of the primary metric."""
    column = class_column(primary)
    points = [
        Point(name, 100 * _mean([e.metrics["per_class"][column][row] for e in members]), label)
        for row, label in enumerate(c.entries[0].classes)
        for name, members in c.groups.items()
    ]
    title = f"{heading_of(primary)}: IoU per class"
    return draw(title, [*c.groups], points, x="IoU (%)", rows=18)


def _shape_charts(c: Comparison, primary: str) -> list[Chart]:
    """Draw IoU by object size, and near boundaries, of the primary kind of label map."""
    kind = MIOUS[primary][0]
    charts = []
    for title, label, steps in (
        ("IoU by object size", "share of the image", SIZES),
        ("mIoU near boundaries", "pixels within; B-IoU: Boundary IoU", BOUNDARIES),
    ):
        points = [
            Point(
                name,
                step,
                100 * _mean([look_up(e.metrics["maps"][kind], path) for e in es]),
                line=0,
            )
            for step, path in steps
            for name, es in c.groups.items()
        ]
        title = f"{MAP_NAMES[kind]}: {title}"
        charts += draw(title, [*c.groups], points, x=label, y="IoU (%)")
    return charts


def _cost_charts(c: Comparison, primary: str) -> list[Chart]:
    """Draw accuracy against hours of training and against time an image."""

    def against(what: str, label: str, cost_of: Callable[[Entry], float | None]) -> list[Chart]:
        points = []
        for name, members in c.groups.items():
            scores = [100 * e.metrics[primary] for e in members]
            mean, spread = _mean(scores), float(np.std(scores, ddof=len(scores) > 1))
            cost = _mean([cost_of(e) for e in members])
            points.append(Point(name, cost, mean, low=mean - spread, high=mean + spread))
        title = f"{heading_of(primary)} against {what} (bars: deviation over seeds)"
        return draw(title, [*c.groups], points, x=label, y="mIoU (%)", zero="x")

    def training(key: str) -> Callable[[Entry], float | None]:
        return lambda e: look_up(e.results.get("cost") or {}, (key,))

    return [
        *(against("training", "training, GPU hours", training("train_gpu_hours"))
          or against("training", "training, wall hours", training("train_wall_hours"))),
        *against("evaluation", "seconds an image", lambda e: look_up(e.metrics, EVALUATION)),
    ]  # fmt: skip


def training_charts(logged: Mapping[str, Sequence[Logged]]) -> list[Chart]:
    """Draw validations during training, which are no results, and every loss.

    A loss has one colour and dash pattern in the whole page, and an axis of its own.

    Args:
        logged: group -> what each of its runs logged.
    """
    charts = []
    for key, label in (("val/seed_miou", "CAM seed"), ("val/seg_miou", "segmentation")):
        charts += mean_lines(f"validation during training: {label} mIoU", logged, key)
    keys = {key for runs in logged.values() for run in runs for key in run}
    names = sorted(key.removeprefix("train/") for key in keys if is_loss(key))
    for group, runs in logged.items():
        points = [
            Point(name, *pair, line=seed, dot=len(line) < MOST_DOTS)
            for name in names
            for seed, run in enumerate(runs)
            for line in [thinned(run.get(f"train/{name}", []))]
            for pair in line
        ]
        title = f"{group}: losses by step, one line a seed"
        charts += draw(title, names, points, x="", zero="", multiples=True)
    return charts


def mean_lines(title: str, logged: Mapping[str, Sequence[Logged]], key: str) -> list[Chart]:
    """Draw what was logged under a key by step, each group's mean over its runs."""
    points = []
    for group, runs in logged.items():
        values: dict[float, list[float]] = {}
        for step, value in (pair for run in runs for pair in run.get(key, [])):
            values.setdefault(step, []).append(value)
        line = thinned([(step, float(np.mean(found))) for step, found in sorted(values.items())])
        points += [Point(group, *pair, line=0, dot=len(line) < MOST_DOTS) for pair in line]
    return draw(title, [*logged], points, x="step", zero="")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Leave out points that lie too close to be seen, but not the last one."""
    return [*points[: -1 : max(1, -(-len(points) // MOST_POINTS))], *points[-1:]]


def is_loss(key: str) -> bool:
    """Say whether a logged key is a loss that `training_charts` draws."""
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
