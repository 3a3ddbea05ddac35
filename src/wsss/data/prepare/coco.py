"""`wsss data prepare coco`: index masks, lists and labels from COCO's instance annotations.

The rules that make a mask of overlapping instances are named, because they move numbers
(field.md, C): which instance is on top, what a crowd region is, that ids are contiguous. The lists
of the field (82,081 and 40,137 of COCO 2014's images) are those images that have an annotation.
COCO-style exports of labelme and CVAT take the same way.
"""

import json
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256, write_atomically
from wsss.data.dataset import missing_files
from wsss.data.images import image_size, mask_png
from wsss.data.prepare.common import (
    TABLE_FILE,
    TableRow,
    run_all,
    settle_rules,
    split_of,
    write_table,
)
from wsss.data.prepare.exports import BACKGROUND
from wsss.data.table import FOLDER, read_text, refuse_pickle
from wsss.maps.pixels import IGNORE_INDEX

OFFICIAL = {"train2014": 82081, "val2014": 40137}
ANNOTATION_FOLDERS = ("annotations", "Annotations", ".", "coco2014/annotations")
IMAGE_FOLDERS = (".", "images", "JPEGImages", "coco2014")
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Instance(NamedTuple):
    """One annotation.

    Attributes:
        key: its id in the file.
        class_id: 1..K.
        area: as the file has it, or None.
        crowd: whether it is a crowd region.
        segmentation: polygons, or run lengths (compressed or not).
    """

    key: int
    class_id: int
    area: float | None
    crowd: bool
    segmentation: Any


class Picture(NamedTuple):
    """An image of an instances file."""

    file_name: str
    height: int
    width: int
    instances: list[Instance]


class MaskJob(NamedTuple):
    """One mask to paint."""

    image: Path
    target: Path
    picture: Picture
    overlap: str
    crowd: str
    origin: Path


class Instances(NamedTuple):
    """An instances file that has been checked.

    Attributes:
        path: the file.
        class_names: K names, sorted by category id.
        pictures: the images with at least one annotation, sorted by name.
        total: number of all images.
    """

    path: Path
    class_names: tuple[str, ...]
    pictures: list[Picture]
    total: int


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
    settle_rules(
        root / FOLDER,
        {
            "overlap": overlap,
            "crowd": crowd,
            "annotations": {path.name: file_sha256(path) for path in files},
        },
    )
    rows: list[TableRow] = []
    class_names: tuple[str, ...] = ()
    table = Table(title=str(root), title_justify="left")
    for heading in ("annotations", "images", "with an annotation", "official", "masks made"):
        table.add_column(heading, justify="left" if heading == "annotations" else "right")
    for path in files:
        content = read_instances(path)
        if class_names and content.class_names != class_names:
            raise WSSSError(f"{path} has other categories than {files[0]}; expected the same")
        class_names = content.class_names
        split = split_of(_subset(path))
        made, subset_rows = _prepare_subset(root, content, split, overlap, crowd, jobs)
        rows += subset_rows
        official = OFFICIAL.get(_subset(path))
        note = "-" if official is None else f"{official:,}"
        note += "" if official in (None, len(subset_rows)) else " (differs)"
        table.add_row(path.name, f"{content.total:,}", f"{len(subset_rows):,}", note, f"{made:,}")
    if any(row.split for row in rows) and not all(row.split for row in rows):
        raise WSSSError(f"{files[0].parent} mixes lists with and without train/val in their names")
    state = write_table(root / FOLDER, rows, class_names)
    Console().print(table)
    print(f"overlap={overlap} crowd={crowd}, ids 1..{len(class_names)}; {TABLE_FILE} {state}")
    kind = "coco" if class_names == COCO_CLASSES else f"table data.csv={FOLDER}/{TABLE_FILE}"
    print(f"use it as: data={kind} data.root={root}")
    return 0


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
        found = sorted(folder.glob("instances_*.json")) or sorted(folder.glob("annotations.json"))
        official = [path for path in found if _subset(path) in OFFICIAL]
        if found:
            return official or found
    raise WSSSError(
        f"no instances_train2014.json, instances_val2014.json or annotations.json in "
        f"{', '.join(str(folder) for folder in folders)}; unpack annotations_trainval2014.zip "
        "there, or give annotations=FILE"
    )


def _subset(path: Path) -> str:
    return path.stem.removeprefix("instances_")


def read_instances(path: Path) -> Instances:
    """Read and check an instances file.

    Raises:
        WSSSError: no JSON, another structure, doubled ids, unknown categories or images.
    """
    try:
        content = json.loads(read_text(path))
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        images = {int(i["id"]): i for i in content["images"]}
        annotations = content["annotations"]
        doubled = len(images) < len(content["images"])
        doubled |= len(categories) < len(content["categories"])
        keys = {int(a["id"]) for a in annotations}
    except ValueError as error:
        raise WSSSError(f"{path} is no complete JSON ({error}); unpack it again") from error
    except (KeyError, TypeError) as error:
        raise WSSSError(
            f"{path} has not the structure of COCO instances ({type(error).__name__}: {error}); "
            "expected images, annotations and categories with ids"
        ) from error
    if doubled or len(keys) < len(annotations):
        raise WSSSError(f"{path} has an image, annotation or category id twice; expected each once")
    things = [key for key in sorted(categories) if categories[key] not in BACKGROUND]
    class_names = tuple(categories[key] for key in things)
    if _subset(path) in OFFICIAL and class_names != COCO_CLASSES:
        odd = sorted({*class_names} ^ {*COCO_CLASSES}) or ["another order"]
        raise WSSSError(
            f"{path} has {len(things)} categories that are not COCO's 80 ({odd[0]!r}); unpack the "
            "official file again"
        )
    class_ids = {key: number for number, key in enumerate(things, start=1)}
    by_image = _group(path, annotations, images, class_ids)
    pictures = [_picture(path, images[key], by_image[key]) for key in by_image]
    pictures.sort(key=lambda picture: picture.file_name)
    return Instances(path, class_names, pictures, len(images))


def _group(
    path: Path, annotations: list[Any], images: dict[int, Any], class_ids: dict[int, int]
) -> dict[int, list[Instance]]:
    """Group instances by image id, in the order of the file."""
    by_image: dict[int, list[Instance]] = defaultdict(list)
    for entry in annotations:
        category, image = entry.get("category_id"), entry.get("image_id")
        for key, known, kind in ((category, class_ids, "category"), (image, images, "image")):
            if not isinstance(key, int) or key not in known:
                raise WSSSError(
                    f"{path}: annotation {entry['id']} has the {kind}_id {key}, which is none of "
                    f"the file's {len(known)}; correct it or remove the annotation"
                )
        area, crowd = entry.get("area"), entry.get("iscrowd", 0)
        if not isinstance(area, int | float | None) or crowd not in (0, 1):
            raise WSSSError(
                f"{path}: annotation {entry['id']} has the area {area!r} and iscrowd {crowd!r}; "
                "expected a number, and 0 or 1"
            )
        by_image[image].append(
            Instance(
                int(entry["id"]), class_ids[category], area, bool(crowd), entry.get("segmentation")
            )
        )
    return by_image


def _picture(path: Path, image: Any, instances: list[Instance]) -> Picture:
    try:
        name, height, width = str(image["file_name"]), int(image["height"]), int(image["width"])
    except (KeyError, TypeError, ValueError):
        raise WSSSError(
            f"{path}: image {image['id']} lacks file_name, height or width; export it again"
        ) from None
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise WSSSError(
            f"{path}: image {image['id']} has the file_name {name!r}; expected a path below the "
            "folder of images, export it again"
        )
    return Picture(name, height, width, instances)


def _prepare_subset(
    root: Path, content: Instances, split: str | None, overlap: str, crowd: str, jobs: int | None
) -> tuple[int, list[TableRow]]:
    """Paint what is missing of one file; give how many masks, and the rows."""
    paths = locate_images(root, content)
    every = []
    rows = []
    for picture, image in zip(content.pictures, paths, strict=True):
        inside = image.relative_to(root)
        target = root / FOLDER / "masks" / inside.with_suffix(".png")
        every.append(MaskJob(image, target, picture, overlap, crowd, content.path))
        present = sorted({instance.class_id for instance in picture.instances})
        labels = [content.class_names[class_id - 1] for class_id in present]
        rows.append(TableRow(inside.as_posix(), labels, target.relative_to(root).as_posix(), split))
    missing = {*missing_files([job.target for job in every])}
    todo = [job for job in every if job.target in missing]
    run_all(_paint_file, todo, description=f"masks of {content.path.name}", jobs=jobs)
    return len(todo), rows


def locate_images(root: Path, content: Instances) -> list[Path]:
    """Give the image files, in any of the layouts that are about (field.md, C).

    Raises:
        WSSSError: they are in none of them, or some are missing.
    """
    names = [picture.file_name for picture in content.pictures]
    if not names:
        raise WSSSError(f"{content.path} annotates no image; expected at least one annotation")
    subset = _subset(content.path)
    folders = [root / base / sub for base in IMAGE_FOLDERS for sub in (subset, ".")]
    prefix = f"COCO_{subset}_"
    for folder in folders:
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
        f"{names[0]} of {content.path} is in none of {', '.join(str(path) for path in folders)}; "
        "unpack the images into one of them"
    )


def _paint_file(job: MaskJob) -> None:
    height, width = image_size(job.image)
    if (height, width) != (job.picture.height, job.picture.width):
        raise WSSSError(
            f"{job.image} is {width}x{height} (width x height), {job.origin} says "
            f"{job.picture.width}x{job.picture.height}; use the images that belong to it"
        )
    try:
        mask = paint(job.picture, overlap=job.overlap, crowd=job.crowd)
    except WSSSError as error:
        raise WSSSError(f"{job.origin}: {error}") from error
    try:
        write_atomically(job.target, mask_png(mask))
    except OSError as error:
        raise WSSSError(f"{job.target} cannot be written ({error.strerror})") from error


def paint(picture: Picture, *, overlap: str, crowd: str) -> NDArray[np.uint8]:
    """Give the class ids (H, W) of a picture's instances.

    Args:
        picture: size and instances.
        overlap: ``smallest`` or ``last`` is on top; equal areas: the earlier one.
        crowd: ``paint``, ``ignore`` or ``skip``.

    Raises:
        WSSSError: a segmentation that cannot be read.
    """
    size = (picture.height, picture.width)
    regions = [(instance, region(instance, *size)) for instance in picture.instances]
    solid = [pair for pair in regions if crowd == "paint" or not pair[0].crowd]
    if overlap == "last":
        solid.reverse()
    else:
        solid.sort(key=lambda pair: pair[1].sum() if pair[0].area is None else pair[0].area)
    mask = np.zeros(size, np.uint8)
    free = np.ones(size, bool)
    for instance, here in solid:  # the first one on a pixel keeps it
        mask[here & free] = instance.class_id
        free &= ~here
    if crowd == "ignore":
        for instance, here in regions:
            if instance.crowd:
                mask[here & free] = IGNORE_INDEX
    return mask


def region(instance: Instance, height: int, width: int) -> NDArray[np.bool_]:
    """Give the pixels (H, W) of an instance, as pycocotools draws them.

    Raises:
        WSSSError: no segmentation, a polygon of fewer than three points, run lengths of another
            size.
    """
    from pycocotools import mask as coco_mask  # compiled; only preparing needs it

    shape = instance.segmentation
    try:
        if isinstance(shape, list) and shape:
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
                raise ValueError("a polygon of fewer than three points")
            runs = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
        elif isinstance(shape, dict):
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"run lengths for {shape['size']}, image {[height, width]}")
            runs = shape
            if isinstance(shape["counts"], list):
                if sum(shape["counts"]) != height * width:
                    raise ValueError("run lengths that do not fill the image")
                runs = coco_mask.frPyObjects(shape, height, width)
        else:
            raise ValueError("no segmentation, perhaps only a box")
        return coco_mask.decode(runs).astype(bool)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WSSSError(
            f"annotation {instance.key} has {error}; expected polygons or run lengths, mend or "
            "remove it"
        ) from error
