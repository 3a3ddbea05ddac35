"""``wsss compare``: runs side by side, where their protocols allow it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from wsss.comparison.bootstrap import Draws, draw
from wsss.comparison.entries import MIOUS, Entry, keys_of, load, unfinished_runs
from wsss.comparison.factors import Factors, factors_of
from wsss.comparison.protocols import MEASURING, TRAINING, differing_fields
from wsss.core.errors import WSSSError
from wsss.core.schema import check_value
from wsss.results.store import CELLS_FILE, ROWS, look_up, short_names

MANY = 12  # groups, beyond which all of them are not listed by name, nor as columns
Resamples = Annotated[int, Ge(1), Le(10**6)]


class NotRankedError(WSSSError):
    """Protocols differ among runs that are to be ranked.

    Attributes:
        different: protocol field -> value -> groups that have it.
        advice: what to do about it, with arguments of ``wsss compare``.
    """

    different: Mapping[str, Mapping[str, Sequence[str]]] = {}
    advice: str = ""


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
            train_list_sha256, init_from) that may differ among ranked runs, or how their settings
            were chosen (choice).
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
    resamples: Resamples = 2000


@dataclass(frozen=True)
class Comparison:
    """Groups of one supervision on one split.

    Attributes:
        supervision: what all of them learn from.
        groups: name -> its runs, one a seed.
        metrics: keys shown.
        primary: the mIoU of the per-class table; None where the runs share none, as without
            masks.
        draws: metric -> bootstrap; empty where runs are not ranked.
        baseline: group that differences are taken to, or None for the best.
        notes: what a reader has to know.
        factors: the design, where ``by`` names several keys that vary.
    """

    supervision: str
    groups: dict[str, list[Entry]]
    metrics: list[str]
    primary: str | None
    draws: dict[str, Draws]
    baseline: str | None
    notes: list[str]
    factors: Factors | None = None

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
        """Give the group of the highest mean."""
        observed = self.draws[metric].observed
        return max(observed, key=lambda name: observed[name])

    def is_clear(self, metric: str) -> bool:
        """Say whether the best group is better than each other one, intervals considered."""
        draws, best = self.draws[metric], self.best(metric)
        others = [name for name in draws.observed if name != best]
        return bool(others) and not any(draws.difference(best, o).is_tie for o in others)


def compare(paths: Sequence[Path], chosen: CompareArguments) -> list[Comparison]:
    """Read runs and compare them, one supervision at a time.

    Raises:
        WSSSError: runs that cannot be read, grouped or ranked, with what to do about it.
    """
    entries = load(paths, by=chosen.by, split=chosen.split)
    _check_requested(entries, chosen)
    by_supervision: dict[str, list[Entry]] = {}
    for entry in entries:
        by_supervision.setdefault(entry.card["supervision"], []).append(entry)
    found = [_compare_alike(name, members, chosen) for name, members in by_supervision.items()]
    if left := unfinished_runs(paths):
        names = ", ".join(folder.name for folder in left)
        for comparison in found:
            comparison.notes.append(f"left out, not finished ({len(left)}): {names}")
    if chosen.metric is not None and not any(c.primary for c in found):
        raise WSSSError(
            f"metric={chosen.metric}: expected a mIoU that all runs have "
            f"({', '.join(_shared_mious(entries)) or 'none'})"
        )
    return found


def _check_requested(entries: Sequence[Entry], chosen: CompareArguments) -> None:
    """Raise WSSSError where a name that was given exists under no supervision.

    Raises:
        WSSSError: unknown metrics, conditions or groups.
    """
    unknown = sorted(set(chosen.allow) - set(TRAINING))
    if unknown:
        raise WSSSError(
            f"allow={unknown[0]}: only {', '.join(TRAINING)} may differ among ranked runs; list "
            "runs of different protocols with unranked=true"
        )
    check_value("resamples", chosen.resamples, Resamples)
    have = _metrics_of(entries)
    for key in chosen.metrics or ():
        if key not in have:
            raise WSSSError(f"metrics: no run has {key}; they have {', '.join(have)}")
    groups = list(dict.fromkeys(entry.group for entry in entries))
    if chosen.baseline and _normalised_name(chosen.baseline) not in map(_normalised_name, groups):
        raise WSSSError(f"baseline={chosen.baseline}: no such group; there are {', '.join(groups)}")


def _metrics_of(entries: Sequence[Entry]) -> list[str]:
    """Give the keys of the numbers that some run has, in the order of the table."""
    return [key for _, key, _ in ROWS if any(e.metrics.get(key) is not None for e in entries)]


def _compare_alike(supervision: str, entries: list[Entry], chosen: CompareArguments) -> Comparison:
    """Compare runs of one supervision.

    Raises:
        NotRankedError: their protocols differ, and they are to be ranked.
    """
    metrics = [key for key in _metrics_of(entries) if key in (chosen.metrics or MEASURING)]
    primary = _choose_primary(entries, chosen.metric)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    factors = factors_of(
        [*short_names(keys_of(chosen.by)).values()],
        {name: members[0].levels for name, members in groups.items()},
    )
    if factors and not factors.missing:
        groups = {name: groups[name] for name in factors.ordered}
    different = differing_fields(entries, metrics)
    forbidden = [name for name in different if name not in chosen.allow]
    if forbidden and not chosen.unranked:
        values = "; ".join(f"{name}: {_in_words(different[name])}" for name in forbidden)
        training = [name for name in forbidden if name in TRAINING]
        hint = f"allow=[{','.join(training)}] where that is what you study, " if training else ""
        untouched = [
            key for key in metrics if differing_fields(entries, [key]).keys() <= {*chosen.allow}
        ]
        if untouched:
            hint += f"metrics=[{','.join(untouched)}], which the difference does not touch, "
        advice = f"evaluate them alike with `wsss eval`, {hint}or unranked=true to list them"
        error = NotRankedError(
            f"these runs are not ranked, their protocols differ in {', '.join(forbidden)} "
            f"({values}); {advice}"
        )
        error.different = {name: different[name] for name in forbidden}
        error.advice = advice
        raise error
    wanted = _normalised_name(chosen.baseline or "")
    baseline = next((name for name in groups if _normalised_name(name) == wanted), None)
    draws = {} if chosen.unranked else _bootstrap(groups, metrics, chosen.resamples)
    notes = [f"differs: {name}: {_in_words(values)}" for name, values in different.items()]
    if factors and factors.missing:
        said = "1 cell is" if factors.missing == 1 else f"{factors.missing} cells are"
        notes.append(
            f"no shares of variance: of {' x '.join(factors.levels)} {said} missing, "
            f"the first {', '.join(factors.first_missing)}"
        )
    notes += _notes(groups, chosen)
    return Comparison(supervision, groups, metrics, primary, draws, baseline, notes, factors)


def _normalised_name(name: str) -> str:
    """Spell a group's name so that tkp_pcl, as ``method=`` has it, finds TKP-PCL."""
    return name.lower().replace("_", "-")


def _in_words(values: Mapping[str, Sequence[str]]) -> str:
    """List the values of a protocol field, each with the groups that have it."""
    return " / ".join(f"{value} of {', '.join(holders)}" for value, holders in values.items())


def _choose_primary(entries: Sequence[Entry], wanted: str | None) -> str | None:
    """Choose the mIoU given by name, else the most final one that all runs have."""
    return next((key for key in _shared_mious(entries) if wanted in (None, key)), None)


def _shared_mious(entries: Sequence[Entry]) -> list[str]:
    return [key for key in MIOUS if all(e.metrics.get(key) is not None for e in entries)]


def _bootstrap(
    groups: Mapping[str, Sequence[Entry]], metrics: Sequence[str], resamples: int
) -> dict[str, Draws]:
    """Draw one bootstrap a mIoU, over the groups whose runs all have it."""
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
        _check_images([entry for es in holders.values() for entry in es], metric)
        if counts:  # a group's runs may each have something else
            result[metric] = draw(counts, resamples=resamples)
    return result


def _check_images(entries: Sequence[Entry], metric: str) -> None:
    """Raise WSSSError unless the same images are counted in all runs: they are drawn in pairs."""
    kind, _ = MIOUS[metric]
    for entry in entries:
        images = np.unique(entry.cells[kind][:, 0])
        if entry is entries[0]:
            first = images
        elif not np.array_equal(images, first):
            raise WSSSError(
                f"{entry.folder} and {entries[0].folder}: {CELLS_FILE} counts {kind} of "
                f"{len(images)} and {len(first)} images, or of others; {entry.mend}"
            )


def _pretraining(groups: Mapping[str, Sequence[Entry]]) -> dict[str, list[str]]:
    """Give the groups of each pretraining, where it is known at all."""
    found: dict[str, list[str]] = {}
    for name, members in groups.items():
        cards = [entry.card.get("backbone") or {} for entry in members]
        for said in dict.fromkeys(str(card.get("pretraining")) for card in cards if card):
            found.setdefault(said, []).append(name)
    return found


def _objectives(groups: Mapping[str, Sequence[Entry]]) -> dict[str, list[str]]:
    """Give the groups whose settings `wsss tune` chose, by the number that it maximised.

    It is no part of how settings were chosen that must be equal: a segmenter has another one than
    a method of maps.
    """
    found: dict[str, list[str]] = {}
    for name, members in groups.items():
        tuned = [e for e in members if str(e.card["choice"]).startswith("tuned")]
        for said in dict.fromkeys(look_up(e.results, ("config", "objective")) for e in tuned):
            found.setdefault(str(said or "a number that is not stated"), []).append(name)
    return found


def _listed(names: Sequence[str], groups: Mapping[str, Sequence[Entry]]) -> str:
    """List groups by name, or say that it is all of many."""
    return f"all {len(groups)}" if len(names) == len(groups) > MANY else ", ".join(names)


def _notes(groups: Mapping[str, Sequence[Entry]], chosen: CompareArguments) -> list[str]:
    """Write what a reader of the numbers has to know."""
    notes = []
    single = [name for name, members in groups.items() if len(members) == 1]
    if single:
        notes.append(
            f"one seed only: {_listed(single, groups)}; what seeds do is not in these intervals"
        )
    unchecked = [e.folder.name for es in groups.values() for e in es if not e.has_counts]
    if unchecked:
        notes.append(f"no {CELLS_FILE} to check the numbers by: {', '.join(unchecked)}")
    if chosen.unranked:
        notes.append("not ranked: listed by request although protocols may differ")
    else:
        notes.append(
            "bold: best, and the 95 % interval of its difference to every other excludes zero "
            f"(paired bootstrap over images, and over seeds where there are several; "
            f"{chosen.resamples} draws)"
        )
    notes += [
        f"pretraining: {said}: {_listed(names, groups)}"
        for said, names in _pretraining(groups).items()
    ]
    notes += [
        f"settings tuned for {number}: {', '.join(names)}"
        for number, names in _objectives(groups).items()
    ]
    thresholds = {
        name: sorted({e.metrics["seed_threshold"] for e in es if "seed_threshold" in e.metrics})
        for name, es in groups.items()
    }
    texts = {name: "/".join(map(str, found)) for name, found in thresholds.items() if found}
    declared = ", ".join(f"{name} {text}" for name, text in texts.items())
    if len({*texts.values()}) == 1:
        declared = f"{_listed([*texts], groups)} {next(iter(texts.values()))}"
    if declared:
        notes.append(
            f"declared CAM thresholds: {declared}; oracle: best on this split's ground truth"
        )
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
