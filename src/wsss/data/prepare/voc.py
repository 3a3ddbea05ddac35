"""`wsss data prepare voc`: the field's VOC 2012 from what the official downloads hold.

The field trains on 10,582 images: VOC's 1,464 and those of SBD (Hariharan et al. 2011), minus
VOC's 1,449 of val (field.md, C). The folder ``SegmentationClassAug`` that goes round with it is
made here from SBD's own ``.mat`` files and VOC's PNGs, VOC's taking precedence.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.core.lock import lock
from wsss.data.dataset import Sample, check_files, in_threads, present
from wsss.data.images import image_size, mask_png, read_mask
from wsss.data.prepare.common import TableRow, run_all, table_text, write_text
from wsss.data.voc import (
    VOC_CLASSES,
    LabelSource,
    derive_labels,
    labels_file,
    list_path,
    read_split,
)

OFFICIAL = {"train": 1464, "val": 1449, "test": 1456, "train_aug": 10582}
AUG = "SegmentationClassAug"
SBD_FOLDERS = (
    "SBD",
    "sbd",
    "benchmark_RELEASE",
    "SBD/benchmark_RELEASE",
    "benchmark/benchmark_RELEASE",
)


class MaskJob(NamedTuple):
    """One mask to make: of VOC's PNG where there is one, else of SBD's file."""

    image: Path
    source: Path
    target: Path


def prepare_voc(
    root: Path, *, sbd: str | None = None, labels: LabelSource = "xml", jobs: int | None = None
) -> int:
    """Make masks, list and labels that are missing; what is there already stays.

    Args:
        root: folder with ``JPEGImages``.
        sbd: see `VOCArguments`.
        labels: where image-level labels come from.
        jobs: processes.

    Returns:
        The exit status, 0.

    Raises:
        WSSSError: something is missing, broken, or contradicts what is there.
    """
    with lock(root, "preparing"):
        return _prepare(root, sbd, labels, jobs)


def _prepare(root: Path, sbd: str | None, labels: LabelSource, jobs: int | None) -> int:
    lists = {split: read_split(root, split) for split in ("train", "val")}
    if list_path(root, "test").is_file():
        lists["test"] = read_split(root, "test")
    sbd_names, sbd_folder = _sbd_names(root, sbd)
    without = sbd is not None and sbd.lower() == "none"
    masks = "SegmentationClass" if without else AUG
    made = 0
    if not without:
        lists["train_aug"] = sorted({*lists["train"], *sbd_names} - {*lists["val"]})
        _check_list(root, lists["train_aug"])
    _check_disjoint(lists)
    text = _labels_table(root, lists, labels, masks) if labels == "xml" else ""
    if not without:
        made = _make_masks(root, lists, sbd_folder, jobs)
    text = text or _labels_table(root, lists, labels, masks)
    notes = {split: "VOC's own" for split in lists}
    if not without:
        notes["train_aug"] = _write_list(root, lists["train_aug"])
        notes["train_aug"] += f"; {made:,} masks made in {AUG}"
    path = labels_file(root, labels)
    state = write_text(path, text)
    _report(root, lists, notes)
    print(f"labels ({labels}) in {path}: {state}")
    return 0


def find_sbd(root: Path, given: str | None) -> Path | None:
    """Give the folder with SBD's ``cls`` and lists, or None where there is none.

    Raises:
        WSSSError: `given` holds no SBD.
    """
    if given is not None:
        places = [Path(given).expanduser(), Path(given).expanduser() / "benchmark_RELEASE"]
    else:
        places = [base / name for base in (root, *root.parents[:2]) for name in SBD_FOLDERS]
    for place in places:
        for folder in (place, place / "dataset"):
            if (folder / "cls").is_dir() and (folder / "train.txt").is_file():
                return folder
    if given is not None:
        raise WSSSError(
            f"sbd={given}: holds no cls/ and train.txt; expected SBD's benchmark_RELEASE/dataset "
            "as unpacked from its benchmark.tgz, or sbd=none"
        )
    return None


def _sbd_names(root: Path, given: str | None) -> tuple[set[str], Path | None]:
    """Read the names of SBD, from its lists or from a folder of masks that somebody made before."""
    if given is not None and given.lower() == "none":
        return set(), None
    folder = find_sbd(root, given)
    if folder is not None:
        lists = [str(folder / name) for name in ("train.txt", "val.txt")]
        return {name for path in lists for name in read_split(root, path)}, folder
    made = {path.stem for path in (root / AUG).glob("[!.]*.png")}
    if not made:
        raise WSSSError(
            f"neither SBD nor {root / AUG} is there; unpack SBD's benchmark.tgz beside {root} or "
            "give sbd=FOLDER, or sbd=none for VOC's own 1,464 training images"
        )
    return made, None


def _make_masks(root: Path, lists: dict[str, list[str]], sbd: Path | None, jobs: int | None) -> int:
    """Fill ``SegmentationClassAug``, and give how many were missing."""
    from_voc = {*lists["train"], *lists["val"]}
    todo = []
    for name in sorted({*lists["train_aug"], *lists["val"]}):
        target = root / AUG / f"{name}.png"
        if name in from_voc:
            source = root / "SegmentationClass" / f"{name}.png"
        else:
            source = sbd / "cls" / f"{name}.mat" if sbd else target
        todo.append(MaskJob(root / "JPEGImages" / f"{name}.jpg", source, target))
    check_files("image", [job.image for job in todo], list_path(root, "train_aug"))
    there = {path.name for path in (root / AUG).glob("[!.]*.png")}
    todo = [job for job in todo if job.target.name not in there]
    check_files("mask", [job.source for job in todo], list_path(root, "train_aug"))
    run_all(_make_mask, todo, description=f"making {AUG}", jobs=jobs)
    return len(todo)


def _make_mask(job: MaskJob) -> None:
    size = image_size(job.image)
    if job.source.suffix == ".png":
        read_mask(job.source, num_classes=len(VOC_CLASSES), size=size, image=job.image)
        content = job.source.read_bytes()
    else:
        mask = read_sbd_mask(job.source)
        if mask.shape != size:
            raise WSSSError(
                f"{job.source} is {mask.shape[1]}x{mask.shape[0]} (width x height) but "
                f"{job.image} is {size[1]}x{size[0]}; expected SBD and VOC of the same images"
            )
        content = mask_png(mask)
    write_atomically(job.target, content)


def read_sbd_mask(path: Path) -> NDArray[np.uint8]:
    """Read the class ids of one of SBD's ``cls/*.mat`` (``GTcls.Segmentation``).

    Returns:
        uint8 (H, W), 0..20; SBD marks no void.

    Raises:
        WSSSError: truncated, no MATLAB file, or without these ids.
    """
    from scipy.io import loadmat  # half a second of import that nothing else needs

    try:
        mask = loadmat(str(path), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except FileNotFoundError:
        raise WSSSError(f"{path} is missing; unpack SBD again") from None
    except Exception as error:  # scipy raises whatever its parsing runs into
        raise WSSSError(
            f"{path} is no SBD annotation ({type(error).__name__}: {' '.join(str(error).split())});"
            " expected GTcls.Segmentation, unpack SBD again"
        ) from error
    ids = np.asarray(mask)
    if ids.ndim != 2 or not np.isin(ids, np.arange(len(VOC_CLASSES) + 1)).all():
        raise WSSSError(
            f"{path} holds an array of shape {ids.shape} with other ids than 0..20; expected SBD's "
            "GTcls.Segmentation, unpack SBD again"
        )
    return ids.astype(np.uint8)


def _check_disjoint(lists: dict[str, list[str]]) -> None:
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    for first, second in [*pairs, ("train_aug", "val"), ("train_aug", "test")]:
        shared = sorted({*lists.get(first, ())} & {*lists.get(second, ())})
        if shared:
            raise WSSSError(
                f"the lists {first} and {second} share {len(shared)} images, {shared[0]!r} among "
                "them; expected none, unpack VOC's lists again"
            )


def _check_list(root: Path, names: list[str]) -> None:
    """Check the train_aug.txt that is there, in whatever order."""
    path = list_path(root, "train_aug")
    if not path.is_file():
        return
    there = {*read_split(root, "train_aug")}
    if there != {*names}:
        raise WSSSError(
            f"{path} lacks {len({*names} - there)} images of (VOC train + SBD) minus val and has "
            f"{len(there - {*names})} others; rename it to have it written anew"
        )


def _write_list(root: Path, names: list[str]) -> str:
    """Write train_aug.txt unless it is there."""
    path = list_path(root, "train_aug")
    if path.is_file():
        return "as it was"
    return write_text(path, "".join(f"{name}\n" for name in names))


def _labels_table(root: Path, lists: dict[str, list[str]], source: LabelSource, masks: str) -> str:
    """Give the table of image-level labels of everything but test."""
    names = sorted({name for split in lists if split != "test" for name in lists[split]})

    def row(name: str) -> TableRow:
        image = root / "JPEGImages" / f"{name}.jpg"
        sample = Sample(name, image, root / masks / f"{name}.png")
        labels = present(derive_labels(sample, root, VOC_CLASSES, source), VOC_CLASSES)
        return TableRow(image.relative_to(root).as_posix(), labels, None, None)

    return table_text(in_threads(row, names))


def _report(root: Path, lists: dict[str, list[str]], notes: dict[str, str]) -> None:
    table = Table(title=str(root), title_justify="left")
    for heading in ("list", "images", "official", ""):
        table.add_column(heading, justify="right" if heading in ("images", "official") else "left")
    for split, official in OFFICIAL.items():
        if split not in lists:
            table.add_row(split, "-", f"{official:,}", "not there")
            continue
        differs = "" if len(lists[split]) == official else "  (differs)"
        table.add_row(split, f"{len(lists[split]):,}", f"{official:,}", notes[split] + differs)
    Console().print(table)
    print("train_aug, val and test share no image")
    if "train_aug" not in lists:
        print("without SBD: give data.train_split=train data.train_mask_folder=SegmentationClass")
