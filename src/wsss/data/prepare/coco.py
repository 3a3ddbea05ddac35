"""`wsss data prepare coco`: index masks, lists and labels from COCO's instance annotations.

The rules that make a mask of overlapping instances are named, because they move numbers
(field.md, C): which instance is on top, what a crowd region is, that ids are contiguous. The lists
of the field (82,081 and 40,137 of COCO 2014's images) are those images that have an annotation;
of a single class the others are listed too, since without them nothing would be without it.
COCO-style exports of labelme, CVAT and Roboflow take the same way.

Everything that can be refused is refused before the first file is written, so that a file that has
been mended can be prepared by the same call.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, write_atomically
from wsss.core.lock import lock
from wsss.data.dataset import in_threads, missing_files
from wsss.data.images import ON_ITS_SIDE, image_size, mask_png, orientation
from wsss.data.prepare.common import (
    TABLE_FILE,
    TableRow,
    check_readable,
    note_rules,
    rules_are_new,
    run_all,
    split_of,
    write_table,
)
from wsss.data.prepare.instances import (
    COCO_CLASSES,
    OFFICIAL,
    Instances,
    Picture,
    read_instances,
    subset_of,
    with_slashes,
)
from wsss.data.prepare.painting import look_over, paint
from wsss.data.table import FOLDER, refuse_pickle

ANNOTATION_FOLDERS = ("annotations", "Annotations", ".", "coco2014/annotations")
IMAGE_FOLDERS = (".", "images", "JPEGImages", "coco2014")
ROBOFLOW = "_annotations.coco.json"  # lies beside the images of its split


class MaskJob(NamedTuple):
    """One mask to paint."""

    image: Path
    target: Path
    picture: Picture
    overlap: str
    crowd: str
    origin: Path


class Subset(NamedTuple):
    """What is to be done for one instances file."""

    content: Instances
    name: str
    jobs: list[MaskJob]
    rows: list[TableRow]


def prepare_coco(
    root: Path, files: list[Path], *, overlap: str, crowd: str, jobs: int | None
) -> int:
    """Paint the masks that are missing, then write the table of all images.

    Args:
        root: folder of the data.
        files: its instances files.
        overlap: see `COCOArguments`, as the next two.
        crowd: crowd policy.
        jobs: processes.

    Returns:
        The exit status, 0.

    Raises:
        WSSSError: a broken file, missing images, or masks begun by other rules.
    """
    with lock(root, "preparing"):
        return _prepare(root, files, overlap, crowd, jobs)


def _prepare(root: Path, files: list[Path], overlap: str, crowd: str, jobs: int | None) -> int:
    names = _names(root, files)
    rules = {
        "overlap": overlap,
        "crowd": crowd,
        "area": "painted",  # masks that were made by the declared area never mix with these
        "annotations": {name: file_sha256(path) for name, path in zip(names, files, strict=True)},
    }
    new = rules_are_new(root / FOLDER, rules)
    subsets = [
        _plan(root, content, name, overlap, crowd)
        for content, name in zip(read_instances(files), names, strict=True)
    ]
    rows, note, setting = _splits(root, subsets)
    class_names = subsets[0].content.class_names
    check_readable(root, rows, class_names)
    every = [job for subset in subsets for job in subset.jobs]
    missing = {*missing_files([job.target for job in every])}
    todo = [[job for job in subset.jobs if new or job.target in missing] for subset in subsets]
    if any(todo):
        in_threads(_check_size, [job for chosen in todo for job in chosen])
        contents = [subset.content for subset in subsets]
        for line in look_over(contents, names, overlap=overlap, crowd=crowd, jobs=jobs):
            print(line)
    note_rules(root / FOLDER, rules)
    for subset, chosen in zip(subsets, todo, strict=True):
        run_all(_paint_file, chosen, description=f"masks of {subset.name}", jobs=jobs)
    state = write_table(root / FOLDER, rows, class_names)
    _report(root, subsets, todo)
    if without := [row.image for row in rows if not row.labels]:
        print(
            f"note: {len(without):,} of {len(rows):,} images have no annotation, first "
            f"{without[0]}; they are listed as images without {class_names[0]!r}, with an empty "
            "mask: remove those that nobody has looked at"
        )
    print(f"overlap={overlap} crowd={crowd}, ids 1..{len(class_names)}; {TABLE_FILE} {state}{note}")
    kind = "coco" if class_names == COCO_CLASSES else f"table data.csv={FOLDER}/{TABLE_FILE}"
    print(f"use it as: data={kind} data.root={root}{setting}")
    return 0


def _names(root: Path, files: Sequence[Path]) -> list[str]:
    """Give what to call each file: its name, with its folder where two share one."""
    count = Counter(path.name for path in files)
    return [
        path.name if count[path.name] == 1 else (_below(root, path) or path).as_posix()
        for path in files
    ]


def _below(root: Path, path: Path) -> Path | None:
    """Give a path relative to the root, whichever way both are written; None if it is outside."""
    if path.is_relative_to(root):  # before links are followed
        return path.relative_to(root)
    full, base = path.resolve(), root.resolve()
    return full.relative_to(base) if full.is_relative_to(base) else None


def _split(root: Path, path: Path) -> str | None:
    """Give the split that the name of a file says, or for Roboflow's files that of its folder."""
    if path.name != ROBOFLOW:
        return split_of(subset_of(path))
    return None if path.parent.resolve() == root.resolve() else split_of(path.parent.name)


def _splits(root: Path, subsets: Sequence[Subset]) -> tuple[list[TableRow], str, str]:
    """Give the rows of all files, what to say of them, and a setting that they need.

    A table whose only split is train would leave nothing to validate on, so that it gets none,
    and a part is held out. COCO's own keep theirs.

    Raises:
        WSSSError: there is no row, or some lists name a split and others do not.
    """
    rows = [row for subset in subsets for row in subset.rows]
    if not any(row.labels for row in rows):
        raise WSSSError(
            f"{subsets[0].content.path} annotates no image; expected at least one annotation"
        )
    splits = {row.split for row in rows}
    if None in splits and len(splits) > 1:
        raise WSSSError(f"{root} mixes lists with and without train/val in their names")
    official = any(subset_of(subset.content.path) in OFFICIAL for subset in subsets)
    if splits == {"train"} and not official:
        note = " without a split, as all images are of train: a part is held out to val"
        return [row._replace(split=None) for row in rows], note, ""
    return rows, "", " data.val_split=test" if splits == {"train", "test"} else ""


def _report(root: Path, subsets: Sequence[Subset], todo: Sequence[Sequence[MaskJob]]) -> None:
    table = Table(title=str(root), title_justify="left")
    for heading in ("annotations", "images", "with an annotation", "official", "masks made"):
        first = heading == "annotations"
        table.add_column(heading, justify="left" if first else "right", overflow="fold")
    for subset, made in zip(subsets, todo, strict=True):
        official = OFFICIAL.get(subset_of(subset.content.path))
        annotated = sum(bool(row.labels) for row in subset.rows)
        note = "-" if official is None else f"{official:,}"
        note += "" if official in (None, annotated) else " (differs)"
        numbers = (f"{subset.content.total:,}", f"{annotated:,}", note, f"{len(made):,}")
        table.add_row(subset.name, *numbers)
    Console().print(table)


def find_annotations(root: Path, given: str | None) -> list[Path]:
    """Give the instances files: COCO 2014's where there are any, else what an export has.

    Raises:
        WSSSError: none is there.
    """
    if given is not None:
        refuse_pickle(Path(given))
        path = Path(given).expanduser()
        if path.is_file():
            return [path]
        folders = [path]
    else:
        folders = [root / name for name in ANNOTATION_FOLDERS]
    for folder in folders:
        for pattern in ("instances_*.json", "annotations.json", ROBOFLOW, f"*/{ROBOFLOW}"):
            found = sorted(folder.glob(pattern))
            if found:
                return [path for path in found if subset_of(path) in OFFICIAL] or found
    raise WSSSError(
        f"no instances_train2014.json, instances_val2014.json, annotations.json or {ROBOFLOW} in "
        f"{', '.join(str(folder) for folder in folders)}; unpack annotations_trainval2014.zip "
        "there, or give annotations=FILE"
    )


def _plan(root: Path, content: Instances, name: str, overlap: str, crowd: str) -> Subset:
    """Give the masks and rows of one file."""
    jobs = []
    rows = []
    split = _split(root, content.path)
    images = locate_images(root, content)
    for picture, image in zip(content.pictures, images, strict=True):
        inside = image.relative_to(root)
        target = root / FOLDER / "masks" / inside.with_suffix(".png")
        jobs.append(MaskJob(image, target, picture, overlap, crowd, content.path))
        present = sorted({instance.class_id for instance in picture.instances})
        labels = [content.class_names[class_id - 1] for class_id in present]
        rows.append(TableRow(inside.as_posix(), labels, target.relative_to(root).as_posix(), split))
    return Subset(content, name, jobs, rows)


def locate_images(root: Path, content: Instances) -> list[Path]:
    """Give the image files, in any of the layouts that are about (field.md, C).

    Raises:
        WSSSError: they are in none of them, or some are missing.
    """
    given = [picture.file_name for picture in content.pictures]
    if not given:
        return []
    subset = subset_of(content.path)
    folders = [root / base / sub for base in IMAGE_FOLDERS for sub in (subset, ".")]
    beside = _below(root, content.path.parent)
    if beside is not None:
        folders.insert(0 if content.path.name == ROBOFLOW else len(folders), root / beside)
    prefix = f"COCO_{subset}_"
    for folder in folders:
        # a name with backslashes is a path of Windows, or a file that was unpacked as that
        for names in ([*map(with_slashes, given)], given):
            for bare in (False, True):
                paths = [folder / (name.removeprefix(prefix) if bare else name) for name in names]
                if paths[0].is_file():
                    missing = missing_files(paths)
                    if missing:
                        raise WSSSError(
                            f"image {missing[0]} is missing ({len(missing)} of {len(paths)} that "
                            f"{content.path} annotates); unpack the images again"
                        )
                    return paths
    raise WSSSError(
        f"{given[0]} of {content.path} is in none of {', '.join(str(path) for path in folders)}; "
        "unpack the images into one of them"
    )


def _check_size(job: MaskJob) -> None:
    height, width = image_size(job.image)
    declared = (job.picture.height, job.picture.width)
    if declared == (height, width):
        return
    tag = orientation(job.image)
    if tag >= ON_ITS_SIDE and declared == (width, height):
        return  # drawn on the stored pixels: the mask is turned with the image when it is read
    turned = f" as its EXIF orientation tag {tag} turns it" if tag > 1 else ""
    raise WSSSError(
        f"{job.image} is {width}x{height} (width x height){turned}, {job.origin} says "
        f"{job.picture.width}x{job.picture.height}; use the images that belong to it"
    )


def _paint_file(job: MaskJob) -> None:
    mask = paint(job.picture, overlap=job.overlap, crowd=job.crowd, origin=job.origin)
    write_atomically(job.target, mask_png(mask))
