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
from wsss.evaluation.per_image import per_image_counts
from wsss.results.store import CELLS_FILE, RESULTS_FILE, look_up, read_cells, read_results
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


@dataclass(frozen=True)
class Entry:
    """One run's numbers on one split.

    Attributes:
        folder: where its results lie.
        results: the whole of ``results.json``.
        split: name of the split.
        group: what it is compared as.
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
        """Give (N, C, 3) counts of every image behind one of ``MIOUS``."""
        kind, exclude = MIOUS[metric]
        found = per_image_counts(
            self.cells[kind], num_classes=len(self.classes), exclude_ignored=exclude
        )
        return found.values


def find_results(paths: Iterable[Path]) -> list[Path]:
    """Find folders with results: those given, or all below a given one.

    Other evaluations of a run (its ``eval/``) are only taken where they are named themselves.

    Raises:
        WSSSError: a folder is missing or holds none.
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
    """Read all runs with the group that each belongs to.

    Raises:
        WSSSError: no common split, an unknown one, or a group that is no group.
    """
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


def _read(folder: Path) -> dict[str, Any]:
    """Read the results of a folder, with the targets of their configuration as they are today."""
    results = read_results(folder / RESULTS_FILE)
    return results | {"config": with_current_targets(results.get("config", {}))}


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
    """Raise WSSSError where runs of one group differ in more than their seed."""
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
        changed += [
            f"eval.{key}" for key in THRESHOLDS if first.card.get(key) != entry.card.get(key)
        ]
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


def logged_series(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read everything that the run of a folder logged while it trained: name -> (step, value)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                for key, value in row.items():
                    if "/" in key and value:
                        found.setdefault(key, []).append((float(row["step"]), float(value)))
    return found
