"""``wsss compare``: runs side by side, where their protocols allow it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from wsss.arguments import split_arguments
from wsss.errors import WSSSError
from wsss.evaluation.per_image import per_image_counts
from wsss.files import write_atomically
from wsss.results.bootstrap import Difference, Draws, draw
from wsss.results.grids import FORMATS, Cell, Grid, print_grids
from wsss.results.store import (
    CELLS_FILE,
    MAP_NAMES,
    MAP_ROWS,
    RESULTS_FILE,
    ROWS,
    look_up,
    read_cells,
    read_results,
)

#: mIoU -> kind of label map and whether abstentions are left out; these can be bootstrapped
MIOUS = {
    "seg_miou_ms_crf": ("seg_ms_crf", False),
    "seg_miou_ms": ("seg_ms", False),
    "seg_miou_crf": ("seg_crf", False),
    "seg_miou": ("seg", False),
    "seed_miou": ("seed", False),
    "pseudo_label_miou_ignored_as_background": ("pseudo_label", False),
    "pseudo_label_miou_excluded": ("pseudo_label", True),
}

#: what must be equal for any number
IDENTITY = ("data", "split", "list_sha256", "num_images", "label_source", "masks_sha256", "metric",
            "label_map_definitions")  # fmt: skip
_SEEDS = ("cam_resize", "use_image_labels", "cam_threshold_source", "labels_sha256")
_SEARCHED = (*_SEEDS, "oracle_thresholds")
_HELD_OUT = (*_SEARCHED, "holdout_list_sha256")
_PSEUDO = ("cam_resize", "refine", "labels_sha256")
_MERGED = ("resize", "seg_scales", "seg_sizes", "flip", "flip_merge", "scale_merge", "merge_of",
           "align_corners")  # fmt: skip
_CRF = ("crf", "crf_prune", "crf_backend")
#: number -> what else decides it
MEASURING: dict[str, tuple[str, ...]] = {
    "seed_miou": _SEEDS,
    "seed_miou_predicted_labels": (*_SEEDS, "single_resize"),
    "seed_miou_holdout": _HELD_OUT,
    "seed_threshold_holdout": _HELD_OUT,
    "seed_miou_oracle": _SEARCHED,
    "seed_threshold_oracle": _SEARCHED,
    "seed_pixel_map": _SEEDS,
    "pseudo_label_miou_ignored_as_background": _PSEUDO,
    "pseudo_label_miou_excluded": _PSEUDO,
    "pseudo_label_coverage": _PSEUDO,
    "seg_miou": ("single_resize",),
    "seg_miou_crf": ("single_resize", *_CRF),
    "seg_miou_ms": _MERGED,
    "seg_miou_ms_crf": (*_MERGED, *_CRF),
    "image_map": ("single_resize", "labels_sha256"),
    "image_f1": ("single_resize", "labels_sha256"),
}
#: thresholds are a method's own, as its losses are: they may differ between groups, not within one
OWN = ("cam_threshold", "cam_high", "cam_low")
#: what a fair comparison of methods holds fixed; a study of one of them says so with allow=
TRAINING = ("backbone", "crop_size", "iterations", "global_batch_size", "selection",
            "train_list_sha256")  # fmt: skip

COSTS = (
    ("training, wall hours", "train_wall_hours", 1.0, ".2f"),
    ("training, GPU hours", "train_gpu_hours", 1.0, ".2f"),
    ("training, peak memory (GiB)", "train_peak_memory_bytes", 2.0**-30, ".2f"),
)


@dataclass
class CompareArguments:
    """Arguments of ``wsss compare`` beside the runs.

    Attributes:
        by: what makes a group: ``method``, ``study``, ``run``, a key such as
            ``method.ptc_weight``, or several of these with commas between them; runs of a group
            differ in their seed alone.
        baseline: group that differences are taken to; null: the best one.
        split: which numbers; null: the first split that all runs have.
        metrics: keys of ``results.json`` to show; null: all that some run has.
        metric: mIoU of the per-class table; null: the most final one that all runs have.
        allow: training conditions (backbone, crop_size, iterations, global_batch_size, selection,
            train_list_sha256) that may differ among ranked runs.
        unranked: list runs of different protocols without ranking them.
        out: file to write, .md, .csv, .tex or .html.
        resamples: draws of the bootstrap.
    """

    by: str = "method"
    baseline: str | None = None
    split: str | None = None
    metrics: list[str] | None = None
    metric: str | None = None
    allow: list[str] = field(default_factory=list)
    unranked: bool = False
    out: str | None = None
    resamples: int = 2000


@dataclass(frozen=True)
class Entry:
    """One run's numbers on one split.

    Attributes:
        folder: Where its results lie.
        results: The whole of ``results.json``.
        split: Name of the split.
        group: What it is compared as.
    """

    folder: Path
    results: Mapping[str, Any]
    split: str
    group: str

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The split's numbers."""
        found: Mapping[str, Any] = self.results["splits"][self.split]
        return found

    @property
    def home(self) -> Path:
        """The run folder or checkpoint; another place than ``folder`` where ``out=`` was given."""
        moved = (self.folder / "logs").is_dir() or "run" not in self.results
        return self.folder if moved else Path(self.results["run"])

    @property
    def card(self) -> dict[str, Any]:
        """The protocol, with the data's name and hashes and the holdout's."""
        protocol = self.metrics["protocol"]
        hashes = self.metrics.get("data_sha256") or {}
        return {
            "data": self.results["data"],
            **protocol,
            "labels_sha256": hashes.get("labels"),
            "masks_sha256": hashes.get("masks"),
            "holdout_list_sha256": look_up(protocol, ("holdout", "list_sha256")),
        }

    @property
    def classes(self) -> list[str]:
        """Names of the classes, background first."""
        return list(self.metrics["per_class"]["class"])

    @cached_property
    def cells(self) -> dict[str, Any]:
        """Confusion cells of every image by kind of label map, and ``names``."""
        return read_cells(self.folder / CELLS_FILE, self.split)

    def counts(self, metric: str) -> NDArray[np.int64]:
        """(N, C, 3) counts of every image behind one of ``MIOUS``."""
        kind, exclude = MIOUS[metric]
        found = per_image_counts(
            self.cells[kind], num_classes=len(self.classes), exclude_ignored=exclude
        )
        return found.values


@dataclass(frozen=True)
class Comparison:
    """Groups of one supervision league on one split.

    Attributes:
        league: What all of them learn from.
        groups: name -> its runs, one a seed.
        metrics: Keys shown.
        primary: The mIoU of the per-class table; None where the runs share none, as without
            masks.
        draws: metric -> bootstrap; empty where runs are not ranked.
        baseline: Group that differences are taken to, or None for the best.
        notes: What a reader has to know.
    """

    league: str
    groups: dict[str, list[Entry]]
    metrics: list[str]
    primary: str | None
    draws: dict[str, Draws]
    baseline: str | None
    notes: list[str]

    @property
    def entries(self) -> list[Entry]:
        """All runs."""
        return [entry for members in self.groups.values() for entry in members]

    @property
    def same_classes(self) -> bool:
        """Whether the runs can stand in one table of classes; unranked ones may not."""
        return all(entry.classes == self.entries[0].classes for entry in self.entries)

    @property
    def same_images(self) -> bool:
        """Whether the runs were evaluated on the same images; unranked ones may not be."""
        keys = ("data", "list_sha256")
        found = {tuple(entry.card[key] for key in keys) for entry in self.entries}
        return self.same_classes and len(found) == 1

    def best(self, metric: str) -> str:
        """The group of the highest mean."""
        observed = self.draws[metric].observed
        return max(observed, key=lambda name: observed[name])

    def is_clear(self, metric: str) -> bool:
        """Whether the best group is better than each other one, intervals considered."""
        draws, best = self.draws[metric], self.best(metric)
        others = [name for name in draws.observed if name != best]
        return bool(others) and not any(draws.difference(best, o).is_tie for o in others)


def main(arguments: list[str]) -> int:
    """The verb."""
    paths, chosen = split_arguments(CompareArguments, arguments)
    if chosen.out and Path(chosen.out).suffix not in FORMATS:
        raise WSSSError(f"out={chosen.out}: expected a file ending in {', '.join(FORMATS)}")
    grids = [grid for c in compare(paths, chosen) for grid in tables(c)]
    print_grids(grids, Console())
    if chosen.out:
        out = Path(chosen.out)
        try:
            write_atomically(out, FORMATS[out.suffix](grids).encode())
        except OSError as error:
            raise WSSSError(f"out={out}: cannot be written ({error.strerror})") from error
        print(out)
    return 0


def compare(paths: Sequence[Path], chosen: CompareArguments) -> list[Comparison]:
    """Reads runs and compares them, one league at a time.

    Raises:
        WSSSError: Runs that cannot be read, grouped or ranked, with what to do about it.
    """
    entries = load(paths, by=chosen.by, split=chosen.split)
    _check_wishes(entries, chosen)
    leagues: dict[str, list[Entry]] = {}
    for entry in entries:
        leagues.setdefault(entry.card["supervision"], []).append(entry)
    found = [_compare_league(name, members, chosen) for name, members in leagues.items()]
    if chosen.metric is not None and not any(c.primary for c in found):
        raise WSSSError(
            f"metric={chosen.metric}: expected a mIoU that all runs have "
            f"({', '.join(_shared_mious(entries)) or 'none'})"
        )
    return found


def _check_wishes(entries: Sequence[Entry], chosen: CompareArguments) -> None:
    """What is asked for by name exists in some league; another league may lack it.

    Raises:
        WSSSError: Unknown metrics, conditions or groups.
    """
    unknown = sorted(set(chosen.allow) - set(TRAINING))
    if unknown:
        raise WSSSError(
            f"allow={unknown[0]}: only {', '.join(TRAINING)} may differ among ranked runs; list "
            "runs of different protocols with unranked=true"
        )
    if chosen.resamples < 1:
        raise WSSSError(f"resamples={chosen.resamples}: expected at least 1 draw")
    have = _metrics_of(entries)
    for key in chosen.metrics or ():
        if key not in have:
            raise WSSSError(f"metrics: no run has {key}; they have {', '.join(have)}")
    groups = list(dict.fromkeys(entry.group for entry in entries))
    if chosen.baseline and _folded(chosen.baseline) not in map(_folded, groups):
        raise WSSSError(f"baseline={chosen.baseline}: no such group; there are {', '.join(groups)}")


def _metrics_of(entries: Sequence[Entry]) -> list[str]:
    """Keys of the numbers that some run has, in the order of the table."""
    return [key for _, key, _ in ROWS if any(e.metrics.get(key) is not None for e in entries)]


def find_results(paths: Iterable[Path]) -> list[Path]:
    """Folders with results: those given, or all below a given one.

    Other evaluations of a run (its ``eval/``) are only taken where they are named themselves.

    Raises:
        WSSSError: A folder is missing or holds none.
    """
    found: list[Path] = []
    for path in paths:
        folder = path.parent if path.name == RESULTS_FILE else path
        if (folder / RESULTS_FILE).is_file():
            found.append(folder)
            continue
        below = sorted(
            file.parent
            for file in folder.rglob(RESULTS_FILE)
            if "eval" not in file.relative_to(folder).parts
        )
        if not below:
            raise WSSSError(f"{path}: no {RESULTS_FILE} there or below; train or `wsss eval` first")
        found += below
    return list(dict.fromkeys(found))


def load(paths: Iterable[Path], *, by: str, split: str | None) -> list[Entry]:
    """Reads all runs with the group that each belongs to.

    Raises:
        WSSSError: No common split, an unknown one, or a group that is no group.
    """
    read = {folder: read_results(folder / RESULTS_FILE) for folder in find_results(paths)}
    shared = [
        name
        for name in next(iter(read.values()))["splits"]
        if all(name in results["splits"] for results in read.values())
    ]
    if split is None and not shared:
        raise WSSSError("the runs have no split in common; give split= and runs that have it")
    split = split or shared[0]
    for folder, results in read.items():
        if split not in results["splits"]:
            raise WSSSError(f"{folder}: has no split {split}, only {', '.join(results['splits'])}")
        if "maps" not in results["splits"][split]:
            raise WSSSError(
                f"{folder}: evaluated by an older version; run `wsss eval run={folder}` again"
            )
    entries = [
        Entry(folder, results, split, _group(results, folder, by))
        for folder, results in read.items()
    ]
    _check_groups(entries, by)
    return entries


def _group(results: Mapping[str, Any], folder: Path, by: str) -> str:
    return ", ".join(_named(results, folder, key) for key in by.split(","))


def _named(results: Mapping[str, Any], folder: Path, key: str) -> str:
    if key == "run":
        return folder.name
    if key in ("method", "study"):
        return str(results.get(key))
    missing = object()
    node: Any = results.get("config", {})
    for step in key.split("."):
        node = node.get(step, missing) if isinstance(node, Mapping) else missing
    if node is missing:
        raise WSSSError(
            f"by={key}: {folder} has no such key; use method, study, run or a key of it"
        )
    return f"{key.rpartition('.')[2]}={node}"


def _check_groups(entries: Sequence[Entry], by: str) -> None:
    """Runs of one group of a league differ in their seed alone."""
    seen: dict[tuple[str, str], Entry] = {}
    seeds: dict[tuple[str, str, Any], Entry] = {}
    for entry in entries:
        group = (entry.card["supervision"], entry.group)
        first = seen.setdefault(group, entry)
        changed = _differing_keys(
            first.results.get("config", {}).get("method", {}),
            entry.results.get("config", {}).get("method", {}),
        )
        changed = [f"method.{key}" for key in changed]
        changed += [f"eval.{key}" for key in OWN if first.card.get(key) != entry.card.get(key)]
        if "method._target_" in changed:
            raise WSSSError(
                f"group {entry.group} holds several methods ({first.folder.name}, "
                f"{entry.folder.name}); use by={by},method or by=run"
            )
        if changed:
            raise WSSSError(
                f"group {entry.group} mixes settings ({first.folder.name}, {entry.folder.name}): "
                f"{changed[0]} differs; use by={changed[0]}, by=study or by=run"
            )
        double = seeds.setdefault((*group, entry.results["seed"]), entry)
        if double is not entry:
            raise WSSSError(
                f"group {entry.group} holds seed {entry.results['seed']} twice "
                f"({double.folder}, {entry.folder}); use by=study or by=run, or leave one out"
            )


def _differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def relevant_fields(entries: Sequence[Entry], metrics: Sequence[str]) -> list[str]:
    """Fields of a protocol that decide whether these numbers can be compared."""
    fields = [*IDENTITY, *(name for key in metrics for name in MEASURING[key])]
    cards = [entry.card for entry in entries]
    if any(key.startswith("seed") for key in metrics) and not all(
        card.get("use_image_labels", True) for card in cards
    ):
        fields.append("single_resize")  # whence the labels are predicted
    if any("crf" in key for key in metrics) and any(card.get("crf_prune") for card in cards):
        fields.append("labels_sha256")
    return [*dict.fromkeys(fields), *TRAINING]


def differing_fields(
    entries: Sequence[Entry], metrics: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Protocol fields that are not equal: field -> value -> groups that have it."""
    result: dict[str, dict[str, list[str]]] = {}
    for name in relevant_fields(entries, metrics):
        values: dict[str, list[str]] = {}
        for entry in entries:
            holders = values.setdefault(_readable(entry.card.get(name)), [])
            if entry.group not in holders:
                holders.append(entry.group)
        if len(values) > 1:
            result[name] = values
    return result


def _readable(value: Any) -> str:
    """A field's value in few words."""
    if isinstance(value, Mapping):
        label = value.get("name")
        if value.get("source") == "random":  # every seed draws its own
            return f"{label} (random)"
        digest = value.get("state_sha256") or value.get("file_sha256")
        if label:
            return f"{label} ({digest[:8]})" if digest else str(label)
        return json.dumps(value, sort_keys=True)
    text = json.dumps(value)
    return f"{text[1:9]}..." if len(text) == 66 else text  # a hash


def _compare_league(league: str, entries: list[Entry], chosen: CompareArguments) -> Comparison:
    metrics = [key for key in _metrics_of(entries) if key in (chosen.metrics or MEASURING)]
    primary = _choose_primary(entries, chosen.metric)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    different = differing_fields(entries, metrics)
    barred = [name for name in different if name not in chosen.allow]
    if barred and not chosen.unranked:
        told = "; ".join(f"{name}: {_told(different[name])}" for name in barred)
        training = [name for name in barred if name in TRAINING]
        hint = f"allow=[{','.join(training)}] where that is what you study, " if training else ""
        untouched = [
            key for key in metrics if differing_fields(entries, [key]).keys() <= {*chosen.allow}
        ]
        if untouched:
            hint += f"metrics=[{','.join(untouched)}], which the difference does not touch, "
        raise WSSSError(
            f"these runs are not ranked, their protocols differ in {', '.join(barred)} ({told}); "
            f"evaluate them alike with `wsss eval`, {hint}or unranked=true to list them"
        )
    wanted = _folded(chosen.baseline or "")
    baseline = next((name for name in groups if _folded(name) == wanted), None)
    draws = {} if chosen.unranked else _bootstrap(groups, metrics, chosen.resamples)
    notes = [f"differs: {name}: {_told(values)}" for name, values in different.items()]
    return Comparison(
        league, groups, metrics, primary, draws, baseline, notes + _notes(groups, chosen)
    )


def _folded(name: str) -> str:
    """A group's name so that tkp_pcl, as ``method=`` has it, finds TKP-PCL."""
    return name.lower().replace("_", "-")


def _told(values: Mapping[str, Sequence[str]]) -> str:
    return " / ".join(f"{value} of {', '.join(holders)}" for value, holders in values.items())


def _choose_primary(entries: Sequence[Entry], wanted: str | None) -> str | None:
    """The mIoU asked for, else the most final one that all runs have."""
    return next((key for key in _shared_mious(entries) if wanted in (None, key)), None)


def _shared_mious(entries: Sequence[Entry]) -> list[str]:
    return [key for key in MIOUS if all(e.metrics.get(key) is not None for e in entries)]


def _bootstrap(
    groups: Mapping[str, Sequence[Entry]], metrics: Sequence[str], resamples: int
) -> dict[str, Draws]:
    """One bootstrap a mIoU, over the groups whose runs all have it."""
    result = {}
    for metric in metrics:
        if metric not in MIOUS:
            continue
        holders = {
            name: members
            for name, members in groups.items()
            if all(entry.metrics.get(metric) is not None for entry in members)
        }
        counts = {name: [e.counts(metric) for e in es] for name, es in holders.items()}
        if counts:  # a group's runs may each have something else
            result[metric] = draw(counts, resamples=resamples)
    return result


def _notes(groups: Mapping[str, Sequence[Entry]], chosen: CompareArguments) -> list[str]:
    notes = []
    single = [name for name, members in groups.items() if len(members) == 1]
    if single:
        notes.append(f"one seed only: {', '.join(single)}; what seeds do is not in these intervals")
    if chosen.unranked:
        notes.append("not ranked: listed by request although protocols may differ")
    else:
        notes.append(
            "bold: best, and the 95 % interval of its difference to every other excludes zero "
            f"(paired bootstrap over images, and over seeds where there are several; "
            f"{chosen.resamples} draws)"
        )
    thresholds = {
        name: sorted({e.metrics["seed_threshold"] for e in es if "seed_threshold" in e.metrics})
        for name, es in groups.items()
    }
    told = ", ".join(f"{n} {'/'.join(map(str, t))}" for n, t in thresholds.items() if t)
    if told:
        notes.append(f"declared CAM thresholds: {told}; oracle: best on this split's ground truth")
    elsewhere = [
        name
        for name, es in groups.items()
        if any(e.card.get("maps") == "made elsewhere" for e in es)
    ]
    if elsewhere:
        notes.append(f"made elsewhere: {', '.join(elsewhere)}; null: not stated by their maker")
    often = [
        f"{e.folder.name} {e.metrics['readings']}"
        for es in groups.values()
        for e in es
        if (e.metrics.get("readings") or 0) > 1
    ]
    if often:
        notes.append(f"ground truth of this split read more than once: {', '.join(often)}")
    return notes


def tables(comparison: Comparison) -> list[Grid]:
    """Numbers, differences and per-class numbers of a comparison."""
    grids = [_numbers(comparison)]
    if comparison.draws and len(comparison.groups) > 1:
        grids.append(_differences(comparison))
    if comparison.primary is None:
        return grids
    grids.append(_details(comparison, comparison.primary))
    if comparison.same_classes:
        grids.append(_per_class(comparison, comparison.primary))
    return grids


def _numbers(c: Comparison) -> Grid:
    """Every metric, one a row, one column a group."""
    any_entry = next(iter(c.groups.values()))[0]
    title = f"{any_entry.results['data']} {any_entry.split}, supervision: {c.league} (%)"
    headings = [f"{name} (n={len(es)})" for name, es in c.groups.items()]
    grid = Grid(title, ["metric", *headings], notes=c.notes)
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
            cells = [Cell(_plain_mean(values, scale, form)) for values in found]
            grid.rows.append((heading, cells))
    spent = [[look_up(e.metrics, ("cost", "seconds_per_image")) for e in es]
             for es in c.groups.values()]  # fmt: skip
    if any(value is not None for values in spent for value in values):
        cells = [Cell(_plain_mean(values, 1.0, ".3f")) for values in spent]
        grid.rows.append(("evaluation, s/image", cells))
    return grid


def mean_and_deviation(values: Sequence[float | None], percent: bool) -> str:
    """``61.2 ± 0.4`` over seeds, without the deviation for one; ``-`` where any is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    scale, digits = (100, 1) if percent else (1, 2)
    text = f"{scale * np.mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {scale * np.std(known, ddof=1):.{digits}f}"


def _plain_mean(values: Sequence[float | None], scale: float, form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{scale * np.mean(known):{form}}" if known else "-"


def reference(c: Comparison, metric: str) -> str:
    """The group that differences of a metric are taken to."""
    if c.baseline is not None and c.baseline in c.draws[metric].observed:
        return c.baseline
    return c.best(metric)


def _differences(c: Comparison) -> Grid:
    """Every group against the baseline, or the best one, with intervals."""
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
                cells.append(Cell(_interval(draws.difference(name, base))))
        grid.rows.append((heading, cells))
    return grid


def _interval(d: Difference) -> str:
    text = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    return f"{text} tie" if d.is_tie else text


def _details(c: Comparison, primary: str) -> Grid:
    """Precision, boundaries, sizes of the primary kind of label map."""
    kind = MIOUS[primary][0]
    grid = Grid(f"{MAP_NAMES[kind]} in detail (%)", ["", *c.groups])
    for heading, path in MAP_ROWS:
        values = [
            [look_up(e.metrics["maps"].get(kind, {}), path) for e in es] for es in c.groups.values()
        ]
        grid.rows.append((heading, [Cell(mean_and_deviation(v, True)) for v in values]))
    return grid


def class_column(metric: str) -> str:
    """Key in ``per_class`` of the IoU behind one of ``MIOUS``."""
    kind, excluded = MIOUS[metric]
    return f"{kind}_iou_excluded" if excluded else f"{kind}_iou"


def _per_class(c: Comparison, primary: str) -> Grid:
    """IoU of every class, mean over seeds."""
    heading = next(heading for heading, key, _ in ROWS if key == primary)
    grid = Grid(f"{heading}: per class (%)", ["class", *c.groups])
    for row, name in enumerate(c.entries[0].classes):
        cells = []
        for members in c.groups.values():
            values = [e.metrics["per_class"][class_column(primary)][row] for e in members]
            cells.append(Cell(mean_and_deviation(values, True)))
        grid.rows.append((name, cells))
    return grid
