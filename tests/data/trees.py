"""Small data sets in the official formats, as the downloads and annotation tools write them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from voc_tree import write_image, write_mask, write_xml

from wsss.data.prepare.coco import COCO_CLASSES
from wsss.data.voc import VOC_CLASSES

UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [i for i in range(1, 91) if i not in UNUSED]

VOC_TRAIN = ["2007_000032", "2007_000039", "2007_000063"]
VOC_VAL = ["2007_000033", "2007_000042"]
# SBD: one of VOC's train, one of VOC's val, the rest its own
SBD_TRAIN = ["2007_000032", "2008_000002", "2008_000007"]
SBD_VAL = ["2007_000033", "2008_000026"]
AUG = sorted({*VOC_TRAIN, *SBD_TRAIN, *SBD_VAL} - {*VOC_VAL})


def ids_of(name: str, height: int, width: int) -> np.ndarray:
    """A mask with two classes that depend on the name; no void."""
    number = int(name[-3:])
    mask = np.zeros((height, width), np.uint8)
    mask[5:15, 5:20] = number % 20 + 1
    mask[18:25, 2:30] = (number + 7) % 20 + 1
    return mask


def make_official_voc(parent: Path, *, sbd: bool = True) -> Path:
    """VOCdevkit/VOC2012 as it is unpacked, and SBD's benchmark_RELEASE beside it."""
    root = parent / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(sorted({*AUG, *VOC_VAL, "2008_000006"})):
        height, width = 30 + number, 40
        write_image(root, name, height=height, width=width, seed=number)
        mask = ids_of(name, height, width)
        classes = [VOC_CLASSES[i - 1] for i in np.unique(mask) if i]
        if name == "2008_000006":  # of the test set: neither annotation nor mask
            continue
        write_xml(root, name, classes)
        if name in VOC_TRAIN + VOC_VAL:
            mask[0] = 255
            write_mask(root, name, mask)
    lists = {"train": VOC_TRAIN, "val": VOC_VAL, "test": ["2008_000006"]}
    for split, names in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
    if sbd:
        make_sbd(parent / "benchmark_RELEASE" / "dataset", root)
    return root


def make_sbd(folder: Path, root: Path) -> None:
    """SBD's cls/*.mat (a 1x1 struct GTcls in a compressed v5 file) and lists."""
    from scipy.io import savemat

    (folder / "cls").mkdir(parents=True)
    for name in {*SBD_TRAIN, *SBD_VAL}:
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
            width, height = image.size
        mask = ids_of(name, height, width)
        mask[26:, 30:] = 15  # SBD is not VOC: where VOC has a mask, that one counts
        content = {"Segmentation": mask, "CategoriesPresent": np.unique(mask)[1:, None]}
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": content}, do_compression=True)
    for split, names in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def rectangle(x: int, y: int, width: int, height: int) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, zeros first: COCO's form for crowds."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def coco_instances(
    subset: str, count: int, *, categories: Sequence[tuple[int, str]], prefix: str | None = None
) -> dict[str, Any]:
    """Images with overlapping polygons, a crowd, and a last image without annotation."""
    images, annotations = [], []
    name = f"COCO_{subset}_" if prefix is None else prefix
    for number in range(count):
        height, width = 36, 48 + number
        file_name = f"{name}{number + 1:012}.jpg"
        images.append({"id": number + 1, "file_name": file_name, "height": height, "width": width})
        if number == count - 1:
            continue
        first, second, third = (categories[(number + k) % len(categories)][0] for k in (0, 1, 2))
        crowd = np.zeros((height, width), bool)
        crowd[2:34, 30:44] = True
        shapes: list[tuple[Any, int, float, int]] = [
            ([rectangle(2, 2, 20, 20)], first, 400.0, 0),
            ([rectangle(10, 8, 6, 6), rectangle(30, 20, 4, 4)], second, 52.0, 0),
            ([rectangle(5, 5, 25, 25)], third, 625.0, 0),
            (run_lengths(crowd), first, 448.0, 1),
        ]
        for segmentation, category, area, is_crowd in shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": category,
                    "segmentation": segmentation,
                    "area": area,
                    "iscrowd": is_crowd,
                }
            )
    named = [{"id": key, "name": name} for key, name in categories]
    return {"images": images, "annotations": annotations, "categories": named}


def official_categories() -> list[tuple[int, str]]:
    return list(zip(COCO_IDS, COCO_CLASSES, strict=True))


LAYOUTS = {
    "native": ("annotations", "{subset}", "COCO_{subset}_"),
    "toco": ("annotations", "coco2014/{subset}", "COCO_{subset}_"),
    "clip-es": ("Annotations", "JPEGImages/{subset}", "COCO_{subset}_"),
    "weaktr": ("annotations", "{subset}", ""),
}


def make_coco(root: Path, *, layout: str = "native", train: int = 4, val: int = 3) -> Path:
    """COCO 2014 in one of the layouts that are about; the JSON always has the official names."""
    annotations, images, prefix = LAYOUTS[layout]
    (root / annotations).mkdir(parents=True)
    for subset, count in (("train2014", train), ("val2014", val)):
        content = coco_instances(subset, count, categories=official_categories())
        (root / annotations / f"instances_{subset}.json").write_text(json.dumps(content))
        folder = root / images.format(subset=subset)
        folder.mkdir(parents=True)
        for image in content["images"]:
            name = image["file_name"].removeprefix(f"COCO_{subset}_")
            size = (image["height"], image["width"])
            pixels = np.random.default_rng([image["id"], len(subset)]).integers(
                0, 256, (*size, 3), np.uint8
            )
            path = folder / (prefix.format(subset=subset) + name)
            Image.fromarray(pixels).save(path, quality=90)
    return root


COLOURS = {"apple": (200, 30, 30), "leaf": (30, 180, 40), "sky": (40, 60, 220)}
CLASSES_OF_PHOTOS = tuple(COLOURS)


def make_photos(root: Path, count: int = 12, *, side: int = 48) -> list[str]:
    """Photographs with one coloured thing each, and which of three it is."""
    (root / "photos").mkdir(parents=True)
    labels = []
    for number in range(count):
        label = CLASSES_OF_PHOTOS[number % 3]
        rng = np.random.default_rng(number)
        pixels = rng.integers(90, 130, (side, side + 8, 3), np.uint8)
        row, column = rng.integers(4, side // 2, 2)
        pixels[row : row + side // 3, column : column + side // 3] = COLOURS[label]
        Image.fromarray(pixels).save(root / "photos" / f"{number:03}.jpg", quality=95)
        labels.append(label)
    return labels


def write_photo_table(root: Path, labels: Sequence[str], name: str = "labels.csv") -> Path:
    rows = [f"photos/{number:03}.jpg,{label}" for number, label in enumerate(labels)]
    path = root / name
    path.write_text("\n".join(["image,labels", *rows]) + "\n")
    return path
