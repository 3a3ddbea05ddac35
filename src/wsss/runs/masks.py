"""From a run and images to masks and class maps."""

import io
from collections.abc import Iterator, Mapping, Sequence
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
from wsss.data.image_files import find_images
from wsss.data.images import image_size, read_rgb, to_rgb, voc_palette, write_mask
from wsss.evaluation.inference import localise, predict, predicted_labels, smoothed_label
from wsss.maps.pixels import normalise
from wsss.maps.pseudo_labels import cam_probabilities, cam_to_label
from wsss.results.gallery import heat, overlay
from wsss.runs.folder import Run
from wsss.runs.output_forms import check_form

Pixels = NDArray[np.uint8]
#: what the functions for Python take: (H, W, 3) pixels, an image that is open, or a file
Picture = Pixels | Image.Image | Path | str


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


class MapsOfImage(NamedTuple):
    """What a run makes of one image, at its own size.

    Attributes:
        mask: (H, W) uint8 class ids, 0 background.
        cams: (K, H, W) float32 in [0, 1], zero for classes that are not predicted; None where
            nobody needs them.
        soft: (K+1, H, W) float32, probabilities of background and classes, before a CRF.
    """

    mask: Pixels
    cams: NDArray[np.float32] | None
    soft: torch.Tensor


def predict_mask(run: Run, rgb: Picture) -> Pixels:
    """Give the class ids of one image under the run's protocol, where the run's module is.

    A method without a segmentation head gives the CAMs of the classes it predicts, thresholded.

    Args:
        run: a trained run.
        rgb: (H, W, 3) uint8 at its own size, a Pillow image, or an image file.

    Returns:
        uint8 (H, W): 0 background, k the k-th of ``run.data.class_names``.

    Raises:
        WSSSError: the image is none of these, or cannot be read.
    """
    return _maps_of(run, _pixels(rgb)).mask


def predict_soft(run: Run, rgb: Picture) -> NDArray[np.float32]:
    """Give the probabilities of background and classes at each pixel of one image.

    They are the segmentation's over the scales of the run's protocol, before a CRF. Without a
    segmentation head they are those that CAMs stand for: a score s for the odds s / (1 - s), the
    background for those of ``eval.cam_threshold``.

    Args:
        run: a trained run.
        rgb: (H, W, 3) uint8 at its own size, a Pillow image, or an image file.

    Returns:
        (K+1, H, W), background first, adding up to 1.

    Raises:
        WSSSError: the image is none of these, or cannot be read.
    """
    return _maps_of(run, _pixels(rgb)).soft.float().cpu().numpy()


def _maps_of(run: Run, rgb: Pixels, *, with_cams: bool = False) -> MapsOfImage:
    """Predict one image, once for all that is made of it."""
    images, size, protocol = _batch(run, rgb), rgb.shape[:2], run.protocol
    cams = None
    with evaluating(run.module):
        prediction = predict(run.module, images, size, protocol)
        logits = prediction.single if prediction.merged is None else prediction.merged
        labels = predicted_labels(prediction.class_logits)
        if with_cams or logits is None:
            cams = localise(run.module, images, labels, size, protocol)
        if logits is None:
            assert cams is not None
            threshold = protocol.cam_threshold
            label = cam_to_label(cams, labels, bg_threshold=threshold)
            mask = label[0].cpu().numpy().astype(np.uint8)
            soft = cam_probabilities(cams, labels, bg_threshold=threshold)[0]
        else:
            mask, soft = smoothed_label(rgb, logits[0], protocol), logits[0].softmax(0)
    shown = None if cams is None else cams[0].float().cpu().numpy()
    return MapsOfImage(mask, shown, soft)


def predict_cams(
    run: Run, rgb: Picture, class_names: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Give the localisation maps of one image under the run's protocol.

    Args:
        run: a trained run.
        rgb: (H, W, 3) uint8 at its own size, a Pillow image, or an image file.
        class_names: the classes that the image shows; None: those that the method predicts.

    Returns:
        (K, H, W) in [0, 1]; zero for all other classes.

    Raises:
        WSSSError: the image is none of these, or cannot be read, or there is no such class.
    """
    rgb = _pixels(rgb)
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


def _pixels(image: Picture) -> Pixels:
    """Give the pixels of an image.

    Raises:
        WSSSError: it cannot be read, or is no array of RGB pixels.
    """
    if isinstance(image, str | Path):
        return read_rgb(Path(image).expanduser())
    if isinstance(image, Image.Image):
        return to_rgb(image)
    what = f"a {type(image).__name__}"
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return image
        what = f"a {image.dtype} array {image.shape}"
    raise WSSSError(
        f"image is {what}; expected uint8 (height, width, 3), RGB, a Pillow image or a file"
    )


def _batch(run: Run, rgb: Pixels) -> torch.Tensor:
    """Normalise one image into a batch (1, 3, H, W) beside the module."""
    return normalise(rgb)[None].to(run.device)


def predict_folder(run: Run, images: Path | str) -> Iterator[MaskOfImage]:
    """Predict all images that lie directly in a folder, or that a pattern matches, sorted by name.

    Args:
        run: a trained run.
        images: folder, pattern (``photos/**/*.jpg``) or file.

    Returns:
        One mask after the other; every file's header is read before the first.

    Raises:
        WSSSError: there is no image, a file is broken.
    """
    found = find_images(images)
    in_threads(image_size, list(found.values()))  # a broken file is named before a mask is made

    def masks() -> Iterator[MaskOfImage]:
        for name, path in found.items():
            rgb = read_rgb(path)
            yield MaskOfImage(name, rgb, predict_mask(run, rgb))

    return masks()


def write_masks(
    run: Run,
    images: Mapping[str, Path],
    out: Path,
    *,
    cams: str | None = None,
    soft: str | None = None,
    device: str = "auto",
) -> None:
    """Write palette masks and overlays of images, ``classes.txt``, and maps where they are wanted.

    ``cams/NAME.npy`` is (K, H, W) float32, a layout that ``wsss eval cams=`` reads, and
    ``soft/NAME.npy`` (K+1, H, W); ``NAME_3.png`` beside them is the heat map of class 3, for each
    class that the method predicts in the image.

    Args:
        run: a trained run.
        images: name -> file, of :func:`wsss.data.image_files.find_images`.
        out: where masks go; it is made once every image and the device have been looked at.
        cams: form of the localisation maps: ``npy``, ``png`` or ``both``; None: they are not
            written.
        soft: the same for the probabilities of :func:`predict_soft`.
        device: where to predict.

    Raises:
        WSSSError: a broken image, ``out`` cannot be written or would mix with the images, no such
            form or device.
    """
    forms = {"cams": cams, "soft": soft}
    _check_places(images, out, forms)
    in_threads(image_size, list(images.values()))  # a broken file is named before a mask is made
    run.to(choose_device(device))
    make_writable(out)
    for name, path in track(images.items(), description="predicting", total=len(images)):
        rgb = read_rgb(path)
        maps = _maps_of(run, rgb, with_cams=cams is not None)
        _save(maps.mask, rgb, out / name)
        if cams is not None and maps.cams is not None:
            _save_maps(maps.cams, rgb, out / "cams" / name, cams, first=1)
        if soft is not None:
            _save_maps(maps.soft.float().cpu().numpy(), rgb, out / "soft" / name, soft, first=0)
    names = ["background", *run.data.class_names]
    listed = "".join(f"{i} {name}\n" for i, name in enumerate(names))
    write_atomically(out / "classes.txt", listed.encode())


def _check_places(images: Mapping[str, Path], out: Path, forms: Mapping[str, str | None]) -> None:
    """Raise WSSSError where a form is unknown, or files would lie among images or other results."""
    for key, form in forms.items():
        check_form(key, form)
    for name, path in images.items():
        if (out / name).parent.resolve() == path.parent.resolve():
            raise WSSSError(f"out={out}: masks would lie among the images; choose another folder")
        top = name.partition("/")[0]
        if "/" in name and forms.get(top) is not None:
            raise WSSSError(
                f"{path}: its mask would lie among the maps in {out / top}; rename that folder, or "
                f"leave {top}= out"
            )


def _save(mask: Pixels, rgb: Pixels, stem: Path) -> None:
    """Write palette mask and overlay; each file appears whole or not at all."""
    write_mask(mask, stem.with_name(f"{stem.name}.png"))
    drawn = io.BytesIO()
    Image.fromarray(overlay(rgb, mask, voc_palette())).save(drawn, format="JPEG")
    write_atomically(stem.with_name(f"{stem.name}_overlay.jpg"), drawn.getvalue())


def _save_maps(
    maps: NDArray[np.float32], rgb: Pixels, stem: Path, form: str, *, first: int
) -> None:
    """Write maps as an array, and each that shows a class as a heat map over the image.

    Args:
        maps: (N, H, W) in [0, 1].
        rgb: (H, W, 3) uint8.
        stem: of the files.
        form: of ``FORMS``.
        first: class id of the first map.
    """
    if form != "png":
        content = io.BytesIO()
        np.save(content, maps)
        write_atomically(stem.with_name(f"{stem.name}.npy"), content.getvalue())
    if form == "npy":
        return
    # of probabilities the classes that win somewhere, of localisation maps those that are not zero
    shown = np.unique(maps.argmax(0)) if first == 0 else np.flatnonzero(maps.any((1, 2)))
    for index in shown.tolist():
        if index + first == 0:
            continue  # the background
        drawn = io.BytesIO()
        Image.fromarray(heat(rgb, maps[index])).save(drawn, format="PNG")
        write_atomically(stem.with_name(f"{stem.name}_{index + first}.png"), drawn.getvalue())
