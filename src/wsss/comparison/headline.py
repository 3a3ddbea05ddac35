"""The first screen of a report: who leads, by how much, by chance or not, at what cost, on what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsss.comparison.bootstrap import Draws
from wsss.comparison.charts import Chart, Point, draw
from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, Entry, changes_of_encoder
from wsss.comparison.grids import Cell, Grid
from wsss.comparison.tables import (
    EVALUATION,
    heading_of,
    interval,
    mean_and_deviation,
    plain_mean,
)
from wsss.core.stopwatch import duration
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
    metric, costs, facts = _metric(c), _costs(c), _facts(c)
    if metric is None:
        table = _glance(c, "Costs", [*c.groups], {}, costs)
        return Headline("The runs have no mIoU in common, so none leads", [], table, facts)
    means = {n: 100 * float(np.mean([e.metrics[metric] for e in es])) for n, es in c.groups.items()}
    draws, number = c.draws.get(metric), heading_of(metric)
    names = sorted(means, key=lambda name: -means[name]) if draws else [*means]
    best = names[0]
    if draws is None:
        lead = f"Not ranked: {len(names)} groups by {number}"
        said = "Their protocols may differ, so a higher number need not be a better method."
    elif len(names) == 1:
        low, high = draws.interval(best)
        lead = f"{best} reaches {means[best]:.1f} %"
        said = f"{number}; 95 % interval [{100 * low:.1f}, {100 * high:.1f}]."
    else:
        lead = f"{best} leads {names[1]} by {means[best] - means[names[1]]:.1f} points"
        tie = draws.difference(best, names[1]).is_tie
        lead += ", which may be chance" if tie else ", more than chance"
        said = f"{number}: {means[best]:.1f} to {means[names[1]]:.1f} %. {_chance(c, draws, names)}"
    columns = {"mIoU (%)": {n: mean_and_deviation([e.metrics[metric] for e in es], True)
                            for n, es in c.groups.items()}}  # fmt: skip
    if draws:
        others = {n: interval(draws.difference(n, best)) for n in names[1:]}
        columns["difference to the first [95 %]"] = {best: "reference", **others}
    table = _glance(c, f"At a glance: {number}", names, columns, costs)
    chart = _chart(c, metric, names, means)
    return Headline(lead, [said, *_cost_sentence(best, costs)], table, facts, chart)


def _metric(c: Comparison) -> str | None:
    """Choose the most final mIoU that all groups are ranked by, else the one that all have."""
    ranked = (m for m in MIOUS if m in c.draws and len(c.draws[m].observed) == len(c.groups))
    return c.primary if c.primary in c.draws else next(ranked, c.primary)


def _chance(c: Comparison, draws: Draws, names: Sequence[str]) -> str:
    """Say what the interval between the first two is, and who else is level with the first."""
    best, found = names[0], draws.difference(*names[:2])
    ends = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    zero = "which holds zero" if found.is_tie else "which does not hold zero"
    said = f"The 95 % interval of the difference is {ends}, {zero}."
    if ties := [name for name in names[2:] if draws.difference(best, name).is_tie]:
        said += f" No clear difference to {', '.join(ties)} either."
    if any(len(members) == 1 for members in c.groups.values()):
        said += " Not every group has several seeds: the interval does not hold what seeds change."
    return said


def _costs(c: Comparison) -> dict[str, dict[str, str]]:
    """Give each cost that some run knows: heading -> group -> mean over its runs."""
    found = {}
    for heading, place, path in (
        ("training, GPU hours", "results", ("cost", "train_gpu_hours")),
        ("training, wall hours", "results", ("cost", "train_wall_hours")),
        ("evaluation, s/image", "metrics", EVALUATION),
    ):
        means = {
            name: plain_mean([look_up(getattr(e, place), path) for e in members], 1.0, ".3g")
            for name, members in c.groups.items()
        }
        if {*means.values()} != {"-"}:
            found[heading] = means
    return found


def _cost_sentence(best: str, costs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Say what training the first took, and the cheapest, where it is known of all."""
    heading, means = next(iter(costs.items()), ("", {"": "-"}))
    if "-" in means.values() or not heading.startswith("training"):
        return []
    hours = {name: float(mean) for name, mean in means.items()}
    cheapest = min(hours, key=lambda name: hours[name])
    kind = "GPU" if "GPU" in heading else "wall"
    said = f"Cost: training a run of {best} took {duration(3600 * hours[best])} of {kind} time"
    if len(hours) == 1:
        return [f"{said}."]
    if hours[best] == hours[cheapest]:
        return [f"{said}, and no other group less."]
    return [f"{said}; the cheapest, {cheapest}, took {duration(3600 * hours[cheapest])}."]


def _glance(
    c: Comparison,
    title: str,
    names: Sequence[str],
    columns: Mapping[str, Mapping[str, str]],
    costs: Mapping[str, Mapping[str, str]],
) -> Grid:
    """List the groups with their columns, costs and number of seeds."""
    shown = {**columns, **costs, "seeds": {name: str(len(es)) for name, es in c.groups.items()}}
    rows = [(name, [Cell(column[name]) for column in shown.values()]) for name in names]
    return Grid(title, ["group", *shown], rows)


def _chart(
    c: Comparison, metric: str, names: Sequence[str], means: Mapping[str, float]
) -> list[Chart]:
    """Draw mean and interval of each group, and a small point a seed."""
    draws, points = c.draws.get(metric), []
    for name in names:
        low, high = draws.interval(name) if draws else (0.0, 0.0)
        mean = f"{name}: {means[name]:.1f}"
        points.append(Point(name, means[name], name, mean, low=100 * low, high=100 * high))
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
        ("seeds", values(lambda e: _seeds(c.groups[e.group]))),
        ("commit", known("commit", 12)),
    ]  # fmt: skip


def _seeds(runs: Sequence[Entry]) -> str:
    """Count a group's runs and name their seeds, which alone would read as a count."""
    listed = ",".join(str(run.results["seed"]) for run in runs)
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} (seed={listed})"


def _encoder(backbone: Any) -> str:
    if not isinstance(backbone, Mapping):
        return str(backbone or "not stated")
    pretraining = backbone.get("pretraining") or backbone.get("source")
    changed = ", ".join(changes_of_encoder(backbone))
    name = f"{backbone.get('name')} with {changed}" if changed else str(backbone.get("name"))
    return f"{name}, {pretraining}" if pretraining else name
