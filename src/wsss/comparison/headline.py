"""The first screen of a report: who leads, by how much, by chance or not, at what cost, on what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsss.comparison.charts import Chart, Point, draw
from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, Entry
from wsss.comparison.grids import Cell, Grid
from wsss.comparison.tables import (
    EVALUATION,
    heading_of,
    interval,
    mean_and_deviation,
    plain_mean,
)
from wsss.results.store import look_up

MOST_VALUES = 3  # of one fact that differs between runs


@dataclass
class Headline:
    """What is read first.

    Attributes:
        lead: the outcome in one sentence.
        sentences: whether it may be chance, and what it cost.
        charts: mean, interval and single seeds of each group.
        table: the same in numbers, the best first.
        facts: what all of this was measured on.
    """

    lead: str
    sentences: list[str]
    table: Grid
    facts: list[tuple[str, str]]
    charts: list[Chart] = field(default_factory=list)


def headline_of(c: Comparison) -> Headline:
    """Put a comparison in a few words."""
    facts, metric = _facts(c), _metric(c)
    if metric is None:
        lead = "The runs have no mIoU in common, so none leads"
        return Headline(
            lead, [], Grid("Costs", ["", *_COST_HEADS], _cost_rows(c, [*c.groups])), facts
        )
    means = {n: 100 * float(np.mean([e.metrics[metric] for e in es])) for n, es in c.groups.items()}
    ranked = metric in c.draws
    names = sorted(means, key=lambda name: -means[name]) if ranked else [*means]
    number = heading_of(metric)
    if not ranked:
        lead, sentences = f"Not ranked: {len(names)} groups by {number}", [
            "Their protocols may differ, so a higher number need not be a better method."
        ]  # fmt: skip
    elif len(names) == 1:
        low, high = c.draws[metric].interval(names[0])
        lead = f"{names[0]} reaches {means[names[0]]:.1f} %"
        sentences = [f"{number}; 95 % interval [{100 * low:.1f}, {100 * high:.1f}]."]
    else:
        lead, sentences = _who_leads(c, metric, names, means)
    return Headline(
        lead, [*sentences, *_cost_sentence(c, names)], _glance(c, metric, names), facts,
        _chart(c, metric, names, means),
    )  # fmt: skip


def _metric(c: Comparison) -> str | None:
    """Choose the most final mIoU that all groups are ranked by, else the one that all have."""
    ranked = (m for m in MIOUS if m in c.draws and len(c.draws[m].observed) == len(c.groups))
    return c.primary if c.primary in c.draws else next(ranked, c.primary)


def _who_leads(
    c: Comparison, metric: str, names: Sequence[str], means: Mapping[str, float]
) -> tuple[str, list[str]]:
    best, second = names[:2]
    draws = c.draws[metric]
    first = f"{heading_of(metric)}: {means[best]:.1f} to {means[second]:.1f} %."
    found = draws.difference(best, second)
    words = (
        f"The 95 % interval of this difference is [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    )
    chance = f"{words}, which {'holds' if found.is_tie else 'does not hold'} zero."
    ties = [name for name in names[2:] if draws.difference(best, name).is_tie]
    if ties:
        chance += f" No clear difference to {', '.join(ties)} either."
    if any(len(members) == 1 for members in c.groups.values()):
        chance += (
            " Not every group has several seeds: the interval does not hold what seeds change."
        )
    lead = f"{best} leads {second} by {means[best] - means[second]:.1f} points"
    return f"{lead}, {'which may be' if found.is_tie else 'more than'} chance", [first, chance]


_COST_HEADS = ("training, wall hours", "training, GPU hours", "evaluation, s/image", "seeds")


def _costs(members: Sequence[Entry]) -> list[str]:
    """Give the cells of ``_COST_HEADS``."""
    costs = [e.results.get("cost") or {} for e in members]
    return [
        plain_mean([cost.get("train_wall_hours") for cost in costs], 1.0, ".3g"),
        plain_mean([cost.get("train_gpu_hours") for cost in costs], 1.0, ".3g"),
        plain_mean([look_up(e.metrics, EVALUATION) for e in members], 1.0, ".3f"),
        str(len(members)),
    ]


def _cost_rows(c: Comparison, names: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    return [(name, [Cell(text) for text in _costs(c.groups[name])]) for name in names]


def _cost_sentence(c: Comparison, names: Sequence[str]) -> list[str]:
    """Say what training the first took, and the cheapest, where it is known of all."""
    for key, unit in (("train_gpu_hours", "GPU hours"), ("train_wall_hours", "hours")):
        hours = {
            name: [
                value for e in es if (value := (e.results.get("cost") or {}).get(key)) is not None
            ]
            for name, es in c.groups.items()
        }
        if all(len(hours[name]) == len(es) for name, es in c.groups.items()):
            means = {name: float(np.mean(values)) for name, values in hours.items()}
            cheapest = min(means, key=lambda name: means[name])
            text = f"Cost: training a run of {names[0]} took {means[names[0]]:.3g} {unit}"
            if cheapest != names[0]:
                text += f"; the cheapest, {cheapest}, took {means[cheapest]:.3g}"
            return [f"{text}."]
    return []


def _glance(c: Comparison, metric: str, names: Sequence[str]) -> Grid:
    """List the groups, the best first, with difference and cost."""
    ranked = metric in c.draws
    heads = ["mIoU (%)", *(["difference to the first [95 %]"] if ranked else []), *_COST_HEADS]
    grid = Grid(f"At a glance: {heading_of(metric)}", ["group", *heads])
    for name, costs in _cost_rows(c, names):
        cells = [Cell(mean_and_deviation([e.metrics[metric] for e in c.groups[name]], True))]
        if ranked:
            first = name == names[0]
            cells.append(
                Cell("reference" if first else interval(c.draws[metric].difference(name, names[0])))
            )
        grid.rows.append((name, cells + costs))
    return grid


def _chart(
    c: Comparison, metric: str, names: Sequence[str], means: Mapping[str, float]
) -> list[Chart]:
    """Draw mean and interval of each group, and a small point a seed."""
    draws, points = c.draws.get(metric), []
    for name in names:
        low, high = draws.interval(name) if draws else (0.0, 0.0)
        points.append(Point(name, means[name], name, low=100 * low, high=100 * high))
        runs = c.groups[name]
        points += [Point(name, 100 * e.metrics[metric], name) for e in runs if len(runs) > 1]
    title = f"{heading_of(metric)}: mean{', 95 % interval' if draws else ''} and seeds"
    return draw(title, [*c.groups], points, x="mIoU (%)", rows=34, zero="")


def _facts(c: Comparison) -> list[tuple[str, str]]:
    """Say what the numbers were measured on; what differs between runs is listed."""

    def values(of: Any) -> str:
        found = list(dict.fromkeys(str(of(entry)) for entry in c.entries))
        more = len(found) - MOST_VALUES
        return " / ".join(found[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")

    def known(key: str, length: int | None = None) -> str:
        return values(lambda e: str(e.card.get(key) or "not stated")[:length])

    def images(entry: Entry) -> str:
        return f"{entry.results['data']} {entry.split}, {entry.metrics.get('num_images')} images"

    return [
        ("data", values(images)),
        ("supervision", c.supervision),
        ("encoder", values(lambda e: _encoder(e.card.get("backbone")))),
        ("training", f"{known('iterations')} steps of {known('global_batch_size')} images, "
                     f"crops of {known('crop_size')} px"),
        ("seeds", values(lambda e: ", ".join(str(m.results["seed"]) for m in c.groups[e.group]))),
        ("commit", known("commit", 12)),
    ]  # fmt: skip


def _encoder(backbone: Any) -> str:
    if not isinstance(backbone, Mapping):
        return str(backbone or "not stated")
    pretraining = backbone.get("pretraining") or backbone.get("source")
    return f"{backbone.get('name')}, {pretraining}" if pretraining else str(backbone.get("name"))
