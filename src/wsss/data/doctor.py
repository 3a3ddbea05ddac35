"""`wsss data check`: look at everything that a run would read, and say what to mend.

Reading for training stops at the first bad file; the doctor goes on, so that one call finds all.
Errors are what a run would stumble over or be wrong by; warnings are what the real data sets have
too (XML and SBD's masks do disagree now and then); notes are good to know.
"""

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
from wsss.data.dataset import Sample, hash_names, in_threads, label_line, mask_digest, missing_files
from wsss.data.images import read_mask, read_rgb, voc_palette
from wsss.data.prepare import coco, voc
from wsss.data.table import PICKLES, read_table
from wsss.data.voc import VOCLabels, derive_labels
from wsss.maps.pixels import IGNORE_INDEX

Level = Literal["error", "warning", "note"]
SHOWN = 3  # lines of one kind and split; the rest is counted
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
        ids: class ids in the mask, void aside; None without a mask that can be read.
        findings: what is wrong.
    """

    image_sha256: str | None
    mask_sha256: str | None
    ids: frozenset[int] | None
    findings: list[Finding]


class Row(NamedTuple):
    """Summary of a split; a hash is None where not all of it could be taken."""

    split: str
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


def table_problems(data: dict[str, Any]) -> list[str]:
    """List every bad row where the data are a table; a run would stop at the first."""
    if "csv" not in data:
        return []
    root = Path(data["root"]).expanduser()
    try:
        table = read_table(root / data["csv"], root, data["class_names"], all_problems=True)
    except WSSSError as error:
        return [str(error)]
    return table.problems


def examine(data: ImageDataModule, *, fast: bool = False) -> Report:
    """Examine the splits that a run would use.

    Args:
        data: the data module.
        fast: look into `FAST` images of each split only, and hash nothing.
    """
    report = Report()
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
    _compare_labels(data, split, there, looks, labels, report)
    whole = not fast and len(looks) == len(samples)
    masked = [one for one in looks if one.mask_sha256]
    digests = [f"{s.name} {one.mask_sha256 or '-'}" for s, one in zip(there, looks, strict=True)]
    lines = [
        label_line(s.name, labels[s.name], data.class_names) for s in samples if s.name in labels
    ]
    report.rows.append(
        Row(
            split,
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
    return labels


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
    try:
        size = read_rgb(sample.image).shape[:2]
        image_sha256 = hashlib.sha256(sample.image.read_bytes()).hexdigest()
    except WSSSError as error:
        findings.append(Finding("error", "image", split, str(error)))
    if sample.mask is None:
        return Look(image_sha256, None, None, findings)
    try:
        mask = read_mask(sample.mask, num_classes=num_classes, size=size)
    except WSSSError as error:
        findings.append(_bad_mask(sample.mask, num_classes, split, str(error)))
        return Look(image_sha256, None, None, findings)
    ids = frozenset(int(i) for i in np.unique(mask)) - {IGNORE_INDEX}
    with Image.open(sample.mask) as image:
        palette = image.getpalette() if image.mode == "P" else voc_palette()
    used = max(ids, default=0) + 1
    if (palette or [])[: 3 * used] != voc_palette(used):
        text = f"{sample.mask} has another palette than VOC's; only its ids count, nothing to mend"
        findings.append(Finding("note", "palette", split, text))
    return Look(image_sha256, mask_digest(mask), ids - {0}, findings)


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
        if given - one.ids:
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
