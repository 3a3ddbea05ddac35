"""``wsss data``: prepare VOC or COCO, look a data set over."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.schema import plain
from wsss.runs.line import (
    SEARCH_PATH,
    check_paths,
    compose_line,
    quoted,
    take_folders,
    with_folders,
)

if TYPE_CHECKING:
    from wsss.data.doctor import Report


@dataclass
class VOCArguments:
    """Arguments of ``wsss data prepare voc``.

    Attributes:
        root: VOCdevkit, VOC2012, or a VOC-style export of labelme or CVAT.
        sbd: folder with SBD's ``cls`` and lists; null: searched beside the root; ``none``: do
            without.
        labels: ``xml`` (all objects of the annotations) or ``mask`` (the classes in the masks).
        jobs: processes; null: one a core.
    """

    root: str = MISSING
    sbd: str | None = None
    labels: str = "xml"
    jobs: int | None = None


def main(arguments: list[str]) -> int:
    """Run the verb: ``prepare voc``, ``prepare coco`` or ``check``."""
    what, *rest = arguments or [""]
    if what == "check":
        return run_check(rest)
    if what == "prepare" and rest and rest[0] == "voc":
        return run_prepare_voc(rest[1:])
    if what == "prepare" and rest and rest[0] == "coco":
        return run_prepare_coco(rest[1:])
    raise WSSSError("usage: wsss data prepare voc|coco root=... or wsss data check data=...")


def run_prepare_voc(arguments: list[str]) -> int:
    """Make what VOC's downloads lack, or a table of an export in VOC style."""
    chosen, _ = parse_arguments(VOCArguments, arguments)
    if not Path(chosen.root).expanduser().is_dir():
        raise WSSSError(f"data folder {chosen.root} is missing; set root to where VOC lies")
    from wsss.data.prepare.exports import is_export, prepare_export
    from wsss.data.prepare.voc import prepare_voc
    from wsss.data.table import refuse_pickle
    from wsss.data.voc import LabelSource, find_voc_root

    refuse_pickle(Path(chosen.labels))
    if chosen.labels not in ("xml", "mask"):
        raise WSSSError(f"labels={chosen.labels}: expected xml or mask")
    root = find_voc_root(Path(chosen.root))
    if is_export(root):
        return prepare_export(root, jobs=chosen.jobs)
    source: LabelSource = "xml" if chosen.labels == "xml" else "mask"
    return prepare_voc(root, sbd=chosen.sbd, labels=source, jobs=chosen.jobs)


@dataclass
class COCOArguments:
    """Arguments of ``wsss data prepare coco``.

    Attributes:
        root: folder of COCO 2014, or of a COCO-style export.
        annotations: an instances file, or the folder that it lies in; null: searched.
        overlap: ``smallest`` (the instance of fewest pixels is on top; coco2voc goes by the area
            that the file declares) or ``last`` (later annotations are on top).
        crowd: crowd regions are painted as their class (``paint``, as in coco2voc), are 255 where
            no instance lies (``ignore``), or are left out (``skip``).
        jobs: processes; null: one a core.
    """

    root: str = MISSING
    annotations: str | None = None
    overlap: str = "smallest"
    crowd: str = "paint"
    jobs: int | None = None


def run_prepare_coco(arguments: list[str]) -> int:
    """Make masks, lists and labels of COCO, or of an export in COCO style."""
    chosen, _ = parse_arguments(COCOArguments, arguments)
    for key, choices in (("overlap", ("smallest", "last")), ("crowd", ("paint", "ignore", "skip"))):
        if getattr(chosen, key) not in choices:
            raise WSSSError(f"{key}={getattr(chosen, key)}: expected {' or '.join(choices)}")
    if chosen.jobs is not None and chosen.jobs < 1:
        raise WSSSError(f"jobs={chosen.jobs}: expected at least 1 process")
    root = Path(chosen.root).expanduser()
    if not root.is_dir():
        raise WSSSError(f"data folder {root} is missing; set root to where COCO lies")
    from wsss.data.prepare.coco import find_annotations, prepare_coco

    files = find_annotations(root, chosen.annotations)
    return prepare_coco(root, files, overlap=chosen.overlap, crowd=chosen.crowd, jobs=chosen.jobs)


def run_check(arguments: list[str]) -> int:
    """Look a data set over; the exit status is 1 where there is an error."""
    fast = "--fast" in arguments
    arguments, folders = take_folders(arguments)
    overrides = with_folders([], folders)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if argument == "--fast":
            continue
        if not equals:
            raise WSSSError(f"{argument!r}: expected data=NAME, KEY=VALUE or --fast")
        complete = key in ("data", SEARCH_PATH) or key.startswith("data.")
        overrides.append(as_text(argument if complete else f"data.{argument}"))
    composed = compose_line(overrides)
    config = plain(composed)
    check_paths(config)
    from wsss.data.doctor import Report, examine, examine_table
    from wsss.runs.config import check_config
    from wsss.runs.folder import build_data

    check_config(composed)
    report = Report()
    data = examine_table(config["data"], report)
    if data is not None:
        found = examine(build_data(config | {"data": data}), fast=fast)
        report.findings += found.findings
        report.rows += found.rows
    show(report, f"{config['data']['name']} in {config['data']['root']}")
    return 0 if report.healthy else 1


def as_text(override: str) -> str:
    """Quote a value that Hydra would take for a sweep or could not read: ``root=a,b``, ``a=b``."""
    key, _, value = override.partition("=")
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:
        return f"{key}={quoted(value)}"
    return f"{key}={quoted(value)}" if parsed.is_sweep_override() else override


def show(report: "Report", title: str) -> None:
    """Print one line a finding, the summary table and the verdict."""
    from wsss.data.doctor import SHOWN

    shown: Counter[tuple[str, ...]] = Counter()
    for finding in report.findings:
        group = (finding.level, finding.kind, finding.split)
        shown[group] += 1
        if shown[group] <= SHOWN:
            place = f" [{finding.split}]" if finding.split else ""
            print(f"{finding.level}: {finding.kind}{place}: {finding.text}")
    for (level, kind, split), count in shown.items():
        if count > SHOWN:
            place = f" [{split}]" if split else ""
            print(f"{level}: {kind}{place}: and {count - SHOWN} more of this kind")
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    for heading in ("images", "masks", "looked into", "errors", "warnings"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        counts = Counter(f.level for f in report.findings if f.split == row.split)
        numbers = (row.images, row.masks, row.looked_into, counts["error"], counts["warning"])
        table.add_row(row.split, *(f"{number:,}" for number in numbers))
    Console().print(table)
    for row in report.rows:
        classes = [f"{name} ({count})" for name, count in row.classes]
        classes += [f"none of them ({row.without})"] if row.without else []
        print(f"classes of {row.split}: {', '.join(classes) or '-'}")
    for row in report.rows:  # printed plainly: a table would cut them
        for what in ("list", "labels", "masks"):
            print(f"sha256 of {row.split} {what}: {getattr(row, f'{what}_sha256') or '-'}")
    levels = Counter(finding.level for finding in report.findings)
    verdict = "can be used" if report.healthy else "must be mended first"
    total = ", ".join(f"{levels[level]} {level}s" for level in ("error", "warning", "note"))
    print(f"{total}: {verdict}")
