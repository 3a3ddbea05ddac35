"""COCO's instance annotations as they are read: ids, categories, images; no pixel is drawn here."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from wsss.core.errors import WSSSError
from wsss.data.dataset import spelling
from wsss.data.prepare.common import check_names
from wsss.data.prepare.exports import BACKGROUND
from wsss.data.prepare.regions import shown, whole
from wsss.data.table import read_text
from wsss.maps.pixels import IGNORE_INDEX

OFFICIAL = {"train2014": 82081, "val2014": 40137}
LONGEST_NAME = 255  # bytes of a file's name
PARTS = ("images", "annotations", "categories")
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
Key = int | str


class Instance(NamedTuple):
    """One annotation.

    Attributes:
        key: its id in the file.
        class_id: 1..K.
        area: as the file has it, or None; only compared with the pixels, never believed.
        crowd: whether it is a crowd region.
        segmentation: polygons, or run lengths (compressed or not).
    """

    key: Key
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


class Instances(NamedTuple):
    """An instances file that has been checked.

    Attributes:
        path: the file.
        class_names: K names, sorted by category id.
        pictures: the images with at least one annotation, sorted by name; where there is one
            class and this file annotates it, all images: it is learnt from those without it, too.
        total: number of all images.
    """

    path: Path
    class_names: tuple[str, ...]
    pictures: list[Picture]
    total: int

    @property
    def official(self) -> bool:
        """Whether it is COCO 2014's own file: that one is used as it is."""
        return OFFICIAL.get(subset_of(self.path)) == len(self.pictures)


class _Content(NamedTuple):
    """The three parts of a file by id, before classes are numbered."""

    path: Path
    images: dict[Key, Any]
    annotations: dict[Key, Any]
    categories: dict[Key, Any]


def subset_of(path: Path) -> str:
    """Give ``train2014`` for ``instances_train2014.json``."""
    return path.stem.removeprefix("instances_")


def read_instances(paths: Sequence[Path]) -> list[Instances]:
    """Read and check instances files that belong together.

    Raises:
        WSSSError: no JSON, another structure, doubled ids or names, unknown categories or images,
            other categories in one file than in another.
    """
    contents = [_load(path) for path in paths]
    used = {
        (key, _name(content, key))
        for content in contents
        for key in {plain_id(entry.get("category_id")) for entry in content.annotations.values()}
        if key is not None and key in content.categories
    }
    read = [_instances(content, used) for content in contents]
    for other in read[1:]:
        if other.class_names != read[0].class_names:
            odd = sorted({*other.class_names} ^ {*read[0].class_names}) or ["another order"]
            raise WSSSError(
                f"{other.path} has other categories than {read[0].path} ({shown(odd[0])}); "
                "expected the same"
            )
    return read


def plain_id(value: Any) -> Key | None:
    """Give an id as an integer where it is one, also one written as text ("1"); None for no id.

    Exports of databases write every id as text, and some only those of images: 1 and "1" are one
    id. Other text ("img_a", "007") is an id as it stands.
    """
    if not isinstance(value, str):
        return whole(value)
    try:
        return int(value) if str(int(value)) == value else value
    except ValueError:
        return value if value.strip() else None


def _load(path: Path) -> _Content:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise WSSSError(f"{path} is no complete JSON ({error}); unpack it again") from error
    entries: list[Any] = [
        content.get(part) if isinstance(content, dict) else None for part in PARTS
    ]
    for part, listed in zip(PARTS, entries, strict=True):
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise WSSSError(
                f"{path} has not the structure of COCO instances (no list {part!r} of objects); "
                "expected images, annotations and categories with ids"
            )
    kinds = ("image", "annotation", "category")
    return _Content(
        path, *(_by_id(path, kind, listed) for kind, listed in zip(kinds, entries, strict=True))
    )


def _by_id(path: Path, kind: str, entries: list[Any]) -> dict[Key, Any]:
    found: dict[Key, Any] = {}
    for number, entry in enumerate(entries, start=1):
        key = plain_id(entry.get("id"))
        if key is None:
            raise WSSSError(
                f"{path}: {kind} {number} of {len(entries)} has the id {shown(entry.get('id'))}; "
                "expected a number or text of its own, export it again"
            )
        if key in found:
            raise WSSSError(
                f"{path} has the {kind} id twice: {shown(key)}; expected each once (1 and '1' are "
                "one id), number them anew"
            )
        found[key] = entry
    return found


def _name(content: _Content, key: Key) -> str:
    name = content.categories[key].get("name")
    if type(name) not in (str, int) or not _is_text(str(name)):
        raise WSSSError(
            f"{content.path}: category {shown(key)} has the name {shown(name)}; expected a text"
        )
    return str(name)


def _things(content: _Content, used: set[tuple[Key, str]]) -> dict[Key, str]:
    """Give the categories that are classes, sorted by id (numbers before text).

    Neither the background is one nor the name of the whole data set: a category that no
    annotation of any file has and that is another's supercategory (Roboflow writes it as id 0).
    """
    names = {key: _name(content, key) for key in content.categories}
    above: dict[str, set[Key]] = defaultdict(set)
    for key, entry in content.categories.items():
        if isinstance(entry.get("supercategory"), str):
            above[entry["supercategory"]].add(key)
    things = {
        key: names[key]
        for key in sorted(names, key=lambda key: (isinstance(key, str), key))
        if spelling(names[key]) not in BACKGROUND
        and ((key, names[key]) in used or not above[names[key]] - {key})
    }
    seen: dict[str, Key] = {}
    for key, name in things.items():
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in seen:
            other = seen[plain]
            raise WSSSError(
                f"{content.path} has the category name {name!r} twice: ids {shown(other)} "
                f"({things[other]!r}) and {shown(key)} ({name!r}); unite them or rename one"
            )
        seen[plain] = key
    if not 0 < len(things) < IGNORE_INDEX:
        raise WSSSError(
            f"{content.path} has {len(things)} categories; expected 1 to {IGNORE_INDEX - 1} (ids "
            "of an 8-bit mask)"
        )
    check_names(content.path, tuple(things.values()))
    return things


def _instances(content: _Content, used: set[tuple[Key, str]]) -> Instances:
    path, things = content.path, _things(content, used)
    class_names = tuple(things.values())
    if subset_of(path) in OFFICIAL and class_names != COCO_CLASSES:
        odd = sorted({*class_names} ^ {*COCO_CLASSES}) or ["another order"]
        raise WSSSError(
            f"{path} has {len(things)} categories that are not COCO's 80 ({odd[0]!r}); unpack the "
            "official file again"
        )
    class_ids = {key: number for number, key in enumerate(things, start=1)}
    by_image = _group(content, class_ids)
    if len(class_names) == 1 and by_image:
        by_image |= {key: [] for key in content.images if key not in by_image}
    pictures = [_picture(content, key, instances) for key, instances in by_image.items()]
    pictures.sort(key=lambda picture: picture.file_name)
    return Instances(path, class_names, pictures, len(content.images))


def _group(content: _Content, class_ids: dict[Key, int]) -> dict[Key, list[Instance]]:
    """Group instances by image id, in the order of the file."""
    by_image: dict[Key, list[Instance]] = defaultdict(list)
    for key, entry in content.annotations.items():
        where = f"{content.path}: annotation {shown(key)}"
        ids = []
        for kind, known in (("category", content.categories), ("image", content.images)):
            given = entry.get(f"{kind}_id")
            number = plain_id(given)
            if number is None or number not in known:
                raise WSSSError(
                    f"{where} has the {kind}_id {shown(given)}, which is none of the file's "
                    f"{len(known)}; correct it or remove the annotation"
                )
            ids.append(number)
        category, image = ids
        if category not in class_ids:
            raise WSSSError(
                f"{where} is of the category {_name(content, category)!r}, which is the background "
                "and no class; remove the annotation or rename the category"
            )
        area, crowd = entry.get("area"), entry.get("iscrowd")
        flag = int(crowd or 0) if isinstance(crowd, bool | None) else plain_id(crowd)
        if not isinstance(area, int | float | None) or flag not in (0, 1):
            raise WSSSError(
                f"{where} has the area {shown(area)} and iscrowd {shown(crowd)}; "
                "expected a number, and 0 or 1"
            )
        by_image[image].append(
            Instance(key, class_ids[category], area, bool(flag), entry.get("segmentation"))
        )
    return by_image


def _picture(content: _Content, key: Key, instances: list[Instance]) -> Picture:
    where, image = f"{content.path}: image {shown(key)}", content.images[key]
    name = image.get("file_name")
    height, width = (plain_id(image.get(side)) for side in ("height", "width"))
    if not (
        isinstance(name, str)
        and _is_text(name)
        and isinstance(height, int)
        and isinstance(width, int)
        and min(height, width) > 0
    ):
        raise WSSSError(
            f"{where} lacks file_name, height or width (it has {shown(name)}, "
            f"{shown(image.get('height'))}, {shown(image.get('width'))}); export it again"
        )
    inside = PurePosixPath(with_slashes(name))
    outside = inside.is_absolute() or PureWindowsPath(name).drive or ".." in inside.parts
    if outside or max(len(part.encode()) for part in (*inside.parts, "")) > LONGEST_NAME:
        raise WSSSError(
            f"{where} has the file_name {shown(name)}; expected a path below the folder of images, "
            "export it again"
        )
    return Picture(name, height, width, instances)


def _is_text(text: str) -> bool:
    """Say whether a text can name a file or class: no blank, control character or half of a pair.

    JSON can write one half of a pair of UTF-16, which no file can.
    """
    return bool(text.strip()) and all(unicodedata.category(c) not in ("Cc", "Cs") for c in text)


def with_slashes(name: str) -> str:
    """Give a path that Windows wrote with backslashes as all others write it."""
    return name.replace("\\", "/")
