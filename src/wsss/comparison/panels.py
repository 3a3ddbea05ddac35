"""Pictures of the same images under every method, made by the functions that are scored."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from wsss.comparison.compare import Comparison
from wsss.comparison.entries import MIOUS, Entry
from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.modes import evaluating
from wsss.evaluation.folders import find_files, read_class_maps, read_label_map
from wsss.evaluation.holdout import Holdout
from wsss.evaluation.inference import (
    localise,
    predict,
    predicted_labels,
    pseudo_label,
    refinement,
    resized,
    smoothed_label,
)
from wsss.evaluation.per_image import mean_iou
from wsss.evaluation.protocol import Protocol
from wsss.evaluation.watched import HOLDOUT
from wsss.maps.pseudo_labels import cam_to_label
from wsss.results.gallery import faded, heated, overlay, painted
from wsss.results.store import MAP_NAMES
from wsss.runs.folder import Run, build_data, load_run
from wsss.runs.stored import check_stored

LONGEST = 400  # side of a picture in the report, in pixels
LONGEST_CAM = 160  # of a heat map, which is smooth


@dataclass(frozen=True)
class Maps:
    """What a method says about one image.

    Attributes:
        label: (H, W) class ids, 255 where undecided.
        cams: (K, H, W) in [0, 1], or None where only label maps exist.
    """

    label: NDArray[np.uint8]
    cams: NDArray[np.float32] | None


def open_dataset(entry: Entry, trust: Sequence[str] = ()) -> Any:
    """Open the split of an entry with its images and masks.

    Args:
        entry: a run of ours, or a folder's results.
        trust: packages beside ``wsss`` whose classes it may name; their code is run.

    Raises:
        WSSSError: the data is not where the run found it, or not what it was.
    """
    config = check_stored(entry.results["config"], str(entry.folder), trust)
    if "data" not in config:
        raise WSSSError(f"{entry.folder}: its configuration has no data")
    data = build_data(config, for_training=False)
    if entry.split == HOLDOUT:
        dataset: Any = Holdout(data, _protocol(entry))
    else:
        dataset = data.eval_dataset(entry.split)
    if list(dataset.names) != entry.cells["names"]:
        raise WSSSError(f"{data.root}: its {entry.split} holds other images than were evaluated")
    return dataset


def _protocol(entry: Entry) -> Protocol:
    """Read the protocol of an entry's configuration.

    Raises:
        WSSSError: it is none.
    """
    try:
        return Protocol(**entry.results["config"]["eval"])
    except (KeyError, TypeError) as error:
        raise WSSSError(
            f"{entry.folder}: its configuration has no protocol of this version "
            f"({first_line(error)})"
        ) from error


def maps_of(
    entry: Entry, kind: str, dataset: Any, indices: list[int], trust: Sequence[str] = ()
) -> list[Maps]:
    """Compute label maps of one kind and class maps of some images again.

    Args:
        entry: a run of ours, or a folder's results.
        kind: kind of label map.
        dataset: the split.
        indices: of the images.
        trust: packages beside ``wsss`` whose classes the run may name; their code is run.

    Raises:
        WSSSError: the checkpoint or the folder is gone.
    """
    protocol = _protocol(entry)
    source: Mapping[str, Any] | None = entry.results.get("source")
    if source is not None:
        return [_from_folder(source, protocol, kind, dataset, index) for index in indices]
    run = load_run(entry.home, trust=trust)
    with evaluating(run.module):
        return [_from_run(run, protocol, kind, dataset[index]) for index in indices]


def _from_run(run: Run, protocol: Protocol, kind: str, item: Mapping[str, Any]) -> Maps:
    batch = default_collate([dict(item)])
    images, labels, rgb = batch["image"], batch["labels"], batch["rgb"]
    size = rgb.shape[1:3]
    prediction = predict(run.module, images, size, protocol)
    guessed = predicted_labels(prediction.class_logits)
    allowed = labels if protocol.use_image_labels else guessed
    if kind == "pseudo_label":
        allowed = labels
    cams = localise(run.module, images, allowed, size, protocol)
    if kind in ("seed", "pseudo_label"):
        label = _from_cams(kind, cams, allowed, rgb, protocol)
    else:
        logits = prediction.merged if "ms" in kind else prediction.single
        assert logits is not None  # its score exists
        shown = protocol if "crf" in kind else replace(protocol, crf=None, crf_prune=False)
        present = (labels[0].nonzero().flatten() + 1).tolist() if shown.crf_prune else None
        label = smoothed_label(rgb[0].numpy(), logits[0], shown, present)
    return Maps(label, cams[0].numpy())


def _from_cams(
    kind: str, cams: Tensor, allowed: Tensor, rgb: Tensor, protocol: Protocol
) -> NDArray[np.uint8]:
    if kind == "pseudo_label":
        label = pseudo_label(refinement(protocol), rgb, cams, allowed, protocol)
    else:
        label = cam_to_label(cams, allowed, bg_threshold=protocol.cam_threshold)
    found: NDArray[np.uint8] = label[0].numpy().astype(np.uint8)
    return found


def _from_folder(
    source: Mapping[str, Any], protocol: Protocol, kind: str, dataset: Any, index: int
) -> Maps:
    item = dataset[index]
    height, width = item["mask"].shape
    num_classes = len(item["labels"])
    if "masks" in source:
        folder = Path(source["masks"])
        path = _file_of(item["name"], folder, (".png", ".npy"), "masks")
        return Maps(read_label_map(path, num_classes=num_classes, size=(height, width)), None)
    folder = Path(source["cams"])
    path = _file_of(item["name"], folder, (".npy", ".npz"), "cams")
    size = (height, width)
    first = source["first_class"]
    maps = read_class_maps(path, num_classes=num_classes, first_class=first, size=size)
    cams = resized(torch.from_numpy(maps)[None], size)
    labels = item["labels"][None]
    if kind == "seed" and not protocol.use_image_labels:
        labels = (cams.amax((2, 3)) > 0).float()  # as `wsss eval` scored them
    cams = cams * labels[..., None, None]
    rgb = torch.from_numpy(item["rgb"])[None]
    return Maps(_from_cams(kind, cams, labels, rgb, protocol), cams[0].numpy())


def _file_of(name: str, folder: Path, suffixes: tuple[str, ...], key: str) -> Path:
    """Find the file of an image in a folder that was evaluated.

    Raises:
        WSSSError: it is not there any more.
    """
    try:
        return find_files(folder, [name], suffixes, key)[name]
    except WSSSError as error:
        raise WSSSError(f"{folder}: has no file of {name} any more") from error


@dataclass(frozen=True)
class Pick:
    """An image for the gallery and why it is there."""

    reason: str
    index: int


class Picture(NamedTuple):
    """What lies over an image in the page.

    Attributes:
        under: class of the page's style that has the image as its background.
        source: address of the layer, inside the page.
        text: what it shows.
        label: written below it.
    """

    under: str
    source: str
    text: str
    label: str = ""


class PictureTable(NamedTuple):
    """Pictures, one row an image, which comes first."""

    title: str
    header: list[str]
    rows: list[list[Picture]]


class Gallery(NamedTuple):
    """The same images under every group; each image is in the page once, below all its layers.

    Attributes:
        notes: why there are no pictures, or none of a group.
        images: (class of the page's style, address) of every image, as it is and faded.
        classes: (name, address of a swatch) of every foreground class.
        tables: label maps, and class maps where some group has any.
    """

    notes: list[str]
    images: list[tuple[str, str]]
    classes: list[tuple[str, str]]
    tables: list[PictureTable]


def pick_images(scores: NDArray[np.float64], each: int) -> list[Pick]:
    """Choose images that are best, in the middle, worst, and most disputed; none twice.

    Args:
        scores: (groups, N) mIoU of each image.
        each: how many of each kind.
    """
    mean = np.nan_to_num(scores.mean(axis=0))
    order = np.argsort(mean, kind="stable")
    start = max(0, len(order) // 2 - each // 2)
    spread = np.nan_to_num(np.ptp(scores, axis=0))
    kinds = {
        "largest disagreement": np.argsort(-spread, kind="stable") if len(scores) > 1 else [],
        "best": order[::-1],
        "worst": order,
        "median": [*order[start:], *order[:start]],
    }
    taken: set[int] = set()
    picks: dict[str, list[Pick]] = {}
    for reason, candidates in kinds.items():
        free = [int(i) for i in candidates if int(i) not in taken][:each]
        taken.update(free)
        picks[reason] = [Pick(reason, index) for index in free]
    return [p for r in ("best", "median", "worst", "largest disagreement") for p in picks[r]]


def gallery_of(c: Comparison, each: int, prefix: str, trust: Sequence[str] = ()) -> Gallery:
    """Draw the chosen images with every group's maps; a group that cannot be computed says why.

    Args:
        c: the comparison.
        each: images of each kind.
        prefix: of the names of its images in the page.
        trust: packages beside ``wsss`` whose classes a run may name; their code is run.
    """
    if c.primary is None:
        return Gallery(["no pictures: the runs share no mIoU to choose them by"], [], [], [])
    if not c.same_images:
        return Gallery(["no pictures: the runs were not evaluated on the same images"], [], [], [])
    members = {name: entries[0] for name, entries in c.groups.items()}
    kind = MIOUS[c.primary][0]
    scores = {name: mean_iou(entry.counts(c.primary)) for name, entry in members.items()}
    images = np.unique(c.entries[0].cells[kind][:, 0])
    picks = pick_images(np.stack([*scores.values()]), each)
    indices = [int(images[pick.index]) for pick in picks]
    try:
        dataset = _first_dataset(c.entries, trust)
    except WSSSError as error:
        return Gallery([f"no pictures: {error}"], [], [], [])
    found, notes = {}, []
    for name, entry in members.items():
        try:
            found[name] = maps_of(entry, kind, dataset, indices, trust)
        except WSSSError as error:
            notes.append(f"{name}: {error}")
    with_cams = [name for name, maps in found.items() if maps[0].cams is not None]
    title = f"Label maps: {MAP_NAMES[kind]}, with the image's own mIoU"
    masks = PictureTable(title, ["image", "truth", *found], [])
    cams = PictureTable("CAMs of the largest class", ["image", *with_cams], [])
    tables = [masks, cams] if with_cams else [masks]
    gallery = Gallery(notes, [], _swatches(c.entries[0].classes), tables)
    for row, (pick, index) in enumerate(zip(picks, indices, strict=True)):
        item, under = dataset[index], f"{prefix}-{row}"
        gallery.images.append((under, data_uri(item["rgb"])))
        gallery.images.append((f"{under}-faded", data_uri(faded(item["rgb"]))))
        name = f"{pick.reason}: {item['name']}"
        said = {group: (maps[row], scores[group][pick.index]) for group, maps in found.items()}
        masks.rows.append(_mask_row(under, name, item["mask"].numpy(), said))
        if with_cams:
            cams.rows.append(
                [masks.rows[-1][0], *_cam_row(under, name, item["mask"].numpy(), said)]
            )
    return gallery


def _first_dataset(entries: Sequence[Entry], trust: Sequence[str]) -> Any:
    """Open the split of the first entry that can be opened: all have the same images.

    Raises:
        WSSSError: what the first one says, where none can.
    """
    errors = []
    for entry in entries:
        try:
            return open_dataset(entry, trust)
        except WSSSError as error:
            errors.append(error)
    raise errors[0]


def _swatches(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Show each foreground class as it looks over mid-grey."""
    grey = np.full((18, 18, 3), 128, np.uint8)
    return [
        (name, data_uri(overlay(grey, np.full((18, 18), number))))
        for number, name in enumerate(classes)
        if number > 0
    ]


def _mask_row(
    under: str, name: str, truth: NDArray[Any], said: Mapping[str, tuple[Maps, float]]
) -> list[Picture]:
    """Show an image: itself, the truth, and each group's label map with its mIoU."""
    nothing, faint = np.zeros((*truth.shape, 4), np.uint8), f"{under}-faded"
    row = [Picture(under, layer_uri(nothing), name, name)]
    row.append(Picture(faint, layer_uri(painted(truth)), f"{name}, truth"))
    for group, (maps, score) in said.items():
        label = f"{100 * score:.1f}"
        text = f"{name}, {group} {label}"
        row.append(Picture(faint, layer_uri(painted(maps.label)), text, label))
    return row


def _cam_row(
    under: str, name: str, truth: NDArray[Any], said: Mapping[str, tuple[Maps, float]]
) -> list[Picture]:
    """Show each group's class map of the largest class of an image."""
    areas = np.bincount(truth[(truth > 0) & (truth < 255)], minlength=2)
    main = max(int(areas.argmax()) - 1, 0)
    return [
        Picture(under, layer_uri(heated(maps.cams[main]), LONGEST_CAM, lossless=False),
                f"{name}, CAM of {group}")
        for group, (maps, _) in said.items()
        if maps.cams is not None
    ]  # fmt: skip


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Write a picture as a JPEG inside the page, at most ``LONGEST`` pixels long."""
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST))
    return _inside(image, "jpeg", quality=80)


def layer_uri(pixels: NDArray[np.uint8], longest: int = LONGEST, *, lossless: bool = True) -> str:
    """Write (H, W, 4) pixels as a WebP inside the page, at most ``longest`` pixels long."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest), Image.Resampling.NEAREST)
    return _inside(image, "webp", lossless=lossless, quality=60, method=4)


def _inside(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
