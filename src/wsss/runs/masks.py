"""From a run and images to masks and class maps."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from wsss.core.devices import choose_device
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable, write_atomically
from wsss.core.modes import evaluating
from wsss.core.schema import nearest
from wsss.data.dataset import in_threads
from wsss.data.images import ImageFolderDataset, image_size, read_rgb, voc_palette, write_mask
from wsss.evaluation.inference import localise, predict, predicted_labels, smoothed_label
from wsss.maps.pixels import normalise
from wsss.maps.pseudo_labels import cam_to_label
from wsss.results.gallery import overlay
from wsss.runs.folder import Run

Pixels = NDArray[np.uint8]


class MaskOfImage(NamedTuple):
    """A predicted mask with its image.

    Attributes:
        name: file name of the image without its suffix.
        rgb: (H, W, 3) uint8.
        mask: (H, W) uint8 class ids, 0 background.
    """

    name: str
    rgb: Pixels
    mask: Pixels


def predict_mask(run: Run, rgb: Pixels) -> Pixels:
    """Give the class ids of one image under the run's protocol, where the run's module is.

    A method without a segmentation head gives the CAMs of the classes it predicts, thresholded.

    Args:
        run: a trained run.
        rgb: (H, W, 3) uint8, at its own size.

    Returns:
        uint8 (H, W): 0 background, k the k-th of ``run.data.class_names``.

    Raises:
        WSSSError: the image is no such array.
    """
    images, size, protocol = _batch(run, rgb), rgb.shape[:2], run.protocol
    with evaluating(run.module):
        prediction = predict(run.module, images, size, protocol)
        logits = prediction.single if prediction.merged is None else prediction.merged
        if logits is None:
            labels = predicted_labels(prediction.class_logits)
            cams = localise(run.module, images, labels, size, protocol)
            label = cam_to_label(cams, labels, bg_threshold=protocol.cam_threshold)
            return label[0].cpu().numpy().astype(np.uint8)
        return smoothed_label(rgb, logits[0], protocol)


def predict_cams(
    run: Run, rgb: Pixels, class_names: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Give the localisation maps of one image under the run's protocol.

    Args:
        run: a trained run.
        rgb: (H, W, 3) uint8, at its own size.
        class_names: the classes that the image shows; None: those that the method predicts.

    Returns:
        (K, H, W) in [0, 1]; zero for all other classes.

    Raises:
        WSSSError: the image is no such array, or there is no such class.
    """
    images, size = _batch(run, rgb), rgb.shape[:2]
    with evaluating(run.module):
        if class_names is None:
            labels = predicted_labels(predict(run.module, images, size, run.protocol).class_logits)
        else:
            known = list(run.data.class_names)
            for name in class_names:
                if name not in known:
                    raise WSSSError(f"{name}: unknown class{nearest(name, known)}")
            labels = torch.tensor([[float(name in class_names) for name in known]])
        cams = localise(run.module, images, labels.to(run.device), size, run.protocol)
    return cams[0].cpu().numpy()


def _batch(run: Run, rgb: Pixels) -> torch.Tensor:
    """Normalise one image into a batch (1, 3, H, W) beside the module."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise WSSSError(
            f"image is a {rgb.dtype} array {rgb.shape}; expected uint8 (height, width, 3), RGB"
        )
    return normalise(rgb)[None].to(run.device)


def predict_folder(run: Run, folder: Path | str) -> Iterator[MaskOfImage]:
    """Predict all images that lie directly in a folder, sorted by name.

    Args:
        run: a trained run.
        folder: of JPEG, PNG, BMP or WebP images.

    Returns:
        One mask after the other; every file's header is read before the first.

    Raises:
        WSSSError: the folder is missing or holds no image, a file is broken.
    """
    return _predict_all(run, ImageFolderDataset(Path(folder)))


def _predict_all(run: Run, images: ImageFolderDataset) -> Iterator[MaskOfImage]:
    in_threads(image_size, images.paths)  # a broken file is named before a mask is made

    def masks() -> Iterator[MaskOfImage]:
        for path in images.paths:
            rgb = read_rgb(path)
            yield MaskOfImage(path.stem, rgb, predict_mask(run, rgb))

    return masks()


def write_masks(run: Run, images: ImageFolderDataset, out: Path, device: str = "auto") -> None:
    """Write palette masks and overlays of a folder's images, and ``classes.txt``.

    Args:
        run: a trained run.
        images: the folder.
        out: where masks go; it is made once every image and the device have been looked at.
        device: where to predict.

    Raises:
        WSSSError: a broken image, ``out`` cannot be written, no such device.
    """
    masks = _predict_all(run, images)
    run.to(choose_device(device))
    make_writable(out)
    for name, rgb, mask in track(masks, description="predicting", total=len(images)):
        _save(mask, rgb, out / name)
    names = ["background", *run.data.class_names]
    listed = "".join(f"{i} {name}\n" for i, name in enumerate(names))
    write_atomically(out / "classes.txt", listed.encode())


def _save(mask: Pixels, rgb: Pixels, stem: Path) -> None:
    """Write palette mask and overlay; each file appears whole or not at all."""
    write_mask(mask, stem.with_name(f"{stem.name}.png"))
    drawn = io.BytesIO()
    Image.fromarray(overlay(rgb, mask, voc_palette())).save(drawn, format="JPEG")
    write_atomically(stem.with_name(f"{stem.name}_overlay.jpg"), drawn.getvalue())
