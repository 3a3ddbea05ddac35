"""One split as a torch data set, whatever layout its files lie in.

A layout (VOC, COCO, a custom table) only says which files belong together (`Sample`) and
which classes an image shows. Everything that reads pixels is here, once.
"""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from wsss.core.errors import WSSSError
from wsss.data.images import image_size, read_mask, read_rgb, read_saliency, with_long_side
from wsss.maps.pixels import IGNORE_INDEX, normalise

# names that mean "no class"; as a class, one of them would take the first id of the masks
NO_CLASS = ("background", "_background_", "__background__", "__ignore__")
# (image, generator), or with a `Guide` (image, generator, map)
TrainTransform = Callable[..., dict[str, Tensor]]


class Sample(NamedTuple):
    """Files of one image.

    Attributes:
        name: unique in its data set.
        image: the picture.
        mask: its class ids, or None where there are none (or where nobody is to see them).
    """

    name: str
    image: Path
    mask: Path | None


class Guide(NamedTuple):
    """Maps that training sees beside the images: saliency, or the masks of a second stage.

    Attributes:
        kind: what they are, for messages.
        paths: by image name.
        read: (path, size=(H, W), image=its path) -> uint8 (H, W).
        truth: whether they are ground truth, which shows the classes of the labels.
    """

    kind: str
    paths: dict[str, Path]
    read: Callable[..., NDArray[np.uint8]]
    truth: bool = False

    def map(self, sample: Sample, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Give the map (H, W) of an image."""
        return self.read(self.paths[sample.name], size=size, image=sample.image)


def saliency_guide(samples: Sequence[Sample], folder: Path, threshold: int) -> Guide:
    """Make a guide of saliency maps ``folder/NAME.png``, salient above grey level `threshold`."""
    paths = {sample.name: folder / f"{sample.name}.png" for sample in samples}
    return Guide("saliency map", paths, partial(read_saliency, threshold=threshold))


class ImageDataset(Dataset[dict[str, Any]]):
    """Images with image-level labels, for training or for evaluation.

    Without `transform`, an item holds ``image`` (3, H, W) normalised at native size, ``rgb``
    (H, W, 3) uint8, ``labels`` (K,) float32, ``name``, ``index``, and with `with_mask` also
    ``mask`` (H, W) int64, which is 255 (ignored) all over where an image has no mask. With
    `transform`, its tensors take the place of the first two.

    Args:
        samples: the files, in the order of the list.
        labels: (M, K) float32, multi-hot.
        class_names: the K foreground classes in the order of the mask ids 1..K.
        transform: called with the uint8 image and a generator that depends only on
            (seed, epoch, index), so that a sample is the same for any number of workers.
        with_mask: also read the masks. When False the dataset does not even know where they are:
            training on image-level labels cannot see one.
        seed: of the augmentation.
    """

    def __init__(
        self,
        *,
        samples: Sequence[Sample],
        labels: NDArray[np.float32],
        class_names: Sequence[str],
        transform: TrainTransform | None = None,
        with_mask: bool = False,
        seed: int = 0,
    ) -> None:
        if with_mask and transform is not None:
            raise ValueError("with_mask reads masks at native size, a transform would not fit them")
        self.samples = [s if with_mask else s._replace(mask=None) for s in samples]
        self.labels = labels
        self.class_names = check_class_names(class_names)
        self.transform = transform
        self.with_mask = with_mask
        self.seed = seed
        self.guide: Guide | None = None
        #: to which the transform's pictures and maps are resized before; None: their own size
        self.long_side: int | None = None
        self._mask_sha256: str | None = None

    def guided_by(self, guide: Guide) -> None:
        """Give the transform a third argument.

        Raises:
            WSSSError: an image has no map.
        """
        paths = [guide.paths[name] for name in self.names]
        check_files(guide.kind, paths, "the training list")
        self.guide = guide

    @property
    def names(self) -> list[str]:
        """Names of the images, in their order."""
        return [sample.name for sample in self.samples]

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Read one sample; `item` is an index, or (epoch, index) as the samplers give it."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rgb = read_rgb(self.samples[index].image)
        size = (rgb.shape[0], rgb.shape[1])
        sample: dict[str, Any]
        if self.transform is not None:
            stream = np.random.SeedSequence(self.seed, spawn_key=(epoch, index))
            given = [] if self.guide is None else [self.guide.map(self.samples[index], size)]
            if self.long_side is not None:
                rgb, *given = (with_long_side(each, self.long_side) for each in (rgb, *given))
            sample = dict(self.transform(rgb, np.random.default_rng(stream), *given))
        else:
            sample = {"image": normalise(rgb), "rgb": rgb}
        if self.with_mask:
            mask = self._mask(index, size)
            sample["mask"] = torch.from_numpy(mask.astype(np.int64))
        sample["labels"] = torch.from_numpy(self.labels[index])
        return sample | {"name": self.samples[index].name, "index": index}

    def _mask(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        sample = self.samples[index]
        if sample.mask is None:
            return np.full(size, IGNORE_INDEX, np.uint8)
        return read_mask(sample.mask, num_classes=self.num_classes, size=size, image=sample.image)

    def reduced_to(self, indices: NDArray[np.int64]) -> Self:
        """Keep some of the images, before anything else is asked of them; give itself back."""
        self.samples = [self.samples[index] for index in indices]
        self.labels = self.labels[indices]
        return self

    def check_contents(self) -> None:
        """Look into every file before training starts: headers of images, all of each mask.

        Raises:
            WSSSError: names the first file that cannot be used, or no mask shows any class.
        """
        digests = in_threads(self._digest, range(len(self)))
        self._mask_sha256 = _hash_lines(line for line, _ in digests)
        shown = {
            self._truth(index): ids
            for index, (_, ids) in enumerate(digests)
            if ids is not None and self.labels[index].any()
        }
        if shown and not any(ids - {0, IGNORE_INDEX} for ids in shown.values()):
            raise WSSSError(no_class_shown(shown, self.class_names, len(shown)))

    def _truth(self, index: int) -> Path | None:
        """Give the mask of an image that evaluation or a second stage sees."""
        sample = self.samples[index]
        return self.guide.paths[sample.name] if self.guide else sample.mask

    def mask_sha256(self) -> str | None:
        """Give a hash of names, sizes and class ids of all masks; None where there is none.

        It is of the decoded ids, so a mask set that was only compressed anew keeps its hash.
        """
        if not any(sample.mask for sample in self.samples):
            return None
        if self._mask_sha256 is None:
            digests = in_threads(self._digest, range(len(self)))
            self._mask_sha256 = _hash_lines(line for line, _ in digests)
        return self._mask_sha256

    def label_sha256(self) -> str:
        """Give a hash of names and labels."""
        return _hash_lines(
            label_line(name, row, self.class_names)
            for name, row in zip(self.names, self.labels, strict=True)
        )

    def sizes(self) -> list[tuple[int, int]]:
        """Give (height, width) of every image, from the headers."""
        return in_threads(lambda sample: image_size(sample.image), self.samples)

    def _digest(self, index: int) -> tuple[str, frozenset[int] | None]:
        """Give the line of a mask in the hash of all, and the ids in ground truth, if any."""
        sample = self.samples[index]
        size = image_size(sample.image)
        ids = None
        if self.guide is not None:
            guide = self.guide.map(sample, size)
            ids = ids_in(guide) if self.guide.truth else None
        if sample.mask is None:
            return f"{sample.name} -", ids
        mask = self._mask(index, size)
        return f"{sample.name} {mask_digest(mask)}", ids_in(mask)


def mask_digest(mask: NDArray[np.uint8]) -> str:
    """Give the sha256 of a mask's shape and ids."""
    header = f"{mask.shape[0]}x{mask.shape[1]}\n".encode()
    return hashlib.sha256(header + mask.tobytes()).hexdigest()


def ids_in(mask: NDArray[np.uint8]) -> frozenset[int]:
    """Give the values that occur in a mask, 0 and 255 too."""
    return frozenset(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())


def no_class_shown(
    masks: Mapping[Any, frozenset[int]], class_names: Sequence[str], count: int
) -> str:
    """Say what is wrong with masks that show no pixel of a class, and the mend.

    Args:
        masks: path -> values, of images that have a label.
        class_names: the K foreground classes.
        count: number of all masks of images that have a label.
    """
    values = sorted(frozenset[int]().union(*masks.values()))
    number = "none" if len(masks) == count else f"{len(masks)}"
    verb = "shows a" if len(masks) == count else "show no"
    text = (
        f"{number} of {count} masks of labelled images {verb} pixel of a class, "
        f"{next(iter(masks))} first: only {' and '.join(map(str, values))} occur"
    )
    if IGNORE_INDEX not in values:
        return f"{text}, and 0 is background; a pixel of {class_names[0]!r} must be 1"
    return (
        f"{text}, and {IGNORE_INDEX} means ignored, so that no such pixel is scored; write the "
        f"number of its class instead, 1 for {class_names[0]!r} (mask[mask == {IGNORE_INDEX}] = 1)"
    )


def label_line(name: str, labels: NDArray[np.float32], class_names: Sequence[str]) -> str:
    """Give a name with its classes, as hashes of labels are taken of it."""
    return " ".join([name, *present(labels, class_names)])


def _hash_lines(lines: Any) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def hash_names(names: Sequence[str]) -> str:
    """Give the sha256 of a list of names, one a line."""
    return _hash_lines(names)


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Map over items in threads (Pillow decodes without the interpreter's lock), in their order.

    The first exception ends the work.
    """
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def check_files(kind: str, paths: Sequence[Path], listed_in: Path | str) -> None:
    """Check that files exist, with one listing a folder (a stat per file is slow on NFS).

    Args:
        kind: what they are, for the message.
        paths: the files.
        listed_in: the list or table that names them.

    Raises:
        WSSSError: names the first missing one and how many are missing.
    """
    missing = missing_files(paths)
    if missing and not missing[0].parent.is_dir():
        raise WSSSError(
            f"{kind} folder {missing[0].parent} cannot be read (no such folder); expected one "
            f"{missing[0].suffix} file for each name in {listed_in}"
        )
    if missing:
        raise WSSSError(
            f"{kind} {missing[0]} is missing ({len(missing)} of {len(paths)} entries of "
            f"{listed_in} have none); {_near_file(missing[0])}add it or remove the entry"
        )


def _near_file(path: Path) -> str:
    """Name the file that a missing one may be meant to be, as the beginning of advice."""
    stem = spelling(path.stem)
    jpeg = (".jpg", ".jpeg")
    for other in sorted(path.parent.iterdir()):
        kinds = {other.suffix.lower(), path.suffix.lower()}
        if (spelling(other.stem) == stem and (len(kinds) == 1 or kinds <= {*jpeg})) or (
            other.name == path.stem  # a list with suffixes
        ):
            return f"there is {_visibly(other.name, path.name)}, name it so (case, suffix); "
    return "a list has one name a line and no further column; " if " " in path.stem else ""


def missing_files(paths: Sequence[Path]) -> list[Path]:
    """Give those of the files that do not exist, in their order."""
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        by_folder[path.parent].append(path)
    absent: set[Path] = set()
    for folder, members in by_folder.items():
        try:
            present = set(os.listdir(folder))
        except OSError:
            present = set()
        absent.update(path for path in members if path.name not in present)
    return [path for path in paths if path in absent]


def multi_hot(names: Sequence[str], class_names: Sequence[str]) -> NDArray[np.float32]:
    """Give class names as a float32 vector (K,); ValueError where one is not a class."""
    labels = np.zeros(len(class_names), np.float32)
    for name in names:
        labels[list(class_names).index(name)] = 1
    return labels


def present(labels: NDArray[np.float32], class_names: Sequence[str]) -> list[str]:
    """Give the names of the classes in a vector (K,); undoes `multi_hot`."""
    return [name for name, shown in zip(class_names, labels, strict=True) if shown]


def spelling(name: str) -> str:
    """Give what is left of a name without case, blanks, unseen characters and Unicode forms."""
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())
    return "".join(c for c in plain if not c.isspace() and unicodedata.category(c) != "Cf")


def _visibly(name: str, other: str) -> str:
    """Quote a name, with its code points where it would print like the other one."""
    forms = [unicodedata.normalize("NFC", text.lower()) for text in (name, other)]
    alike = forms[0] == forms[1] and name.lower() != other.lower()
    return ascii(name) if alike else repr(name)


def same_spelling(names: Iterable[str]) -> str | None:
    """Say which two of the names a reader would take for one; None where there are none."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(spelling(name), name)
        if first == name:
            continue
        what = "case or blanks"
        if _visibly(first, name) != repr(first) or _visibly(name, first) != repr(name):
            what = "Unicode form"
        elif first.lower() == name.lower():
            what = "case"
        return f"{_visibly(first, name)} and {_visibly(name, first)}, which differ only in {what}"
    return None


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Give the names as a tuple, or raise WSSSError if they cannot number a mask's ids."""
    names = tuple(class_names)
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise WSSSError(f"class_names holds {doubled[0]!r} twice; expected each class once")
    if not 0 < len(names) < IGNORE_INDEX:
        raise WSSSError(
            f"class_names holds {len(names)} classes; expected 1 to {IGNORE_INDEX - 1} "
            "(ids of an 8-bit mask)"
        )
    if wrong := wrong_names(names):
        raise WSSSError(f"class_names {wrong}")
    return names


def wrong_names(names: Sequence[str]) -> str | None:
    """Say what is wrong with the names of classes one by one, with the mend; None if nothing."""
    if pair := same_spelling(names):
        return f"holds the classes {pair}; unite them, or rename one"
    for name in names:
        if spelling(name) in NO_CLASS:
            return (
                f"holds {name!r}, which is no class: it is id 0 without being listed; leave it out "
                "(an image that shows none of the classes has an empty labels cell)"
            )
        if not spelling(name) or any(unicodedata.category(c) == "Cc" for c in name):
            return f"holds {name!r}, which cannot be printed; rename it"
    return None
