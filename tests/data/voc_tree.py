"""Builds small VOC trees for the tests of this folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from wsss.data.images import voc_palette

CLASSES = ("bottle", "car", "person")


def write_xml(root: Path, name: str, objects: Sequence[str], difficult: int = 0) -> Path:
    nodes = "".join(
        f"<object><name>{o}</name><difficult>{difficult}</difficult>"
        "<part><name>head</name></part></object>"
        for o in objects
    )
    path = root / "Annotations" / f"{name}.xml"
    path.write_text(f"<annotation><owner><name>someone</name></owner>{nodes}</annotation>")
    return path


def write_mask(root: Path, name: str, mask: np.ndarray) -> Path:
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    image.putpalette(voc_palette())
    path = root / "SegmentationClass" / f"{name}.png"
    image.save(path)
    return path


def write_image(root: Path, name: str, *, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    low = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path = root / "JPEGImages" / f"{name}.jpg"
    Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def make_voc(
    parent: Path, *, train: int = 6, val: int = 3, height: int = 40, width: int = 50
) -> Path:
    """Writes VOC2012 with images of varying width; image i holds class i % 3 (+1 as mask id)."""
    root = parent / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    splits = {"train": range(train), "val": range(train, train + val)}
    for split, members in splits.items():
        for i in members:
            shape = (height, width + i)
            write_image(root, f"img{i:03}", height=shape[0], width=shape[1], seed=i)
            write_xml(root, f"img{i:03}", [CLASSES[i % 3]])
            mask = np.zeros(shape, np.uint8)
            mask[10:20, 10:30] = i % 3 + 1
            mask[10:20, 30] = 255
            write_mask(root, f"img{i:03}", mask)
        text = "\n".join(f"img{i:03}" for i in members)  # no final newline, as in VOC's own lists
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return root
