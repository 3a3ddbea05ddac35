"""Results of runs, read and grouped."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line
from wsss.core.files import first_line
from wsss.core.pretraining import stated_pretraining
from wsss.core.supervision import supervision_on
from wsss.evaluation.per_image import mean_iou, per_image_counts
from wsss.results.search import SEARCH_FILE, SEARCHES
from wsss.results.store import (
    CELLS_FILE,
    CONFIG_FILE,
    RESULTS_FILE,
    look_up,
    read_cells,
    read_results,
    short_names,
)
from wsss.runs.targets import with_current_targets

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
#: thresholds belong to a method, as its losses do: they differ between groups, never within one
THRESHOLDS = ("cam_threshold", "cam_high", "cam_low")
#: what one group's labels are made from; their runs may differ in seed, as those of the group
OF_MAPS = ("method", "refine", "crf")
ROUNDING = 1e-6  # by which a number may differ from the same number of another sum
NOT_DECLARED = "not declared"  # how settings were chosen


@dataclass(frozen=True)
class Entry:
    """One run's numbers on one split.

    Attributes:
        folder: where its results lie.
        results: the whole of ``results.json``.
        split: name of the split.
        levels: what it is compared as, one a key of ``by``.
    """

    folder: Path
    results: Mapping[str, Any]
    split: str
    levels: tuple[str, ...]

    @property
    def group(self) -> str:
        """What it is compared as, in one text."""
        return ", ".join(self.levels)

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
        """The protocol, with the data's name and hashes, the holdout's, the encoder's overrides."""
        protocol = self.metrics["protocol"]
        hashes = self.metrics.get("data_sha256") or {}
        backbone = protocol.get("backbone")
        known = dict(backbone) if isinstance(backbone, Mapping) else {}
        if known:
            # cards of an earlier version have a sentence of the configuration
            known["pretraining"] = stated_pretraining(known)
            # without them the small encoder reads as the timm model that it was cut from
            known["overrides"] = look_up(self.results, ("config", "backbone", "overrides")) or {}
        return {
            "data": self.results["data"],
            **protocol,
            **({"backbone": known} if known else {}),
            "supervision": supervision_on(str(protocol.get("supervision")), known),
            "choice": protocol.get("choice") or NOT_DECLARED,
            "labels_sha256": hashes.get("labels"),
            "masks_sha256": hashes.get("masks"),
            "holdout_list_sha256": look_up(protocol, ("holdout", "list_sha256")),
        }

    @property
    def classes(self) -> list[str]:
        """Names of the classes, background first."""
        return list(self.metrics["per_class"]["class"])

    @property
    def has_counts(self) -> bool:
        """Whether the counts of single images lie beside the results."""
        return (self.folder / CELLS_FILE).is_file()

    @cached_property
    def cells(self) -> dict[str, Any]:
        """Confusion cells of every image by kind of label map, and ``names``."""
        return read_cells(self.folder / CELLS_FILE, self.split)

    def counts(self, metric: str) -> NDArray[np.int64]:
        """Give (N, C, 3) counts of every image behind one of ``MIOUS``."""
        kind, exclude = MIOUS[metric]
        found = per_image_counts(
            self.cells[kind], num_classes=len(self.classes), exclude_ignored=exclude
        )
        return found.values

    @property
    def mend(self) -> str:
        """The command that makes these results anew, as far as the file says it."""
        source = self.results.get("source")
        if source is None:
            elsewhere = "" if self.home == self.folder else f" out={self.folder}"
            return f"run `wsss eval run={self.home}{elsewhere}` again"
        key = "cams" if source.get("cams") else "masks"
        return f"run `wsss eval {key}={source.get(key)} out={self.folder}` again, with its data"


def check_entry(entry: Entry) -> None:
    """Check that a split has all that a comparison reads, and that its numbers are its counts'.

    ``images.npz`` holds the counts of every image; each mIoU is taken of them again.

    Raises:
        WSSSError: something is missing, or a number is not what the counts give.
    """
    origin = f"{entry.folder / RESULTS_FILE}: splits.{entry.split}"
    needed = {
        ("method",): entry.results.get("method"),
        ("data",): entry.results.get("data"),
        ("seed",): entry.results.get("seed"),
        ("protocol", "supervision"): look_up(entry.metrics, ("protocol", "supervision")),
        ("protocol", "list_sha256"): look_up(entry.metrics, ("protocol", "list_sha256")),
        ("per_class", "class"): look_up(entry.metrics, ("per_class", "class")),
    }
    for path, value in needed.items():
        if value is None:
            raise WSSSError(f"{origin}: {'.'.join(path)} is missing; {entry.mend}")
    for metric, (kind, _) in MIOUS.items():
        if entry.metrics.get(metric) is None:
            continue
        column = class_column(metric)
        if kind not in entry.metrics["maps"] or column not in entry.metrics["per_class"]:
            raise WSSSError(
                f"{origin}: has {metric}, but not maps.{kind} and {column}; {entry.mend}"
            )
        _check_counts(entry, metric, origin)


def _check_counts(entry: Entry, metric: str, origin: str) -> None:
    """Raise WSSSError unless the counts of the images give the mIoU, and the IoU of each class.

    Where there are no counts nothing is compared: such a run can only be listed.
    """
    if not entry.has_counts:
        return
    kind, exclude = MIOUS[metric]
    cells, number = entry.cells.get(kind), len(entry.classes)
    if cells is None or not len(cells):
        raise WSSSError(f"{entry.folder / CELLS_FILE}: has no counts of {kind}; {entry.mend}")
    if (cells[:, 1] >= number * (number + 1)).any():
        raise WSSSError(f"{entry.folder / CELLS_FILE}: counts other classes; {entry.mend}")
    together = cells * [0, 1, 1]  # as if of one image
    (counts,) = per_image_counts(together, num_classes=number, exclude_ignored=exclude).values
    hit, truth, predicted = counts.T
    stated = [(metric, entry.metrics[metric], float(mean_iou(counts)))]
    if not exclude:
        stated.append((f"maps.{kind}.miou", entry.metrics["maps"][kind].get("miou"), stated[0][2]))
    column = entry.metrics["per_class"][class_column(metric)]
    for name, value, h, t, p in zip(entry.classes, column, hit, truth, predicted, strict=True):
        if t:  # other classes have no IoU, or one that is in no mean
            stated.append((f"per_class.{class_column(metric)} of {name}", value, h / (t + p - h)))
    for key, said, counted in stated:
        if said is None or not abs(said - counted) <= ROUNDING:
            raise WSSSError(
                f"{origin}: {one_line(key, 100)} is {said}, but the counts in {CELLS_FILE} give "
                f"{counted:.6g}; {entry.mend}"
            )


def class_column(metric: str) -> str:
    """Give the key in ``per_class`` of the IoU behind one of ``MIOUS``."""
    kind, excluded = MIOUS[metric]
    return f"{kind}_iou_excluded" if excluded else f"{kind}_iou"


def unfinished_runs(paths: Iterable[Path]) -> list[Path]:
    """Find the run folders, given or below a given one, that have no results of a finished run.

    What lies inside a run folder, such as an affinity network, is no run of its own.
    """
    found: list[Path] = []
    for path in paths:
        files = [*path.rglob(CONFIG_FILE), *path.rglob(RESULTS_FILE)]
        for folder in sorted({file.parent for file in files}):
            if _is_trial(folder, path):
                continue
            inside = any((above / CONFIG_FILE).is_file() for above in folder.parents)
            if not inside and not is_finished(folder):
                found.append(folder)
    return list(dict.fromkeys(found))


def _is_trial(folder: Path, given: Path) -> bool:
    """Say whether a folder is of a search that lies below the given one.

    A search that has no record yet is known by where it lies.
    """
    above = [each for each in folder.parents if each.is_relative_to(given)]
    return any(
        each.name == SEARCHES or (each != given and (each / SEARCH_FILE).is_file())
        for each in above
    )


def is_finished(folder: Path) -> bool:
    """Say whether a folder holds results of whole training, or of maps made elsewhere.

    Raises:
        WSSSError: its results are damaged.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        return False
    return not str(read_results(path).get("status")).startswith("unfinished")


def finished_below(folder: Path) -> list[Path]:
    """Find the finished runs below a folder, but no other evaluations of one and no trials.

    Raises:
        WSSSError: results are damaged.
    """
    return sorted(
        file.parent
        for file in folder.rglob(RESULTS_FILE)
        if "eval" not in file.relative_to(folder).parts
        and not _is_trial(file.parent, folder)
        and is_finished(file.parent)
    )


def find_results(paths: Iterable[Path]) -> list[Path]:
    """Find folders with results of finished runs: those given, or all below a given one.

    Other evaluations of a run (its ``eval/``) and trials of searches are only taken where they are
    named themselves.

    Raises:
        WSSSError: a folder is missing or holds none.
    """
    paths = list(paths)
    found: list[Path] = []
    for path in paths:
        folder = path.parent if path.name == RESULTS_FILE else path
        if (folder / RESULTS_FILE).is_file():
            found += [folder] if is_finished(folder) else []
            continue
        below = finished_below(folder)
        if not below and not unfinished_runs([folder]):
            raise WSSSError(f"{path}: no {RESULTS_FILE} there or below; train or `wsss eval` first")
        found += below
    if not found:
        names = [folder.name for folder in unfinished_runs(paths)]
        listed = f": {', '.join(names)}" if names else ""
        raise WSSSError(
            f"no finished run there{listed}; the command that began a run goes on, "
            "unless its trainer was limited (trainer.fast_dev_run and the like)"
        )
    return list(dict.fromkeys(found))


def load(paths: Iterable[Path], *, by: str, split: str | None) -> list[Entry]:
    """Read all runs with the group that each belongs to.

    Raises:
        WSSSError: no common split, an unknown one, or a group that is no group.
    """
    keys = keys_of(by)
    read = {folder: _read(folder) for folder in find_results(paths)}
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
    entries = [
        Entry(folder, results, split, _levels(results, folder, keys))
        for folder, results in read.items()
    ]
    for entry in entries:
        if "maps" not in entry.metrics:
            raise WSSSError(f"{entry.folder}: evaluated by an older version; {entry.mend}")
        check_entry(entry)
    _check_groups(entries, keys)
    return entries


def _read(folder: Path) -> dict[str, Any]:
    """Read the results of a folder, with the targets of their configuration as they are today."""
    results = read_results(folder / RESULTS_FILE)
    return results | {"config": with_current_targets(results.get("config", {}))}


def changes_of_encoder(backbone: Mapping[str, Any]) -> list[str]:
    """List what a card's encoder has otherwise than its timm model: ``depth=5``."""
    overrides = backbone.get("overrides")
    listed = dict(overrides) if isinstance(overrides, Mapping) else {}
    return [f"{key}={value}" for key, value in sorted(listed.items())]


def keys_of(by: str) -> list[str]:
    """Part ``by`` into its keys; it may stand in brackets, as lists of other arguments do.

    Raises:
        WSSSError: it names no key, or has one bracket of two.
    """
    text = by.strip()
    inner = text[1:-1] if text.startswith("[") else text
    found = [key.strip() for key in inner.split(",")]
    if text.startswith("[") != text.endswith("]") or not any(found):
        raise WSSSError(
            f"by={one_line(by, 200)}: expected a key, or several as by=maps.refine,method.head"
        )
    return [key for key in dict.fromkeys(found) if key]


def _levels(results: Mapping[str, Any], folder: Path, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(_named(results, folder, key, name) for key, name in short_names(keys).items())


def _named(results: Mapping[str, Any], folder: Path, key: str, name: str) -> str:
    if key == "run":
        return folder.name
    if key in ("method", "study"):
        return str(results.get(key))
    found = _settings(results, key)
    if not found:
        raise WSSSError(
            f"by={key}: {folder} has no such key; use method, study, run or a key of it"
        )
    return f"{name}={found[0]}"


def _settings(results: Mapping[str, Any], key: str) -> list[Any]:
    """Give the value of a dotted key of a run's configuration alone, or nothing."""
    nodes: list[Any] = [results.get("config", {})]
    for step in key.split("."):
        nodes = [node[step] for node in nodes if isinstance(node, Mapping) and step in node]
    return nodes


def _check_groups(entries: Sequence[Entry], keys: Sequence[str]) -> None:
    """Raise WSSSError where runs of one group differ in more than their seed."""
    firsts: dict[tuple[str, str], Entry] = {}
    mixed: dict[str, tuple[Entry, Entry]] = {}  # key -> the first two of a group that differ in it
    for entry in entries:
        first = firsts.setdefault((entry.card["supervision"], entry.group), entry)
        for key in _changed_keys(first, entry):
            mixed.setdefault(key, (first, entry))
    if pair := mixed.get("method._target_"):
        further = "method" if "method" not in keys else "method._target_"
        raise WSSSError(
            f"group {pair[0].group} holds several methods ({pair[0].folder.name}, "
            f"{pair[1].folder.name}); {_advice(keys, [further])}"
        )
    if mixed:
        pair = next(iter(mixed.values()))
        differ = "differs" if len(mixed) == 1 else "differ"
        # a key that some run has not is none to group by, one that is there has parted nothing
        parts = all(key not in keys and _settings(e.results, key) for key in mixed for e in entries)
        raise WSSSError(
            f"group {pair[0].group} mixes settings ({pair[0].folder.name}, "
            f"{pair[1].folder.name}): {', '.join(mixed)} {differ}; "
            f"{_advice(keys, [*mixed] if parts else [])}"
        )
    seeds: dict[tuple[str, str, Any], Entry] = {}
    for entry in entries:
        seed = entry.results["seed"]
        double = seeds.setdefault((entry.card["supervision"], entry.group, seed), entry)
        if double is not entry:
            raise WSSSError(
                f"group {entry.group} holds seed {seed} twice ({double.folder}, {entry.folder}); "
                f"{_advice(keys)}"
            )


def _changed_keys(one: Entry, other: Entry) -> list[str]:
    """List the keys, beside the seed, by which two runs differ."""
    configs = [entry.results.get("config", {}) for entry in (one, other)]
    found = [f"method.{k}" for k in _differing_keys(*(c.get("method", {}) for c in configs))]
    maps = [config.get("maps") or {} for config in configs]
    found += [f"maps.{key}" for key in OF_MAPS if maps[0].get(key) != maps[1].get(key)]
    return found + [f"eval.{k}" for k in THRESHOLDS if one.card.get(k) != other.card.get(k)]


def _advice(keys: Sequence[str], further: Sequence[str] = ()) -> str:
    """Say how to part a group that these keys make, with further ones or other ones."""
    ways = [",".join((*keys, *further))] if further else []
    ways += [name for name in ("study", "run") if name not in keys]
    use = f"use {' or '.join(f'by={way}' for way in ways)}, or " if ways else ""
    return f"{use}leave one out"


def _differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def logged_series(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read everything that the run of a folder logged while it trained: name -> (step, value).

    A row that a killed process left unfinished is passed over.

    Raises:
        WSSSError: a file cannot be read.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        try:
            with path.open(newline="", encoding="utf-8", errors="replace") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, csv.Error) as error:
            raise WSSSError(f"{path}: cannot be read ({first_line(error)}); remove it") from error
        for row in rows:
            step = _number(row.get("step"))
            for key, text in row.items():
                value = _number(text)
                if isinstance(key, str) and "/" in key and step is not None and value is not None:
                    found.setdefault(key, []).append((step, value))
    return found


def _number(text: Any) -> float | None:
    """Read a cell; None where it is empty or no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
