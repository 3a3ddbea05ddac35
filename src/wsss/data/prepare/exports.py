"""VOC-style exports of annotation tools become a table (`wsss data prepare voc root=EXPORT`).

* labelme (``labelme2voc``): ``class_names.txt`` (``_background_`` first), ``JPEGImages``,
  ``SegmentationClass`` with ids in the order of the names (``SegmentationClassPNG`` before
  labelme 5, whose ``SegmentationClass`` holds arrays).
* CVAT ("Segmentation mask" and "PASCAL VOC"): ``labelmap.txt`` with ``name:r,g,b::`` lines,
  ``JPEGImages``, lists in ``ImageSets``, and ``SegmentationClass`` in those colours or, for boxes,
  only ``Annotations``.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.core.lock import lock
from wsss.data.dataset import present
from wsss.data.image_files import IMAGE_SUFFIXES
from wsss.data.images import image_size, mask_png, read_mask, read_rgb
from wsss.data.prepare.common import (
    TABLE_FILE,
    TableRow,
    check_names,
    check_readable,
    run_all,
    split_of,
    write_table,
)
from wsss.data.table import FOLDER, read_text
from wsss.data.voc import labels_from_mask, labels_from_xml, read_names
from wsss.maps.pixels import IGNORE_INDEX

LABELME_CLASSES = "class_names.txt"
CVAT_CLASSES = "labelmap.txt"
BACKGROUND = ("_background_", "__background__", "background", "__ignore__", "ignored")
IGNORED = ("ignored", "__ignore__")  # those of them that are no background either
BLACK = (0, 0, 0)
NO_LIST = "default"  # the split of images in none of the lists, as CVAT calls them
STAGED = ".wsss.tmp"  # beside the result, until all of it has been checked
Colour = tuple[int, int, int]


class ColourJob(NamedTuple):
    """A mask in colours to turn into ids."""

    source: Path
    target: Path
    colours: tuple[tuple[Colour, int], ...]


class Label(NamedTuple):
    """A line of a label map: what a colour means."""

    line: int
    name: str
    class_id: int


def is_export(root: Path) -> bool:
    """Say whether a folder in the VOC layout was written by labelme or CVAT."""
    return any((root / name).is_file() for name in (LABELME_CLASSES, CVAT_CLASSES))


def prepare_export(root: Path, *, jobs: int | None = None) -> int:
    """Write ``wsss/labels.csv``, ``wsss/classes.txt`` and index masks where they were colours.

    All is made beside its place and checked, by the reader of tables too, before any of it is
    moved there. Images whose mask shows no object are listed where there is one class, which needs
    them to learn what lacks it, and left out where there are several.

    Returns:
        The exit status, 0.

    Raises:
        WSSSError: a broken file, an unknown class or colour, an image that is missing; then
            nothing has changed.
    """
    with lock(root, "preparing"):
        return _prepare(root, jobs)


def _prepare(root: Path, jobs: int | None) -> int:
    class_names, colours = read_export_classes(root)
    images = _by_name(root / "JPEGImages", IMAGE_SUFFIXES)
    sources = _masks(root)
    for name in sources:
        if name not in images:
            raise WSSSError(f"{sources[name]} has no image in {root / 'JPEGImages'}; export it too")
    splits, notes = _splits(root, images)
    with _staging(root) as staged:
        masks = _ids(sources, colours, staged, jobs)
        rows = []
        for name in sorted(masks or images):
            labels = _labels(root, images[name], sources.get(name), masks.get(name), class_names)
            mask = masks.get(name)
            if mask and colours:
                mask = root / FOLDER / "masks" / mask.name
            below = mask.relative_to(root).as_posix() if mask else None
            image = images[name].relative_to(root).as_posix()
            rows.append(TableRow(image, labels, below, splits.get(name, NO_LIST)))
        without = sum(not row.labels for row in rows)
        if rows and without == len(rows):
            raise WSSSError(
                f"no mask or annotation of {root} shows a class (a mask's 0 is background, its "
                f"{IGNORE_INDEX} is ignored, a class has its number in {_classes_file(root).name})"
            )
        if len(class_names) > 1:
            rows = [row for row in rows if row.labels]
        rows, more = _usable_splits(rows, len(splits))
        check_readable(root, rows, class_names)
        if colours:
            _publish(masks, root / FOLDER / "masks")
        state = write_table(root / FOLDER, rows, class_names)
    unmasked = len(images) - len(masks) if masks else 0
    if len(class_names) > 1:
        unmasked += without
    elif without:
        notes.append(f"{without} without an object listed as showing none")
    if unmasked:
        notes.insert(0, f"{unmasked} without an object left out")
    print(", ".join([f"{len(rows)} images", f"{len(class_names)} classes", *notes]), end="; ")
    print(f"{TABLE_FILE} {state}")
    print(f"use it as: data=table data.root={root} data.csv={FOLDER}/{TABLE_FILE}{more}")
    return 0


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """Give an empty folder that is gone afterwards, with what a killed call left there."""
    folder = root / STAGED
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise WSSSError(
            f"{folder} cannot be made ({error.strerror}); make the data's folder writable"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(masks: dict[str, Path], folder: Path) -> None:
    """Move masks to where they belong; one that is there with the same content stays."""
    for path in masks.values():
        content, target = path.read_bytes(), folder / path.name
        if not target.is_file() or target.read_bytes() != content:
            write_atomically(target, content)


def _classes_file(root: Path) -> Path:
    cvat = root / CVAT_CLASSES
    return cvat if cvat.is_file() else root / LABELME_CLASSES


def read_export_classes(
    root: Path,
) -> tuple[tuple[str, ...], tuple[tuple[Colour, int], ...]]:
    """Give the foreground classes, and for CVAT the id of each colour.

    Raises:
        WSSSError: a line of ``labelmap.txt`` is not ``name:r,g,b:...``, a colour or a name stands
            for two classes, or labelme's background is not the first name.
    """
    path, names = _classes_file(root), []
    if path.name == LABELME_CLASSES:
        return _labelme_classes(path), ()
    # black is the background, listed or not
    labels = {BLACK: Label(0, "background", 0)}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        name = name.strip()
        try:
            red, green, blue = (int(value) for value in rest.split(":")[0].split(","))
            if not name or not all(0 <= value <= 255 for value in (red, green, blue)):
                raise ValueError
        except ValueError:
            raise WSSSError(
                f"{path} line {number} reads {line[:60]!r}; expected CVAT's name:r,g,b:parts:acts"
            ) from None
        class_id = IGNORE_INDEX if name.lower() in IGNORED else 0
        if name.lower() not in BACKGROUND:
            names.append(name)
            class_id = len(names)
        colour = (red, green, blue)
        before = labels.setdefault(colour, Label(number, name, class_id))
        if before.class_id != class_id:
            where = f"line {before.line}: {before.name!r}" if before.line else "black is background"
            raise WSSSError(
                f"{path} line {number} gives {name!r} the colour {red},{green},{blue} again "
                f"({where}), so that its pixels could be either; give each label a colour of its "
                "own and export again"
            )
    return check_names(path, names), tuple((colour, one.class_id) for colour, one in labels.items())


def _labelme_classes(path: Path) -> tuple[str, ...]:
    """Read ``class_names.txt``, whose lines number the ids from 0."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    names = [name for name in lines if name]
    late = [name for name in names[1:] if name.lower() in BACKGROUND]
    first = names[0].lower() if names else ""
    if late and first not in BACKGROUND:
        raise WSSSError(
            f"{path} has {late[0]!r} after a class, so that the ids of its masks are unsure; "
            "expected it first"
        )
    return check_names(path, [name for name in names if name.lower() not in BACKGROUND])


def ids_of_colours(
    path: Path, colours: Sequence[tuple[tuple[int, int, int], int]]
) -> NDArray[np.uint8]:
    """Read a mask in colours as ids (H, W).

    Raises:
        WSSSError: a colour that is in no line of the label map.
    """
    rgb = read_rgb(path).astype(np.int32)
    packed = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    ids = np.zeros(packed.shape, np.uint8)
    known = np.zeros(packed.shape, bool)
    for (red, green, blue), class_id in colours:
        here = packed == (red << 16 | green << 8 | blue)
        ids[here] = class_id
        known |= here
    if not known.all():
        colour = tuple(int(value) for value in rgb[~known][0])
        raise WSSSError(
            f"mask {path} has the colour {colour}, which {CVAT_CLASSES} does not name; export both "
            "together"
        )
    return ids


def _by_name(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Map names without suffix to the files of a folder and those below it.

    Raises:
        WSSSError: two share a name, so that a mask could be either's.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise WSSSError(
                f"{found[path.stem]} and {path} share the name {path.stem!r}; rename one"
            )
        found[path.stem] = path
    return found


def _masks(root: Path) -> dict[str, Path]:
    """Give the masks by image name; empty where the export has none."""
    older = root / "SegmentationClassPNG"
    return _by_name(older if older.is_dir() else root / "SegmentationClass", {".png"})


def _ids(
    sources: dict[str, Path],
    colours: tuple[tuple[Colour, int], ...],
    staged: Path,
    jobs: int | None,
) -> dict[str, Path]:
    """Give masks of class ids by image name, made in a folder where they were colours."""
    if not colours:
        return sources
    made = {name: staged / f"{name}.png" for name in sources}
    todo = [ColourJob(sources[name], made[name], colours) for name in made]
    run_all(_convert, todo, description="colours to class ids", jobs=jobs)
    return made


def _convert(job: ColourJob) -> None:
    write_atomically(job.target, mask_png(ids_of_colours(job.source, job.colours)))


def _splits(root: Path, images: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Read train, val or test of every image where the export has such lists.

    Returns:
        Splits by name, and what to say about the lists.

    Raises:
        WSSSError: an image is in the lists of two splits.
    """
    found: dict[str, tuple[str, Path]] = {}
    for kind in ("Segmentation", "Main"):
        for path in sorted((root / "ImageSets" / kind).glob("*.txt")):
            split = split_of(path.stem)
            if not split:
                continue
            for line in read_names(path, split):
                # CVAT names the folders too; files are told apart by their last name
                name = PurePosixPath(line.replace("\\", "/")).name
                before, where = found.setdefault(name, (split, path))
                if before != split:
                    raise WSSSError(
                        f"{name!r} is listed in {where} and in {path}; an image is in one split, "
                        "remove it from the others"
                    )
    lost = sorted({*found} - {*images})
    notes = [f"{len(lost)} listed names have no image ({lost[0]!r} first)"] if lost else []
    return {name: split for name, (split, _) in found.items()}, notes


def _usable_splits(rows: list[TableRow], listed: int) -> tuple[list[TableRow], str]:
    """Keep the splits that can be trained and validated on, else leave them to the holdout.

    Args:
        rows: the table; images in no list are of the split ``NO_LIST``.
        listed: number of names in the lists.

    Returns:
        The rows, and what the command that uses them needs.
    """
    splits = {row.split for row in rows}
    if "train" in splits and splits & {"val", "test"}:
        if NO_LIST in splits:
            count = sum(row.split == NO_LIST for row in rows)
            first = next(row.image for row in rows if row.split == NO_LIST)
            print(
                f"warning: {count} images are in none of the lists, {first} first; their split is "
                f"{NO_LIST!r}, which no run uses: add them to train or val in the tool"
            )
        return rows, "" if "val" in splits else " data.val_split=test"
    if listed:
        print("the lists do not name both train and val: no column split, a part is held out")
    return [row._replace(split=None) for row in rows], ""


def _labels(
    root: Path, image: Path, source: Path | None, mask: Path | None, class_names: Sequence[str]
) -> list[str]:
    """Give the classes of an image; an error names the user's own mask, not what we made of it."""
    if mask is None:
        labels = labels_from_xml(root / "Annotations" / f"{image.stem}.xml", class_names)
        return present(labels, class_names)
    try:
        ids = read_mask(mask, num_classes=len(class_names), size=image_size(image), image=image)
    except WSSSError as error:
        raise WSSSError(str(error).replace(str(mask), str(source))) from error
    return present(labels_from_mask(ids, len(class_names)), class_names)
