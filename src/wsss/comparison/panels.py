"""Pictures of the same images under every method, made by the functions that are scored."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from wsss.comparison.entries import Entry
from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.modes import evaluating
from wsss.evaluation.folders import find_files, read_class_maps, read_label_map
from wsss.evaluation.holdout import HOLDOUT, Holdout
from wsss.evaluation.inference import (
    localise,
    predict,
    predicted_labels,
    pseudo_label,
    refinement,
    resized,
    smoothed_label,
)
from wsss.evaluation.protocol import Protocol
from wsss.maps.pseudo_labels import cam_to_label
from wsss.runs.folder import Run, build_data, load_run
from wsss.runs.stored import check_stored

LONGEST = 240  # side of a picture in the report, in pixels


@dataclass(frozen=True)
class Maps:
    """What a method says about one image.

    Attributes:
        label: (H, W) class ids, 255 where undecided.
        cams: (K, H, W) in [0, 1], or None where only label maps exist.
    """

    label: NDArray[np.uint8]
    cams: NDArray[np.float32] | None


def open_dataset(entry: Entry) -> Any:
    """Open the split of an entry with its images and masks.

    Raises:
        WSSSError: the data is not where the run found it, or not what it was.
    """
    config = check_stored(entry.results["config"], str(entry.folder))
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


def maps_of(entry: Entry, kind: str, dataset: Any, indices: list[int]) -> list[Maps]:
    """Compute label maps of one kind and class maps of some images again.

    Args:
        entry: a run of ours, or a folder's results.
        kind: kind of label map.
        dataset: the split.
        indices: of the images.

    Raises:
        WSSSError: the checkpoint or the folder is gone.
    """
    protocol = _protocol(entry)
    source: Mapping[str, Any] | None = entry.results.get("source")
    if source is not None:
        return [_from_folder(source, protocol, kind, dataset, index) for index in indices]
    run = load_run(entry.home)
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


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Write a picture as a JPEG inside the page, at most ``LONGEST`` pixels long."""
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
