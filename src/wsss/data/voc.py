"""Data in the VOC 2012 layout: split lists, image-level labels, masks.

``ROOT/{JPEGImages, Annotations, SegmentationClass, ImageSets/Segmentation}``; ROOT may be given
as that folder, as its parent ``VOCdevkit``, or as the parent of that.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.data.dataset import (
    ImageDataset,
    Sample,
    TrainTransform,
    check_class_names,
    check_files,
    multi_hot,
    same_spelling,
    spelling,
)
from wsss.data.images import read_mask
from wsss.data.table import read_table

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

LabelSource = Literal["xml", "mask"]


def find_voc_root(root: Path) -> Path:
    """Give the folder with ``JPEGImages``, given it, ``VOCdevkit`` or a folder that holds that.

    Raises:
        WSSSError: none of these places holds ``JPEGImages``.
    """
    root = root.expanduser()
    unpacked = Path("VOCtrainval_11-May-2012") / "VOCdevkit" / "VOC2012"
    for below in (Path(), Path("VOC2012"), Path("VOCdevkit/VOC2012"), unpacked):
        candidate = root / below
        if (candidate / "JPEGImages").is_dir():
            return candidate
    found = "holds no JPEGImages" if root.is_dir() else "is missing"
    raise WSSSError(
        f"data folder {root} {found}; expected VOCdevkit, VOCdevkit/VOC2012 or a folder in that "
        "layout, set data.root to where the data lies"
    )


def list_path(root: Path, split: str) -> Path:
    """Give the file behind a split."""
    if split.endswith(".txt"):
        return Path(split).expanduser()
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def read_names(path: Path, split: str) -> dict[str, int]:
    """Read a list, one name a line; empty lines are ignored.

    A name may hold blanks. Quotes around a line, as CVAT writes them then, are not part of it.

    Args:
        path: the file.
        split: what it is the list of, for the message.

    Returns:
        The names in their order, with the numbers of their lines.

    Raises:
        WSSSError: the list is missing, empty, not text, holds a NUL, or names an image twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "no list at all"
        mend = "put it there, name another split or give the path of a .txt file"
        if split == "train_aug":
            mend = (
                "`wsss data prepare voc` makes it with SBD; without SBD give data.train_split=train"
            )
        raise WSSSError(
            f"list {path} of split {split!r} is missing (its folder has {have}); {mend}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WSSSError(f"list {path} cannot be read as text ({error}); expected names") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if len(name) > 2 and name[0] == name[-1] == '"':
            name = name[1:-1]
        if "\0" in name:  # of UTF-16, for one; no file has such a name
            raise WSSSError(
                f"list {path} line {number} has a NUL character; save the list as UTF-8 text"
            )
        if name in seen:
            raise WSSSError(
                f"list {path} names {name!r} twice (lines {seen[name]} and {number}); remove one"
            )
        if name:
            seen[name] = number
    if not seen:
        raise WSSSError(f"list {path} is empty; expected one image name a line")
    return seen


def read_split(root: Path, split: str) -> list[str]:
    """Read the image names of a split, see `read_names`.

    Args:
        root: folder as returned by `find_voc_root`.
        split: name of a list in ``ImageSets/Segmentation``, or the path of a ``.txt`` file.

    Raises:
        WSSSError: as `read_names`, or a line is not one bare name.
    """
    path = list_path(root, split)
    names = read_names(path, split)
    for name, number in names.items():
        if "/" in name or "\\" in name:
            raise WSSSError(
                f"list {path} line {number} reads {name[:60]!r}; expected one image name a line, "
                "without folder or suffix"
            )
    return list(names)


def labels_from_xml(path: Path, class_names: Sequence[str]) -> NDArray[np.float32]:
    """Read image-level labels from a VOC annotation: every object counts, ``difficult`` ones too.

    This gives the labels of IRN's ``cls_labels.npy``, which the field trains on (field.md, C).

    Returns:
        float32 multi-hot vector (K,).

    Raises:
        WSSSError: the file is not XML or names an object outside `class_names`.
    """
    try:
        objects = ET.parse(path).getroot().iterfind("object")
        names = [(item.findtext("name") or "").strip() for item in objects]
    except (ET.ParseError, OSError, ValueError, LookupError) as error:  # also of its encoding
        raise WSSSError(
            f"annotation {path} cannot be read ({error}); expected VOC XML, copy it again"
        ) from error
    for name in names:
        if name not in class_names:
            alike = [known for known in class_names if spelling(known) == spelling(name)]
            pair = same_spelling([name, *alike])
            raise WSSSError(
                f"annotation {path} names the object {name!r}, which is none of the "
                f"{len(class_names)} classes{f' ({pair})' if pair else ''}; correct it or the "
                "class list"
            )
    return multi_hot(names, class_names)


def labels_from_mask(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.float32]:
    """Give the classes present in a mask (H, W) as a float32 multi-hot vector (K,)."""
    counts = np.bincount(mask.ravel(), minlength=256)
    return (counts[1 : num_classes + 1] > 0).astype(np.float32)


def labels_file(root: Path, source: LabelSource) -> Path:
    """Give the table in which `wsss data prepare voc` keeps the labels of all images."""
    return root / f"labels_{source}.csv"


def voc_samples(root: Path, split: str, mask_folder: str) -> list[Sample]:
    """Give the files that a list stands for; nothing but the list is read.

    Args:
        root: folder as returned by `find_voc_root`.
        split: see `read_split`.
        mask_folder: folder of index PNGs, relative to the root or absolute.
    """
    return [
        Sample(name, root / "JPEGImages" / f"{name}.jpg", root / mask_folder / f"{name}.png")
        for name in read_split(root, split)
    ]


def _label_origin(sample: Sample, root: Path, source: LabelSource) -> Path:
    if source == "xml":
        return root / "Annotations" / f"{sample.name}.xml"
    assert sample.mask is not None
    return sample.mask


def derive_labels(
    sample: Sample, root: Path, class_names: Sequence[str], source: LabelSource
) -> NDArray[np.float32]:
    """Give the labels (K,) of an image from its annotation or its mask.

    Raises:
        WSSSError: the file cannot be read, names an unknown class, or none at all.
    """
    path = _label_origin(sample, root, source)
    if source == "xml":
        labels = labels_from_xml(path, class_names)
    else:
        labels = labels_from_mask(read_mask(path, num_classes=len(class_names)), len(class_names))
    if not labels.any():
        raise WSSSError(
            f"{path} gives image {sample.name!r} no label; expected an object of one of the "
            f"{len(class_names)} classes, correct it or remove the image from the list (a table, "
            "data=table, may list images without an object)"
        )
    return labels


class VOCLabels:
    """Image-level labels of a VOC tree, image by image.

    They come from the table that `wsss data prepare voc` made where it is there (10,582 small
    files are slow to open), else from the annotations or masks themselves.

    Args:
        root: folder as returned by `find_voc_root`.
        class_names: the K foreground classes.
        source: ``xml`` or ``mask``.
    """

    def __init__(self, root: Path, class_names: Sequence[str], source: LabelSource) -> None:
        self.root, self.class_names, self.source = root, class_names, source
        self.path = labels_file(root, source)
        self.prepared: dict[str, tuple[str, ...]] | None = None
        if self.path.is_file():
            table = read_table(self.path, root, class_names)
            self.prepared = {row.sample.image.stem: row.labels for row in table.rows}

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Give the files from which labels will be read, the table aside."""
        if self.prepared is not None:
            return []
        return [_label_origin(sample, self.root, self.source) for sample in samples]

    def __call__(self, sample: Sample) -> NDArray[np.float32]:
        """Give the labels (K,) of an image.

        Raises:
            WSSSError: nothing to read them from, an unknown class, or no label at all.
        """
        if self.prepared is None:
            return derive_labels(sample, self.root, self.class_names, self.source)
        if not self.prepared.get(sample.name):
            raise WSSSError(
                f"{self.path} has no row of {sample.name!r} with a label; run `wsss data prepare "
                "voc` again, or remove the file"
            )
        return multi_hot(self.prepared[sample.name], self.class_names)


class VOCDataset(ImageDataset):
    """A split of a VOC-layout data set (see `ImageDataset` for its items).

    What can be checked without decoding an image is checked here, before any training: folders,
    list, one file per entry, labels. Errors of decoding name their file when it is read.

    Args:
        root: see `find_voc_root`.
        split: see `read_split`.
        class_names: the K foreground classes in the order of the mask ids 1..K.
        transform: see `ImageDataset`.
        with_mask: also read the masks; when False (and labels come from XML) none is ever opened.
        mask_folder: folder of index PNGs, relative to the root or absolute.
        label_source: ``xml`` (all objects of ``Annotations``) or ``mask`` (the classes in the
            masks of `mask_folder`, all of which are then read once, here).
        limit: keep only the first so many names of the list.
        seed: of the augmentation.

    Raises:
        WSSSError: one line that names the offending file.
    """

    def __init__(
        self,
        *,
        root: Path,
        split: str,
        class_names: Sequence[str],
        transform: TrainTransform | None = None,
        with_mask: bool = False,
        mask_folder: str = "SegmentationClass",
        label_source: LabelSource = "xml",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        root = find_voc_root(root)
        class_names = check_class_names(class_names)
        samples = voc_samples(root, split, mask_folder)[:limit]
        listed_in = list_path(root, split)
        check_files("image", [sample.image for sample in samples], listed_in)
        if with_mask:
            check_files("mask", [sample.mask for sample in samples if sample.mask], listed_in)
        if label_source not in ("xml", "mask"):
            raise WSSSError(f"label_source is {label_source!r}; expected 'xml' or 'mask'")
        labels_of = VOCLabels(root, class_names, label_source)
        kind = "annotation" if label_source == "xml" else "mask"
        check_files(kind, labels_of.files(samples), listed_in)
        super().__init__(
            samples=samples,
            labels=np.stack([labels_of(sample) for sample in samples]),
            class_names=class_names,
            transform=transform,
            with_mask=with_mask,
            seed=seed,
        )
