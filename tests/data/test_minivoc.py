"""The shipped MiniVOC composite: layout, labels, disjoint splits, size and attribution."""

import csv
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wsss.data

MINIVOC = Path(wsss.data.__file__).parent / "minivoc"
ROOT = MINIVOC / "VOC2012"
COUNTS = {"train": 600, "val": 200, "val_unseen": 200}
OBJECTS = "key|class|family|source|x|y|scale"  # the manifest's column
CLASSES = [
    "bottle", "car", "chair", "diningtable", "person", "pottedplant", "sofa", "tvmonitor",
]  # fmt: skip


@cache
def names(split: str) -> list[str]:
    return (ROOT / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


@cache
def mask(name: str) -> np.ndarray:
    with Image.open(ROOT / "SegmentationClass" / f"{name}.png") as image:
        assert image.mode == "P"
        return np.array(image)


def labels(name: str) -> list[str]:
    return [str(o.findtext("name")) for o in _tree(name).iter("object")]


def _tree(name: str) -> ET.Element:
    return ET.parse(ROOT / "Annotations" / f"{name}.xml").getroot()


@cache
def manifest() -> list[dict[str, str]]:
    with (MINIVOC / "manifest.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def used(split: str) -> list[list[str]]:
    """Fields of every pasted cut-out of a split: key, class, family, source, x, y, scale."""
    rows = [row for row in manifest() if row["split"] == split]
    return [part.split("|") for row in rows for part in row[OBJECTS].split(";")]


def test_classes_file_lists_the_eight_in_order() -> None:
    assert (ROOT / "classes.txt").read_text().split() == CLASSES


@pytest.mark.parametrize("split", COUNTS)
def test_each_split_has_its_files(split: str) -> None:
    assert len(set(names(split))) == COUNTS[split]
    for name in names(split):
        with Image.open(ROOT / "JPEGImages" / f"{name}.jpg") as image:
            assert (image.size, image.mode, image.format) == ((160, 160), "RGB", "JPEG")
        assert mask(name).shape == (160, 160)
        size = _tree(name).find("size")
        assert size is not None
        assert [size.findtext(k) for k in ("width", "height", "depth")] == ["160", "160", "3"]
        assert _tree(name).findtext("filename") == f"{name}.jpg"


def test_no_file_is_outside_the_splits() -> None:
    listed = {name for split in COUNTS for name in names(split)}
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        assert {path.stem for path in (ROOT / folder).iterdir()} == listed


@pytest.mark.parametrize("split", COUNTS)
def test_xml_labels_are_the_classes_of_the_mask(split: str) -> None:
    for name in names(split):
        in_mask = set(np.unique(mask(name)).tolist()) - {0, 255}
        assert {CLASSES.index(label) + 1 for label in labels(name)} == in_mask
        assert 1 <= len(labels(name)) <= 3


@pytest.mark.parametrize("split", COUNTS)
def test_every_object_can_be_seen_inside_its_box(split: str) -> None:
    for name in names(split):
        for item in _tree(name).iter("object"):
            x0, y0, x1, y1 = (int(item.findtext(f"bndbox/{k}") or 0)
                              for k in ("xmin", "ymin", "xmax", "ymax"))  # fmt: skip
            assert 1 <= x0 < x1 <= 160
            assert 1 <= y0 < y1 <= 160
            inside = mask(name)[y0 - 1 : y1, x0 - 1 : x1]
            assert (inside == CLASSES.index(str(item.findtext("name"))) + 1).sum() >= 150


def test_masks_have_the_voc_colour_map() -> None:
    with Image.open(ROOT / "SegmentationClass" / f"{names('val')[0]}.png") as image:
        palette = image.getpalette()
    assert palette is not None
    assert palette[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert palette[-3:] == [224, 224, 192]


@pytest.mark.parametrize("split", COUNTS)
def test_classes_are_balanced(split: str) -> None:
    count = [sum(name in labels(image) for image in names(split)) for name in CLASSES]
    assert min(count) > 0.6 * max(count)


def test_manifest_describes_every_image_and_its_labels() -> None:
    assert [row["image"] for row in manifest()] == [
        f"{name}.jpg" for split in COUNTS for name in names(split)
    ]
    for row in manifest():
        objects = row[OBJECTS].split(";")
        pasted = sorted(part.split("|")[1] for part in objects)
        assert pasted == sorted(labels(Path(row["image"]).stem))


def test_backgrounds_are_disjoint() -> None:
    photos = {s: {row["background"] for row in manifest() if row["split"] == s} for s in COUNTS}
    assert not photos["train"] & photos["val"]
    assert not photos["val_unseen"] & (photos["train"] | photos["val"])


def test_unseen_cutouts_and_families_are_nowhere_else() -> None:
    for field in (0, 2):  # key, family
        unseen = {part[field] for part in used("val_unseen")}
        assert not unseen & {part[field] for split in ("train", "val") for part in used(split)}


def test_val_repeats_training_cutouts() -> None:
    assert {part[0] for part in used("val")} <= {part[0] for part in used("train")}


def test_attribution_names_every_source() -> None:
    text = (MINIVOC / "ATTRIBUTION.md").read_text()
    assert "composite" in text
    assert "CC-BY-SA-3.0" in text
    for split in COUNTS:
        for key, _, _, source, *_ in used(split):
            assert f"`{key}`" in text
            assert source in text
    assert all(row["background"] in text for row in manifest())
    assert {p.name for p in (MINIVOC / "LICENSES").iterdir()} == {
        "scratch.copyright.txt",
        "sweethome3d-furniture.copyright.txt",
    }


def test_all_of_it_is_small() -> None:
    assert sum(p.stat().st_size for p in MINIVOC.rglob("*") if p.is_file()) <= 8_000_000
