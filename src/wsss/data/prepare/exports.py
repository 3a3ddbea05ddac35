"""VOC-style exports of annotation tools become a table (`wsss data prepare voc root=EXPORT`).

* labelme (``labelme2voc``): ``class_names.txt`` (``_background_`` first), ``JPEGImages``,
  ``SegmentationClass`` with ids in the order of the names (``SegmentationClassPNG`` before
  labelme 5, whose ``SegmentationClass`` holds arrays).
* CVAT ("Segmentation mask" and "PASCAL VOC"): ``labelmap.txt`` with ``name:r,g,b::`` lines,
  ``JPEGImages``, lists in ``ImageSets``, and ``SegmentationClass`` in those colours or, for boxes,
  only ``Annotations``.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.data.dataset import present
from wsss.data.images import IMAGE_SUFFIXES, image_size, mask_png, read_mask, read_rgb
from wsss.data.prepare.common import TABLE_FILE, TableRow, run_all, split_of, write_table
from wsss.data.table import FOLDER, read_text
from wsss.data.voc import labels_from_mask, labels_from_xml, read_split
from wsss.maps.pixels import IGNORE_INDEX

LABELME_CLASSES = "class_names.txt"
CVAT_CLASSES = "labelmap.txt"
BACKGROUND = ("_background_", "background", "__ignore__", "ignored")


class ColourJob(NamedTuple):
    """A mask in colours to turn into ids."""

    source: Path
    target: Path
    colours: tuple[tuple[tuple[int, int, int], int], ...]


def is_export(root: Path) -> bool:
    """Say whether a folder in the VOC layout was written by labelme or CVAT."""
    return any((root / name).is_file() for name in (LABELME_CLASSES, CVAT_CLASSES))


def prepare_export(root: Path, *, jobs: int | None = None) -> int:
    """Write ``wsss/labels.csv``, ``wsss/classes.txt`` and index masks where they were colours.

    Returns:
        The exit status, 0.

    Raises:
        WSSSError: a broken file, an unknown class or colour, an image that is missing.
    """
    class_names, colours = read_export_classes(root)
    images = _by_name(root / "JPEGImages", IMAGE_SUFFIXES)
    masks = _masks(root, colours, jobs)
    splits = _splits(root)
    rows: list[TableRow] = []
    empty = len({*images} - {*masks}) if masks else 0
    for name in sorted(masks or images):
        if name not in images:
            raise WSSSError(f"{masks[name]} has no image in {root / 'JPEGImages'}; export it too")
        labels = _labels(root, name, images[name], masks, class_names)
        if not labels:
            empty += 1
            continue
        mask = masks[name].relative_to(root).as_posix() if masks else None
        image = images[name].relative_to(root).as_posix()
        rows.append(TableRow(image, labels, mask, splits.get(name) if splits else None))
    state = write_table(root / FOLDER, rows, class_names)
    left_out = f", {empty} without an object left out" if empty else ""
    print(f"{len(rows)} images, {len(class_names)} classes{left_out}; {TABLE_FILE} {state}")
    print(f"use it as: data=table data.root={root} data.csv={FOLDER}/{TABLE_FILE}")
    return 0


def read_export_classes(
    root: Path,
) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, int, int], int], ...]]:
    """Give the foreground classes, and for CVAT the id of each colour.

    Raises:
        WSSSError: a line of ``labelmap.txt`` is not ``name:r,g,b:...``.
    """
    if not (root / CVAT_CLASSES).is_file():
        lines = [line.strip() for line in read_text(root / LABELME_CLASSES).splitlines()]
        return tuple(name for name in lines if name and name not in BACKGROUND), ()
    path, names = root / CVAT_CLASSES, []
    colours: dict[tuple[int, int, int], int] = {(0, 0, 0): 0}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(value) for value in rest.split(":")[0].split(","))
        except ValueError:
            raise WSSSError(
                f"{path} line {number} reads {line[:60]!r}; expected CVAT's name:r,g,b:parts:acts"
            ) from None
        if name not in BACKGROUND:
            names.append(name)
        ids = {"ignored": IGNORE_INDEX, "__ignore__": IGNORE_INDEX}
        colours[red, green, blue] = len(names) if name not in BACKGROUND else ids.get(name, 0)
    return tuple(names), tuple(colours.items())


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


def _masks(
    root: Path,
    colours: tuple[tuple[tuple[int, int, int], int], ...],
    jobs: int | None,
) -> dict[str, Path]:
    """Give index masks by image name; empty where the export has none."""
    older = root / "SegmentationClassPNG"
    sources = _by_name(older if older.is_dir() else root / "SegmentationClass", {".png"})
    if not colours:
        return sources
    target = root / FOLDER / "masks"
    made = {name: target / f"{name}.png" for name in sources}
    todo = [
        ColourJob(sources[name], made[name], colours) for name in made if not made[name].is_file()
    ]
    run_all(_convert, todo, description="colours to class ids", jobs=jobs)
    return made


def _convert(job: ColourJob) -> None:
    write_atomically(job.target, mask_png(ids_of_colours(job.source, job.colours)))


def _splits(root: Path) -> dict[str, str] | None:
    """Read train, val or test of every image where the export has such lists."""
    found = {}
    for kind in ("Segmentation", "Main"):
        for path in sorted((root / "ImageSets" / kind).glob("*.txt")):
            split = split_of(path.stem)
            if split:
                found.update(dict.fromkeys(read_split(root, str(path)), split))
    return found or None


def _labels(
    root: Path, name: str, image: Path, masks: dict[str, Path], class_names: Sequence[str]
) -> list[str]:
    if masks:
        mask = read_mask(masks[name], num_classes=len(class_names), size=image_size(image))
        labels = labels_from_mask(mask, len(class_names))
    else:
        labels = labels_from_xml(root / "Annotations" / f"{name}.xml", class_names)
    return present(labels, class_names)
