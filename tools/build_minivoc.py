"""Build MiniVOC, the small composite data set that ships with wsss.

MiniVOC is a *composite*: photographic and rendered cut-outs pasted on photographs, in the folder
layout of Pascal VOC 2012. It is made from a fixed seed; the same packages give the same bytes.

    python tools/build_minivoc.py --debs CACHE --out src/wsss/data/minivoc
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from cutouts import (
    CLASSES,
    SOLID_ALPHA,
    CutOut,
    Media,
    Placement,
    composite,
    load_media,
    solid_area,
    unpack_debs,
    warp,
)
from PIL import Image

SIZE = 160
SPLITS = {"train": 600, "val": 200, "val_unseen": 200}
OBJECT_COUNTS = (0.35, 0.40, 0.25)  # probability of one, two, three objects
MAIN_SIDE = (0.40, 0.85)  # longer side as a share of the image
OTHER_SIDE = (0.30, 0.60)
MIN_VISIBLE = 0.35
MIN_PIXELS = 150
MAX_SCALE = 1.8  # a 100 px costume drawn larger than this looks blurred
JPEG_QUALITY = 77  # keeps the whole set below 8 MB
TILTS = {"bottle": 12, "person": 12, "chair": 8, "pottedplant": 6}  # degrees; others 4


@dataclass(frozen=True)
class Composite:
    """One finished image with what it was made of."""

    image: np.ndarray
    mask: np.ndarray
    background: str
    placements: list[Placement]


def voc_palette() -> list[int]:
    """Give the VOC colour map as 768 values."""
    values = []
    for index in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        values += rgb
    return values


def crop_background(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of a photo, flip it at random and light it a little.

    Args:
        photo: uint8 ``(h, w, 3)``.
        rng: source of randomness.

    Returns:
        uint8 ``(SIZE, SIZE, 3)``.
    """
    height, width = photo.shape[:2]
    side = int(rng.uniform(0.55, 1.0) * min(height, width))
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    crop = cv2.resize(photo[y : y + side, x : x + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    lit = crop.astype(np.float32) * rng.uniform(0.85, 1.15, 3) + rng.uniform(-12, 12)
    return np.clip(lit, 0, 255).astype(np.uint8)


def place(cutout: CutOut, sides: tuple[float, float], rng: np.random.Generator) -> Placement:
    """Choose size, place and light for one object, at most a tenth of it outside the image."""
    height, width = cutout.rgba.shape[:2]
    scale = min(rng.uniform(*sides) * SIZE / max(height, width), MAX_SCALE)
    half = np.array((width, height)) * scale / 2
    low = np.minimum(half * 0.8, SIZE / 2)
    centre = rng.uniform(low, SIZE - low)
    tilt = TILTS.get(CLASSES[cutout.label - 1], 4)
    return Placement(
        cutout,
        centre=(float(centre[0]), float(centre[1])),
        scale=float(scale),
        angle=float(rng.uniform(-tilt, tilt)),
        flip=bool(rng.random() < 0.5),
        gain=tuple(float(g) for g in rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)),
        offset=float(rng.uniform(-12, 12)),
    )


def soften(layer: np.ndarray) -> np.ndarray:
    """Blur a premultiplied layer's border by under a pixel; costumes have 1-bit alpha."""
    return cv2.GaussianBlur(layer, (3, 3), 0.6)


def render(
    chosen: list[CutOut], name: str, photo: np.ndarray, rng: np.random.Generator
) -> Composite:
    """Paste the chosen objects, the first of them the main one, until all can be seen.

    Args:
        chosen: one to three cut-outs.
        name: name of the background.
        photo: uint8 ``(h, w, 3)``.
        rng: source of randomness.

    Returns:
        The composite. Every object shows at least a third and 150 pixels of itself.

    Raises:
        RuntimeError: no layout in 200 tries showed every object.
    """
    background = crop_background(photo, rng)
    for _ in range(200):
        placements = [place(c, OTHER_SIDE if i else MAIN_SIDE, rng) for i, c in enumerate(chosen)]
        placements = [placements[i] for i in rng.permutation(len(placements))]
        layers = [soften(warp(p, SIZE)) for p in placements]
        labels = [p.cutout.label for p in placements]
        image, mask, visible = composite(background, layers, labels)
        whole = [solid_area(p.cutout) * p.scale**2 for p in placements]
        if all(v >= max(MIN_PIXELS, MIN_VISIBLE * w) for v, w in zip(visible, whole, strict=True)):
            return Composite(image, mask, name, placements)
    raise RuntimeError(f"no layout shows {[c.key for c in chosen]}")


def make_split(media: Media, split: str, count: int, seed: int) -> list[Composite]:
    """Make one split; the main class cycles and each class cycles through its cut-outs."""
    rng = np.random.default_rng((seed, sorted(SPLITS).index(split)))
    pool = media.pool(unseen=split == "val_unseen")
    groups = [[c for c in pool if c.label == label] for label in range(1, len(CLASSES) + 1)]
    queues: list[list[CutOut]] = [[] for _ in groups]
    photos = sorted(media.photos(split).items())

    def draw(group: int) -> CutOut:
        if not queues[group]:
            queues[group] = [groups[group][i] for i in rng.permutation(len(groups[group]))]
        return queues[group].pop()

    result = []
    for i in range(count):
        extra = int(rng.choice(len(OBJECT_COUNTS), p=OBJECT_COUNTS))
        classes = [i % len(groups), *rng.integers(len(groups), size=extra)]
        name, photo = photos[int(rng.integers(len(photos)))]
        result.append(render([draw(int(c)) for c in classes], name, photo, rng))
    return result


def boxes(item: Composite) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Give class name and VOC box (1-based, inclusive) of each object's visible part.

    Where two objects of one class overlap, the lower one's box may include pixels of the upper.
    """
    found = []
    for p in item.placements:
        own = (soften(warp(p, SIZE))[..., 3] >= SOLID_ALPHA) & (item.mask == p.cutout.label)
        ys, xs = np.nonzero(own)
        box = (int(xs.min()) + 1, int(ys.min()) + 1, int(xs.max()) + 1, int(ys.max()) + 1)
        found.append((CLASSES[p.cutout.label - 1], box))
    return found


def annotation(name: str, item: Composite) -> str:
    """Give the VOC XML of one composite."""
    objects = "".join(
        f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{b[0]}</xmin>"
        f"<ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for label, b in boxes(item)
    )
    return (
        f"<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename><size><width>{SIZE}"
        f"</width><height>{SIZE}</height><depth>3</depth></size>{objects}</annotation>\n"
    )


def save(root: Path, name: str, item: Composite) -> None:
    """Write image, mask and annotation of one composite."""
    Image.fromarray(item.image).save(
        root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY, optimize=True
    )
    mask = Image.frombytes("P", (SIZE, SIZE), item.mask.tobytes())
    mask.putpalette(voc_palette())
    mask.save(root / "SegmentationClass" / f"{name}.png", optimize=True)
    (root / "Annotations" / f"{name}.xml").write_text(annotation(name, item))


def manifest_row(name: str, split: str, item: Composite) -> list[str]:
    """Give one manifest line: image, split, background, and the objects bottom to top."""
    objects = ";".join(
        f"{p.cutout.key}|{CLASSES[p.cutout.label - 1]}|{p.cutout.family}|{p.cutout.source}"
        f"|{p.centre[0]:.1f}|{p.centre[1]:.1f}|{p.scale:.3f}"
        for p in item.placements
    )
    return [f"{name}.jpg", split, item.background, objects]


def build(media: Media, out: Path, seed: int) -> set[str]:
    """Write the images below ``out``, in place of older ones; give the keys it used."""
    used: set[str] = set()
    root = out / "VOC2012"
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    with (out / "manifest.csv").open("w", newline="") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(["image", "split", "background", "key|class|family|source|x|y|scale"])
        for split, count in SPLITS.items():
            names = []
            for i, item in enumerate(make_split(media, split, count, seed), 1):
                names.append(f"mini_{split}_{i:04d}")
                save(root, names[-1], item)
                used |= {p.cutout.key for p in item.placements}
                table.writerow(manifest_row(names[-1], split, item))
            listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
            listing.write_text("\n".join(names) + "\n")
    return used


def attribution(media: Media, used: set[str]) -> str:
    """Give ATTRIBUTION.md: licence, sources, and the author of every cut-out in the set."""
    rows = [
        f"| `{c.key}` | {CLASSES[c.label - 1]} | {c.source} | {c.creator} | {c.licence} |"
        for _, c in sorted(media.cutouts.items())
        if c.key in used
    ]
    packages = ", ".join(f"`{name}` {version}" for name, version in media.versions.items())
    photos = ", ".join(sorted(media.backgrounds))
    return "\n".join(
        [
            "# MiniVOC: sources and licence",
            "",
            "MiniVOC is a **composite**: cut-outs pasted on photos by `tools/build_minivoc.py`.",
            "It has the folder layout of Pascal VOC 2012 and eight of its class names; it is not",
            "Pascal VOC and holds none of its images. It is an adaptation of works, some under",
            "CC-BY-SA-3.0, and as a whole licensed under **CC-BY-SA-3.0**, unlike the program.",
            "",
            f"Media from the Debian packages {packages}.",
            "Their copyright files, with the full licence",
            "texts, are in `LICENSES/`. Changes made: objects cropped, resized, turned, mirrored,",
            "recoloured and pasted; backgrounds cropped, mirrored and recoloured.",
            "",
            "- `scratch`: media of Scratch 1.4, Copyright (c) 2011 Massachusetts Institute of",
            "  Technology, CC-BY-SA-3.0. Photographs of people and cars, and all backgrounds:",
            f"  {photos}.",
            "- `sweethome3d-furniture`: renders of 3D models by library:",
            "  - BlendSwap-CC-0: Emmanuel Puybaret / eTeks and Blend Swap contributors, CC0.",
            "  - BlendSwap-CC-BY: the Blend Swap contributors named below, CC-BY-3.0.",
            "  - KatorLegaz: 2003-2008 Andrew Kator & Jennifer Legaz, CC-BY-3.0 US.",
            "  - Reallusion: 2008-2011 Reallusion (http://www.reallusion.com), CC-BY-3.0 US.",
            "  - Scopia: 2010-2012 Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es),",
            "    CC-BY-3.0.",
            "",
            "| cut-out | class | source | author as the source names it | licence |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def write_licences(media: Media, debs: Path, out: Path, used: set[str]) -> None:
    """Write ATTRIBUTION.md and copy the packages' copyright files, licence texts included."""
    (out / "ATTRIBUTION.md").write_text(attribution(media, used))
    (out / "LICENSES").mkdir(exist_ok=True)
    root, _ = unpack_debs(debs)
    for package in media.versions:
        source = root / "usr/share/doc" / package / "copyright"
        shutil.copyfile(source, out / "LICENSES" / f"{package}.copyright.txt")


def digest(out: Path) -> str:
    """Hash the names and bytes of everything the builder writes: one sha256."""
    total = hashlib.sha256()
    for path in [out / "manifest.csv", *sorted((out / "VOC2012").rglob("*"))]:
        if path.is_file():
            total.update(str(path.relative_to(out)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def main() -> None:
    """Build the data set that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--debs",
        type=Path,
        default=Path.home() / ".cache" / "wsss-debs",
        help="folder for the two Debian packages; filled when it lacks them",
    )
    parser.add_argument("--out", type=Path, required=True, help="data set folder to (re)write")
    parser.add_argument("--seed", type=int, default=2012)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    media = load_media(args.debs)
    write_licences(media, args.debs, args.out, build(media, args.out, args.seed))
    files = [p for p in args.out.rglob("*") if p.is_file()]
    print(f"{sum(p.stat().st_size for p in files) / 1e6:.2f} MB, sha256 {digest(args.out)}")


if __name__ == "__main__":
    main()
