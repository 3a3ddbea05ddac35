"""`wsss data check`: look at everything that a run would read, and say what to mend.

Reading for training stops at the first bad file; the doctor goes on, so that one call finds all.
Errors are what a run would stumble over or be wrong by; warnings are what the real data sets have
too (XML and SBD's masks do disagree now and then); notes are good to know.
"""

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.core.errors import WSSSError
from wsss.data.datamodule import ImageDataModule
from wsss.data.dataset import (
    Sample,
    hash_names,
    ids_in,
    in_threads,
    label_line,
    mask_digest,
    missing_files,
    no_class_shown,
)
from wsss.data.images import TURNED, image_size, orientation, read_mask, read_rgb, voc_palette
from wsss.data.prepare import coco, voc
from wsss.data.table import CLASSES_FILE, PICKLES, Table, joined, read_classes, read_table
from wsss.data.voc import VOCLabels, derive_labels
from wsss.maps.pixels import IGNORE_INDEX

Level = Literal["error", "warning", "note"]
MANY = 50  # labels that are named one by one
SHOWN = 3  # lines of one kind and split; the rest is counted
ALIKE = 0.8  # names that share this part of their letters may be one, mistyped
FAST = 100  # images of a split that --fast looks into
# COCO's 80 things have category ids up to 90, these left out
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
RAW_COCO_IDS = tuple(i for i in range(1, 91) if i not in UNUSED_COCO_IDS)
OFFICIAL: dict[str, dict[str, int]] = {
    "voc": voc.OFFICIAL,
    "coco": {"train": coco.OFFICIAL["train2014"], "val": coco.OFFICIAL["val2014"]},
}


class Finding(NamedTuple):
    """One thing found.

    Attributes:
        level: how bad it is.
        kind: what it is about, to count what is alike.
        split: where, or "".
        text: file, what is wrong, and the mend.
    """

    level: Level
    kind: str
    split: str
    text: str


class Look(NamedTuple):
    """What one image and its mask showed.

    Attributes:
        image_sha256: of the file, or None where it was not read.
        mask_sha256: of the ids, or None.
        values: that occur in the mask, 0 and 255 too; None without a mask that can be read.
        tag: orientation tag of the image, 1 where there is none.
        findings: what is wrong.
    """

    image_sha256: str | None
    mask_sha256: str | None
    values: frozenset[int] | None
    tag: int
    findings: list[Finding]

    @property
    def ids(self) -> frozenset[int] | None:
        """Class ids in the mask, background and void aside."""
        return None if self.values is None else self.values - {0, IGNORE_INDEX}


class Row(NamedTuple):
    """Summary of a split; a hash is None where not all of it could be taken.

    Attributes:
        classes: name and number of images of each class, in the order of the ids.
        without: number of images that show none of them.
    """

    split: str
    classes: tuple[tuple[str, int], ...]
    without: int
    images: int
    masks: int
    looked_into: int
    list_sha256: str
    labels_sha256: str | None
    masks_sha256: str | None


@dataclass
class Report:
    """All findings and a line a split.

    Attributes:
        findings: in the order they were found.
        rows: one a split whose list can be read.
    """

    findings: list[Finding] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, level: Level, kind: str, split: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, kind, split, text))

    @property
    def healthy(self) -> bool:
        """Whether a run could go ahead."""
        return all(finding.level != "error" for finding in self.findings)


def examine_table(data: dict[str, Any], report: Report) -> dict[str, Any] | None:
    """Report every bad row where the data are a table; a run would stop at the first.

    Args:
        data: the group of a configuration.
        report: where findings go.

    Returns:
        The group to go on with; None where the rows cannot be used.
    """
    if "csv" not in data:
        return data
    root = Path(data["root"]).expanduser()
    try:
        table = read_table(root / data["csv"], root, data["class_names"], all_problems=True)
    except WSSSError as error:
        report.add("error", "table", "", str(error))
        return None
    for problem in table.problems:
        report.add("error", "table", "", problem)
    if table.undeclared:
        report.add("error", "classes", "", table.undeclared)
    _compare_names(table, report)
    _compare_lists(table, root / data["csv"], report)
    shared = Counter(row.sample.mask for row in table.rows if row.sample.mask)
    doubled = [path for path, count in shared.items() if count > 1]
    if doubled:
        text = f"{len(doubled)} masks belong to more than one image, {doubled[0]} first; mend them"
        report.add("warning", "copies", "", text)
    if table.problems:
        counts = Counter(label for row in table.rows for label in row.labels)
        shown = ", ".join(f"{name} ({counts[name]})" for name in sorted(counts)[:MANY])
        more = f" and {len(counts) - MANY} more" if len(counts) > MANY else ""
        report.add("note", "labels", "", f"{len(table.rows)} rows can be read: {shown}{more}")
        return None
    # looked over in the alphabetical order too, so that one call finds all
    return data | {"class_names": list(table.class_names)}


def _compare_names(table: Table, report: Report) -> None:
    """Report classes that may be mistyped, or several in one."""
    names = table.class_names
    counts = Counter(label for row in table.rows for label in row.labels)
    for number, name in enumerate(names):
        near = difflib.get_close_matches(name, names[number + 1 :], n=1, cutoff=ALIKE)
        if near and not table.declared:
            text = (
                f"{name!r} ({counts[name]} images) and {near[0]!r} ({counts[near[0]]}) differ "
                "little; if one is mistyped, correct it"
            )
            report.add("warning", "classes", "", text)
        if table.declared and (parts := joined(name, names)):
            text = (
                f"the class {name!r} has the names of others ({', '.join(parts)}); several labels "
                "of an image are separated by ;"
            )
            report.add("warning", "classes", "", text)


def _compare_lists(table: Table, path: Path, report: Report) -> None:
    """Report a list of classes beside the table that is not the one in use."""
    try:
        listed = read_classes(path.parent / CLASSES_FILE)
    except WSSSError:  # it is not in use, or it was reported
        return
    if listed and listed != table.class_names and any(row.sample.mask for row in table.rows):
        text = (
            f"data.class_names is another list than {path.parent / CLASSES_FILE}; the ids of the "
            "masks must follow the order of data.class_names, or leave it out"
        )
        report.add("warning", "classes", "", text)


def examine(data: ImageDataModule, *, fast: bool = False) -> Report:
    """Examine the splits that a run would use.

    Args:
        data: the data module.
        fast: look into `FAST` images of each split only, and hash nothing.
    """
    report = Report()
    if text := data.left_out():
        report.add("warning", "splits", "", text)
    names: dict[str, set[str]] = {}
    hashes: dict[str, dict[str, str]] = {}
    for split in dict.fromkeys([data.train_split, data.val_split, *data.test_splits]):
        try:
            samples = data.samples(split)
        except WSSSError as error:
            report.add("error", "list", split, str(error))
            continue
        names[split] = {sample.name for sample in samples}
        hashes[split] = _examine_split(data, split, samples, report, fast=fast)
    _compare_splits(names, hashes, report)
    _examine_folders(data, names, report)
    return report


def _examine_split(
    data: ImageDataModule, split: str, samples: list[Sample], report: Report, *, fast: bool
) -> dict[str, str]:
    """Examine one split, and give the images' hashes by name."""
    official = OFFICIAL.get(str(data.name), {}).get(split)
    if official not in (None, len(samples)) and data.limit is None:
        report.add("warning", "count", split, f"{len(samples)} images, the field has {official}")
    trains = split == data.train_split
    absent: set[Path] = set()
    for kind, paths in (
        ("image", [s.image for s in samples]),
        ("mask", [s.mask for s in samples if s.mask]),
    ):
        missing = missing_files(paths)
        absent.update(missing)
        if missing:
            level: Level = "note" if kind == "mask" and trains else "error"
            why = "; training does not read masks" if level == "note" else "; add or unlist them"
            text = f"{len(missing)} of {len(paths)} are missing, {missing[0]} first{why}"
            report.add(level, f"missing {kind}", split, text)
    labels = _labels(data, split, samples, report)
    there = [s._replace(mask=None if s.mask in absent else s.mask) for s in samples]
    there = [s for s in there if s.image not in absent]
    if fast:
        there = there[:: max(1, -(-len(there) // FAST))]
    looks = in_threads(lambda s: look(s, data.num_classes, split), there)
    report.findings += [finding for one in looks for finding in one.findings]
    _compare_orientations(split, there, looks, report)
    _find_empty_masks(data, split, there, looks, labels, report)
    _compare_labels(data, split, there, looks, labels, report)
    whole = not fast and len(looks) == len(samples)
    masked = [one for one in looks if one.mask_sha256]
    digests = [f"{s.name} {one.mask_sha256 or '-'}" for s, one in zip(there, looks, strict=True)]
    lines = [
        label_line(s.name, labels[s.name], data.class_names) for s in samples if s.name in labels
    ]
    shown = np.sum(list(labels.values()), axis=0, dtype=int) if labels else np.zeros(0, int)
    report.rows.append(
        Row(
            split,
            classes=tuple(zip(data.class_names, shown.tolist(), strict=False)),
            without=sum(not row.any() for row in labels.values()),
            images=len(samples),
            masks=sum(s.mask is not None for s in samples),
            looked_into=len(looks),
            list_sha256=data.list_hash(split),
            labels_sha256=hash_names(lines) if len(lines) == len(samples) else None,
            masks_sha256=hash_names(digests) if whole and masked else None,
        )
    )
    if fast:
        return {}
    return {
        s.name: one.image_sha256 for s, one in zip(there, looks, strict=True) if one.image_sha256
    }


def _labels(
    data: ImageDataModule, split: str, samples: Sequence[Sample], report: Report
) -> dict[str, NDArray[np.float32]]:
    """Read labels by name, and report those that cannot be read."""
    labels = {}
    try:
        labels_of = data.label_reader()
    except WSSSError as error:
        report.add("error", "labels", split, str(error))
        return {}
    for sample in samples:
        try:
            labels[sample.name] = labels_of(sample)
            if isinstance(labels_of, VOCLabels) and labels_of.prepared is not None:
                _compare_with_origin(labels_of, sample, labels[sample.name])
        except WSSSError as error:
            report.add("error", "labels", split, str(error))
    if labels and split == data.train_split:
        shown = np.sum(list(labels.values()), axis=0)
        unseen = [data.class_names[k] for k in np.flatnonzero(shown == 0)]
        if unseen:
            text = f"{len(unseen)} classes are in no image and cannot be learnt: "
            report.add("warning", "classes", split, text + ", ".join(unseen))
        _find_negatives(data, split, shown, len(labels), report)
    without = [name for name, row in labels.items() if not row.any()]
    if without:
        level: Level = "note" if data.num_classes == 1 else "warning"
        text = (
            f"{len(without)} of {len(labels)} images have an empty labels cell, {without[0]!r} "
            "first: they count as showing none of the classes"
        )
        report.add(level, "no label", split, text)
    return labels


def _find_negatives(
    data: ImageDataModule, split: str, shown: NDArray[np.float32], count: int, report: Report
) -> None:
    """Report classes that every training image shows, which nothing tells from the picture."""
    always = [data.class_names[k] for k in np.flatnonzero(shown == count)]
    if always:
        text = (
            f"{', '.join(always)}: in every one of the {count} images, so that there is nothing to "
            "tell it from; add images that do not show it (an empty labels cell says none at all)"
        )
        report.add("warning", "negatives", split, text)


def _compare_with_origin(labels_of: VOCLabels, sample: Sample, labels: NDArray[np.float32]) -> None:
    """Compare VOC's prepared table with the annotation or mask that it was made from."""
    origin = derive_labels(sample, labels_of.root, labels_of.class_names, labels_of.source)
    if not np.array_equal(origin, labels):
        raise WSSSError(
            f"{labels_of.path} gives {sample.name!r} other labels than its {labels_of.source} "
            "does; run `wsss data prepare voc` again"
        )


def look(sample: Sample, num_classes: int, split: str) -> Look:
    """Decode one image and its mask."""
    findings = []
    size = None
    image_sha256 = None
    tag = 1
    try:
        size = read_rgb(sample.image).shape[:2]
        image_size(sample.image)  # what a run looks at before it starts is stricter in places
        tag = orientation(sample.image)
        image_sha256 = hashlib.sha256(sample.image.read_bytes()).hexdigest()
    except WSSSError as error:
        findings.append(Finding("error", "image", split, str(error)))
    if sample.mask is None:
        return Look(image_sha256, None, None, tag, findings)
    try:
        mask = read_mask(sample.mask, num_classes=num_classes, size=size, image=sample.image)
    except WSSSError as error:
        findings.append(_bad_mask(sample.mask, num_classes, split, str(error)))
        return Look(image_sha256, None, None, tag, findings)
    values = ids_in(mask)
    with Image.open(sample.mask) as image:
        palette = image.getpalette() if image.mode == "P" else voc_palette()
    used = max(values - {IGNORE_INDEX}, default=0) + 1
    if (palette or [])[: 3 * used] != voc_palette(used):
        text = f"{sample.mask} has another palette than VOC's; only its ids count, nothing to mend"
        findings.append(Finding("note", "palette", split, text))
    return Look(image_sha256, mask_digest(mask), values, tag, findings)


def _bad_mask(path: Path, num_classes: int, split: str, text: str) -> Finding:
    """Say why a mask cannot be used; raw COCO ids have a diagnosis of their own."""
    if "holds class id" in text and num_classes == len(RAW_COCO_IDS):
        with Image.open(path) as image:
            ids = {int(i) for i in np.unique(np.asarray(image))} - {0, IGNORE_INDEX}
        if ids <= set(RAW_COCO_IDS):
            return Finding("error", "raw COCO ids", split, _raw_ids(path))
    return Finding("error", "mask", split, text)


def _raw_ids(path: Path) -> str:
    return (
        f"mask {path} holds COCO's category ids (up to 90) and not 1..80, from about the 12th "
        "class on every score would be wrong; `wsss data prepare coco` makes contiguous ones"
    )


def _compare_orientations(
    split: str, samples: Sequence[Sample], looks: Sequence[Look], report: Report
) -> None:
    """Report images with an orientation tag, and whether their masks can tell what is up."""
    tagged = [(s, one) for s, one in zip(samples, looks, strict=True) if one.tag > 1]
    if not tagged:
        return
    first, tag = tagged[0][0], tagged[0][1].tag
    text = (
        f"{len(tagged)} of {len(looks)} images have an EXIF orientation tag, {first.image} first "
        f"({tag}: {TURNED[tag]}); they are read upright, as viewers show them"
    )
    masked = sum(one.values is not None for _, one in tagged)
    if masked:
        text += (
            f", and so must their {masked} masks be drawn: look at one over its image, or store "
            "the images turned and without the tag"
        )
    report.add("warning", "orientation", split, text)


def _find_empty_masks(
    data: ImageDataModule,
    split: str,
    samples: Sequence[Sample],
    looks: Sequence[Look],
    labels: dict[str, NDArray[np.float32]],
    report: Report,
) -> None:
    """Report masks of labelled images that show no class, as most tools write one class: 255."""
    masked = {
        s.mask: one
        for s, one in zip(samples, looks, strict=True)
        if one.values is not None and s.name in labels and labels[s.name].any()
    }
    empty = {path: one.values or frozenset() for path, one in masked.items() if not one.ids}
    if empty:
        text = no_class_shown(empty, data.class_names, len(masked))
        level: Level = "error" if len(empty) == len(masked) else "warning"
        report.add(level, "empty masks", split, text)


def _compare_labels(
    data: ImageDataModule,
    split: str,
    samples: Sequence[Sample],
    looks: Sequence[Look],
    labels: dict[str, NDArray[np.float32]],
    report: Report,
) -> None:
    """Compare labels with what the masks show."""
    unlabelled, unseen, raw = [], [], []
    for sample, one in zip(samples, looks, strict=True):
        if one.ids is None or sample.name not in labels:
            continue
        given = {int(k) + 1 for k in np.flatnonzero(labels[sample.name])}
        if one.ids - given:
            unlabelled.append(sample)
            if data.num_classes == len(RAW_COCO_IDS) and one.ids <= {*RAW_COCO_IDS}:
                contiguous = {RAW_COCO_IDS.index(i) + 1 for i in one.ids}
                raw += [sample] if contiguous <= given else []
        if given - one.ids and one.ids:  # others show no class at all and are reported as such
            unseen.append(sample)
    compared = sum(one.ids is not None for one in looks)
    if unlabelled and len(raw) == len(unlabelled):
        report.add("error", "raw COCO ids", split, _raw_ids(raw[0].mask or Path()))
        return
    for found, what in (
        (unlabelled, "show a class that their labels lack"),
        (unseen, "lack a class that their labels name"),
    ):
        if found:
            text = (
                f"{len(found)} of {compared} masks {what}, {found[0].mask} first; compare class "
                "order and label source, a few are usual"
            )
            report.add("warning", "labels and masks", split, text)


def _compare_splits(
    names: dict[str, set[str]], hashes: dict[str, dict[str, str]], report: Report
) -> None:
    """Find images in two splits, by name and by content."""
    splits = list(names)
    for number, first in enumerate(splits):
        for second in splits[number + 1 :]:
            shared = sorted(names[first] & names[second])
            if shared:
                text = (
                    f"{len(shared)} images are in both, {shared[0]!r} first; remove them from one"
                )
                report.add("error", "overlap", f"{first}, {second}", text)
            there = {digest: name for name, digest in hashes[second].items()}
            same = [
                (name, there[digest])
                for name, digest in sorted(hashes[first].items())
                if there.get(digest, name) != name
            ]
            if same:
                text = (
                    f"{len(same)} images are the same files under two names, {same[0][0]!r} and "
                    f"{same[0][1]!r} first; remove them from one"
                )
                report.add("error", "overlap", f"{first}, {second}", text)
    for split, by_name in hashes.items():
        doubled = [count for count in Counter(by_name.values()).values() if count > 1]
        if doubled:
            text = f"{sum(doubled) - len(doubled)} images are copies of others; remove them"
            report.add("warning", "copies", split, text)


def _examine_folders(data: ImageDataModule, names: dict[str, set[str]], report: Report) -> None:
    """Find files that no split names, and label files that are not read."""
    listed: dict[Path, set[str]] = defaultdict(set)
    for split in names:
        for sample in data.samples(split):
            for path in (sample.image, sample.mask):
                if path is not None:
                    listed[path.parent].add(path.name)
    for folder, known in sorted(listed.items()):
        if not folder.is_dir():
            continue
        suffixes = {Path(name).suffix for name in known}
        surplus = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in suffixes and path.name not in known and path.name[0] != "."
        )
        if surplus and data.limit is None:
            text = f"{folder} has {len(surplus)} files in no split in use, {surplus[0]} first"
            report.add("note", "surplus", "", f"{text}; they are not read")
    if data.root.is_dir():
        for path in sorted(data.root.iterdir()):
            if path.suffix in PICKLES:
                text = f"{path} is never loaded (a pickle may run code); labels: wsss data prepare"
                report.add("note", "pickle", "", text)
