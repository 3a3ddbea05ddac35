"""Data in the VOC 2012 layout: split lists, image-level labels, masks.

``ROOT/{JPEGImages, Annotations, SegmentationClass, ImageSets/Segmentation}``; ROOT may be given
as that folder, as its parent ``VOCdevkit``, or as the parent of that.
"""

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from wsss.data.images import IGNORE_INDEX, image_size, normalise, read_mask, read_rgb
from wsss.errors import WSSSError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

# (image, generator), or where masks are trained on (image, generator, mask)
TrainTransform = Callable[..., dict[str, Tensor]]


def find_voc_root(root: Path) -> Path:
    """Returns the folder with ``JPEGImages``, given it, ``VOCdevkit`` or VOCdevkit's parent.

    Raises:
        WSSSError: none of the three holds ``JPEGImages``.
    """
    root = root.expanduser()
    for candidate in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (candidate / "JPEGImages").is_dir():
            return candidate
    found = "holds no JPEGImages" if root.is_dir() else "is missing"
    raise WSSSError(
        f"data folder {root} {found}; expected VOCdevkit, VOCdevkit/VOC2012 or a folder in that "
        "layout, set data.root to where the data lies"
    )


def _list_path(root: Path, split: str) -> Path:
    if split.endswith(".txt"):
        return Path(split).expanduser()
    return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def read_split(root: Path, split: str) -> list[str]:
    """Reads the image names of a split, one a line; empty lines are ignored.

    Args:
        root: folder as returned by `find_voc_root`.
        split: name of a list in ``ImageSets/Segmentation``, or the path of a ``.txt`` file.

    Raises:
        WSSSError: the list is missing, empty, not text, names an image twice, or a line is not
            one bare name.
    """
    path = _list_path(root, split)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "no list at all"
        raise WSSSError(
            f"list {path} of split {split!r} is missing (its folder has {have}); put it there, "
            "name another split or give the path of a .txt file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WSSSError(f"list {path} cannot be read as text ({error}); expected names") from error
    names: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if len(name.split()) != 1 or "/" in name or "\\" in name:
            raise WSSSError(
                f"list {path} line {number} reads {name[:60]!r}; expected one image name a line, "
                "without folder or suffix"
            )
        if name in seen:
            raise WSSSError(
                f"list {path} names {name!r} twice (lines {seen[name]} and {number}); remove one"
            )
        seen[name] = number
        names.append(name)
    if not names:
        raise WSSSError(f"list {path} is empty; expected one image name a line")
    return names


def labels_from_xml(path: Path, class_names: Sequence[str]) -> NDArray[np.float32]:
    """Reads image-level labels from a VOC annotation: every object counts, ``difficult`` ones too.

    This gives the labels of IRN's ``cls_labels.npy``, which the field trains on (field.md, C).

    Returns:
        float32 multi-hot vector (K,).

    Raises:
        WSSSError: the file is not XML or names an object outside `class_names`.
    """
    labels = np.zeros(len(class_names), np.float32)
    try:
        objects = ET.parse(path).getroot().iterfind("object")
        names = [(item.findtext("name") or "").strip() for item in objects]
    except (ET.ParseError, OSError, UnicodeDecodeError) as error:
        raise WSSSError(
            f"annotation {path} cannot be read ({error}); expected VOC XML, copy it again"
        ) from error
    for name in names:
        if name not in class_names:
            raise WSSSError(
                f"annotation {path} names the object {name!r}, which is none of the "
                f"{len(class_names)} classes; correct it or the class list"
            )
        labels[class_names.index(name)] = 1
    return labels


def labels_from_mask(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.float32]:
    """Returns the classes present in a mask (H, W) as a float32 multi-hot vector (K,)."""
    counts = np.bincount(mask.ravel(), minlength=256)
    return (counts[1 : num_classes + 1] > 0).astype(np.float32)


class VOCDataset(Dataset[dict[str, Any]]):
    """A split of a VOC-layout data set.

    What can be checked without decoding an image is checked here, before any training: folders,
    list, one file per entry, labels. Errors of decoding name their file when it is read.

    Without `transform`, an item holds ``image`` (3, H, W) normalised at native size, ``rgb``
    (H, W, 3) uint8, ``labels`` (K,) float32, ``name``, ``index``, and with `with_mask` also
    ``mask`` (H, W) int64. With `transform`, its tensors take the place of the first two.

    Args:
        root: see `find_voc_root`.
        split: see `read_split`.
        class_names: the K foreground classes in the order of the mask ids 1..K.
        transform: called with the uint8 image and a generator that depends only on
            (seed, epoch, index), so that a sample is the same for any number of workers.
        with_mask: also read the mask. When False (and labels come from XML) no mask is ever
            opened: training on image-level labels cannot see one.
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
        label_source: Literal["xml", "mask"] = "xml",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if with_mask and transform is not None:
            raise ValueError("with_mask reads masks at native size, a transform would not fit them")
        self.root = find_voc_root(root)
        self.split = split
        self.class_names = check_class_names(class_names)
        self.names = read_split(self.root, split)[:limit]
        self.transform = transform
        self.with_mask = with_mask
        self.mask_folder = self.root / mask_folder
        self.seed = seed
        self._check_files("image", self.root / "JPEGImages", ".jpg")
        if with_mask or label_source == "mask":
            self._check_files("mask", self.mask_folder, ".png")
        if label_source == "xml":
            self._check_files("annotation", self.root / "Annotations", ".xml")
        elif label_source != "mask":
            raise WSSSError(f"label_source is {label_source!r}; expected 'xml' or 'mask'")
        self.labels = self._read_labels(label_source)

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.class_names)

    def train_on_masks(self, folder: Path) -> None:
        """Gives the transform masks too: pseudo labels, or the ground truth.

        Args:
            folder: of index PNGs; image-level labels stay those of the list.

        Raises:
            WSSSError: an image has none there.
        """
        self._check_files("mask", folder, ".png")
        self.mask_folder, self.with_mask = folder, True

    def _check_files(self, kind: str, folder: Path, suffix: str) -> None:
        """Compares the list with one listing of the folder (a stat per file is slow on NFS)."""
        list_path = _list_path(self.root, self.split)
        try:
            present = set(os.listdir(folder))
        except OSError as error:
            raise WSSSError(
                f"{kind} folder {folder} cannot be read ({error.strerror}); expected one {suffix} "
                f"file for each name in {list_path}"
            ) from None
        missing = [name for name in self.names if name + suffix not in present]
        if missing:
            raise WSSSError(
                f"{kind} {folder / (missing[0] + suffix)} is missing ({len(missing)} of "
                f"{len(self.names)} entries of {list_path} have none); add it or remove the entry"
            )

    def _read_labels(self, source: str) -> NDArray[np.float32]:
        labels = np.empty((len(self.names), self.num_classes), np.float32)
        for index, name in enumerate(self.names):
            if source == "xml":
                path = self.root / "Annotations" / f"{name}.xml"
                labels[index] = labels_from_xml(path, self.class_names)
            else:
                path = self.mask_folder / f"{name}.png"
                mask = read_mask(path, num_classes=self.num_classes)
                labels[index] = labels_from_mask(mask, self.num_classes)
            if not labels[index].any():
                raise WSSSError(
                    f"{path} gives image {name!r} no label; expected an object of one of the "
                    f"{self.num_classes} classes, correct it or remove the image from "
                    f"{_list_path(self.root, self.split)}"
                )
        return labels

    def check_contents(self) -> None:
        """Looks into every file before training starts: headers of images, all of each mask.

        Raises:
            WSSSError: names the first file that cannot be used.
        """
        for name in self.names:
            size = image_size(self.root / "JPEGImages" / f"{name}.jpg")
            if self.with_mask:
                path = self.mask_folder / f"{name}.png"
                read_mask(path, num_classes=self.num_classes, size=size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Reads one sample; `item` is an index, or (epoch, index) as the samplers give it."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        name = self.names[index]
        rgb = read_rgb(self.root / "JPEGImages" / f"{name}.jpg")
        mask = None
        if self.with_mask:
            path = self.mask_folder / f"{name}.png"
            mask = read_mask(path, num_classes=self.num_classes, size=(rgb.shape[0], rgb.shape[1]))
        sample: dict[str, Any]
        if self.transform is not None:
            stream = np.random.SeedSequence(self.seed, spawn_key=(epoch, index))
            given = () if mask is None else (mask,)
            sample = dict(self.transform(rgb, np.random.default_rng(stream), *given))
        else:
            sample = {"image": normalise(rgb), "rgb": rgb}
            if mask is not None:
                sample["mask"] = torch.from_numpy(mask.astype(np.int64))
        sample["labels"] = torch.from_numpy(self.labels[index])
        return sample | {"name": name, "index": index}


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names as a tuple, or raises WSSSError if they cannot number a mask's ids."""
    names = tuple(class_names)
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise WSSSError(f"class_names holds {doubled[0]!r} twice; expected each class once")
    if not 0 < len(names) < IGNORE_INDEX:
        raise WSSSError(
            f"class_names holds {len(names)} classes; expected 1 to {IGNORE_INDEX - 1} "
            "(ids of an 8-bit mask)"
        )
    return names
