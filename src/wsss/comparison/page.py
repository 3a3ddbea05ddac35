"""The page of a report: one file that opens anywhere and shows methods beside each other."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, Entry, class_column, logged_series
from wsss.comparison.grids import html_tables
from wsss.comparison.panels import Maps, data_uri, maps_of, open_dataset
from wsss.comparison.svg import NUM_COLOURS, Series, bar_chart, line_chart, scatter
from wsss.comparison.tables import tables
from wsss.core.errors import WSSSError
from wsss.data.images import voc_palette
from wsss.evaluation.ledger import past_readings
from wsss.evaluation.per_image import mean_iou
from wsss.results.gallery import heat, overlay
from wsss.results.store import MAP_NAMES, ROWS, look_up

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Pick:
    """An image for the gallery and why it is there."""

    reason: str
    index: int


def page_of(comparisons: Sequence[Comparison], *, gallery: int) -> str:
    """Write the whole page as HTML.

    Args:
        comparisons: one a supervision.
        gallery: images of each kind (best, median, worst, largest disagreement); 0: no pictures.
    """
    sections = [_section(comparison, gallery) for comparison in comparisons]
    page = TEMPLATE.read_text(encoding="utf-8")
    first = next(iter(comparisons[0].groups.values()))[0]
    for key, value in (
        ("TITLE", html.escape(f"{first.results['data']} {first.split}")),
        ("MADE", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("BODY", "\n".join(sections)),
    ):
        page = page.replace(f"<!--{key}-->", value)
    return page


def _section(c: Comparison, gallery: int) -> str:
    """Write all about one supervision."""
    grids = tables(c)
    charts = _seed_charts(c)
    if c.primary is not None:
        bars = [_class_bars(c, c.primary)] if c.same_classes else []
        charts += [*bars, *_shape_charts(c, c.primary), *_cost_charts(c, c.primary)]
    first = 2 if c.draws and len(c.groups) > 1 else 1  # numbers, and where ranked differences
    curves = [_training_curves(name, es, k) for k, (name, es) in enumerate(c.groups.items())]
    curves += _validation_curves(c)
    parts = [
        f"<h2>Supervision: {html.escape(c.supervision)}</h2>",
        _legend(list(c.groups)),
        html_tables(grids[:first]),
        f"<div class=charts>{''.join(charts)}</div>",
        f"<h3>Training</h3><div class=charts>{''.join(curves)}</div>" if any(curves) else "",
        f"<h3>The same images</h3>{_gallery(c, gallery)}" if gallery > 0 else "",
        f"<h3>In numbers</h3>{html_tables(grids[first:])}" if grids[first:] else "",
        f"<h3>Protocols</h3>{_cards(c)}",
    ]
    return f"<section>{''.join(parts)}</section>"


def _legend(names: Sequence[str]) -> str:
    chips = "".join(
        f'<span><i style="background:var(--c{k % NUM_COLOURS})"></i>{html.escape(name)}</span>'
        for k, name in enumerate(names)
    )
    return f"<p class=legend>{chips}</p>"


def _mean(values: Sequence[float | None]) -> float:
    """Give the mean over seeds, NaN where one is missing."""
    known = [math.nan if value is None else value for value in values]
    return float(np.mean(known)) if known else math.nan


def _heading(metric: str) -> str:
    return next(heading for heading, key, _ in ROWS if key == metric)


def _seed_charts(c: Comparison) -> list[str]:
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
    return [line_chart(title, series, x_label="CAM threshold", y_label="mIoU (%)")]


def _class_bars(c: Comparison, primary: str) -> str:
    """Draw IoU per class of the primary metric."""
    classes = c.entries[0].classes
    column = class_column(primary)
    series: list[tuple[str, int, list[float | None]]] = []
    for k, (name, members) in enumerate(c.groups.items()):
        values = [
            _mean([e.metrics["per_class"][column][row] for e in members])
            for row in range(len(classes))
        ]
        series.append((name, k, [100 * v if math.isfinite(v) else None for v in values]))
    return bar_chart(f"{_heading(primary)}: IoU per class (%)", classes, series)


def _shape_charts(c: Comparison, primary: str) -> list[str]:
    """Draw IoU by object size, and near boundaries, of the primary kind of label map."""
    kind = MIOUS[primary][0]
    charts = []
    for title, label, steps in (
        (
            "IoU by object size",
            "share of the image",
            (
                ("below 1 %", ("size_iou", "small")),
                ("1 to 10 %", ("size_iou", "medium")),
                ("over 10 %", ("size_iou", "large")),
            ),
        ),
        (
            "mIoU near boundaries",
            "pixels within; B-IoU: Boundary IoU",
            (
                ("3 px", ("trimap_iou", "3")),
                ("5 px", ("trimap_iou", "5")),
                ("10 px", ("trimap_iou", "10")),
                ("all", ("miou",)),
                ("B-IoU", ("boundary_iou",)),
            ),
        ),
    ):
        series = [
            Series(
                name,
                k,
                [
                    (i, 100 * _mean([look_up(e.metrics["maps"][kind], path) for e in members]))
                    for i, (_, path) in enumerate(steps)
                ],
            )
            for k, (name, members) in enumerate(c.groups.items())
        ]
        names = [step for step, _ in steps]
        charts.append(
            line_chart(
                f"{MAP_NAMES[kind]}: {title}", series, x_label=label, y_label="IoU (%)",
                x_names=names, dots=True,
            )
        )  # fmt: skip
    return charts


def _cost_charts(c: Comparison, primary: str) -> list[str]:
    """Draw accuracy against hours of training and against time an image."""
    charts = []
    for path, label in (
        (("train_gpu_hours",), "training, GPU hours"),
        (("train_wall_hours",), "training, wall hours"),
    ):
        series = [
            _costed(
                c, primary, name, k, [look_up(e.results.get("cost") or {}, path) for e in members]
            )
            for k, (name, members) in enumerate(c.groups.items())
        ]
        if chart := scatter(
            f"{_heading(primary)} against training", series, x_label=label, y_label="mIoU (%)"
        ):
            charts.append(chart)
            break
    series = [
        _costed(c, primary, n, k, [look_up(e.metrics, ("cost", "seconds_per_image")) for e in es])
        for k, (n, es) in enumerate(c.groups.items())
    ]
    title = f"{_heading(primary)} against evaluation"
    return [*charts, scatter(title, series, x_label="seconds an image", y_label="mIoU (%)")]


def _costed(
    c: Comparison, primary: str, name: str, k: int, costs: Sequence[float | None]
) -> Series:
    scores = [100 * e.metrics[primary] for e in c.groups[name]]
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return Series(name, k, [(_mean(costs), float(np.mean(scores)))], spread=spread)


def _validation_curves(c: Comparison) -> list[str]:
    """Draw validations during training of each group's first run; they are no results."""
    logged = {name: logged_series(members[0].home) for name, members in c.groups.items()}
    return [
        line_chart(
            f"validation during training: {label}",
            [
                Series(name, k, [(step, 100 * value) for step, value in found.get(key, [])])
                for k, (name, found) in enumerate(logged.items())
            ],
            x_label="step",
            y_label="mIoU (%)",
            dots=True,
        )
        for key, label in (("val/seed_miou", "CAM seed"), ("val/seg_miou", "segmentation"))
    ]


def _training_curves(name: str, members: Sequence[Entry], colour: int) -> str:
    """Draw the named losses of a group's first run."""
    losses = {
        key: points
        for key, points in logged_series(members[0].home).items()
        if key.startswith("train/") and key.endswith("loss")
    }
    series = [
        Series(key.removeprefix("train/"), colour if key == "train/loss" else k, points)
        for k, (key, points) in enumerate(sorted(losses.items()))
    ]
    if not series:
        return ""
    chart = line_chart(
        f"{name}: losses, seed {members[0].results['seed']}", series, x_label="step",
        y_label="loss", from_zero=False,
    )  # fmt: skip
    chips = "".join(
        f'<span><i style="background:var(--c{one.colour % NUM_COLOURS})"></i>'
        f"{html.escape(one.name)}</span>"
        for one in series
    )
    return chart.replace("</figure>", f"<p class=legend>{chips}</p></figure>")


def pick_images(scores: NDArray[np.float64], each: int) -> list[Pick]:
    """Choose images that are best, in the middle, worst, and most disputed; none twice.

    Args:
        scores: (groups, N) mIoU of each image.
        each: how many of each kind.
    """
    mean = np.nan_to_num(scores.mean(axis=0))
    order = np.argsort(mean, kind="stable")
    start = max(0, len(order) // 2 - each // 2)
    spread = np.nan_to_num(np.ptp(scores, axis=0))
    kinds = {
        "largest disagreement": np.argsort(-spread, kind="stable") if len(scores) > 1 else [],
        "best": order[::-1],
        "worst": order,
        "median": [*order[start:], *order[:start]],
    }
    taken: set[int] = set()
    picks: dict[str, list[Pick]] = {}
    for reason, candidates in kinds.items():
        free = [int(i) for i in candidates if int(i) not in taken][:each]
        taken.update(free)
        picks[reason] = [Pick(reason, index) for index in free]
    return [p for r in ("best", "median", "worst", "largest disagreement") for p in picks[r]]


def _gallery(c: Comparison, each: int) -> str:
    """Show the chosen images with every group's maps; a group that cannot be computed says why."""
    if c.primary is None:
        return "<p class=note>no pictures: the runs share no mIoU to choose them by</p>"
    if not c.same_images:
        return "<p class=note>no pictures: the runs were not evaluated on the same images</p>"
    members = {name: es[0] for name, es in c.groups.items()}
    primary = c.primary
    counts = {name: entry.counts(primary) for name, entry in members.items()}
    scores = np.stack([mean_iou(values) for values in counts.values()])
    kind = MIOUS[primary][0]
    images = np.unique(next(iter(members.values())).cells[kind][:, 0])
    picks = [Pick(p.reason, p.index) for p in pick_images(scores, each)]
    indices = [int(images[pick.index]) for pick in picks]
    notes, maps = [], {}
    try:
        dataset = open_dataset(next(iter(members.values())))
    except WSSSError as error:
        return f"<p class=note>no pictures: {html.escape(str(error))}</p>"
    for name, entry in members.items():
        try:
            maps[name] = maps_of(entry, kind, dataset, indices)
        except WSSSError as error:
            notes.append(f"<p class=note>{html.escape(f'{name}: {error}')}</p>")
    values = {name: scores[k] for k, name in enumerate(members)}
    cards = [
        _image_card(pick, dataset[index], {n: m[row] for n, m in maps.items()}, values)
        for row, (pick, index) in enumerate(zip(picks, indices, strict=True))
    ]
    classes = c.entries[0].classes[1:]
    caption = f"Label maps: {MAP_NAMES[kind]}, with the image's own mIoU. CAMs: the largest class."
    return f"<p>{caption}</p>{_class_legend(classes)}{''.join(notes)}{''.join(cards)}"


def _class_legend(classes: Sequence[str]) -> str:
    colours = np.array(voc_palette()).reshape(-1, 3)
    chips = "".join(
        f'<span><i style="background:rgb({r},{g},{b})"></i>{html.escape(name)}</span>'
        for name, (r, g, b) in zip(classes, colours[1:], strict=False)
    )
    return f"<p class=legend>{chips}</p>"


def _image_card(
    pick: Pick,
    item: Mapping[str, Any],
    maps: Mapping[str, Maps],
    scores: Mapping[str, NDArray[np.float64]],
) -> str:
    """Show one image: itself, the truth, and each group's label map and CAM."""
    rgb, truth = item["rgb"], item["mask"].numpy()
    pictures = [("image", rgb), ("truth", overlay(rgb, truth))]
    areas = np.bincount(truth[(truth > 0) & (truth < 255)], minlength=2)
    main = max(int(areas.argmax()) - 1, 0)
    for name, found in maps.items():
        score = 100 * scores[name][pick.index]
        pictures.append((f"{name} {score:.1f}", overlay(rgb, found.label)))
        if found.cams is not None:
            pictures.append((f"{name}, CAM", heat(rgb, found.cams[main])))
    figures = "".join(
        f'<figure><img src="{data_uri(pixels)}" alt="{html.escape(text)}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for text, pixels in pictures
    )
    heading = f"{html.escape(pick.reason)}: {html.escape(str(item['name']))}"
    return f"<article><h4>{heading}</h4><div class=pictures>{figures}</div></article>"


def _cards(c: Comparison) -> str:
    """Write every run's protocol card and ledger, closed until clicked."""
    parts = []
    for name, members in c.groups.items():
        for entry in members:
            ledger = past_readings(entry.home)
            lines = "\n".join(json.dumps(line) for line in ledger) or "no ledger"
            card = json.dumps({**entry.card, "cost": entry.results.get("cost")}, indent=1)
            parts.append(
                f"<details><summary>{html.escape(name)}, seed {entry.results['seed']}: "
                f"{html.escape(entry.folder.name)}</summary><pre>{html.escape(card)}</pre>"
                f"<p>Readings of ground truth:</p><pre>{html.escape(lines)}</pre></details>"
            )
    return "".join(parts)
