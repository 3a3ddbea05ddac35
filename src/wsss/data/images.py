"""Pixels in and out: images, index masks, normalisation, the VOC palette, a folder to predict.

Orientation tags (EXIF) are *not* applied: VOC, COCO and their masks are stored in the raw pixel
order, so turning an image and not its mask would shift every label. A phone photo that relies on
its tag is read lying on its side; rotate the file itself first.
"""

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from wsss.core.errors import WSSSError
from wsss.core.files import write_atomically
from wsss.maps.pixels import IGNORE_INDEX, normalise

JPEG_TAIL = 65536  # bytes in which the end marker is looked for; some cameras append data
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def _decode(path: Path) -> Image.Image:
    """Open and fully decode one file, so that truncation shows here and not later."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise WSSSError(f"{path} is missing; expected an image file there") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise WSSSError(
            f"{path} cannot be decoded ({' '.join(str(error).split())}); expected a complete image "
            "file, copy or download it again"
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """Read the header of an image, and check that a JPEG is complete; decode no pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        WSSSError: the file is missing, is no image, or is a JPEG without its end marker.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            kind = image.format
        if kind == "JPEG":
            with path.open("rb") as stream:
                pixels = _start_of_scan(stream)
                stream.seek(max(pixels, path.stat().st_size - JPEG_TAIL))
                if b"\xff\xd9" not in stream.read():  # cannot occur inside the coded pixels
                    raise OSError("image file is truncated")
    except FileNotFoundError:
        raise WSSSError(f"{path} is missing; expected an image file there") from None
    except Exception as error:  # as in _decode
        raise WSSSError(
            f"{path} is no complete image ({' '.join(str(error).split())}); copy or download it "
            "again"
        ) from error
    return height, width


def _start_of_scan(stream: BinaryIO) -> int:
    """Give where a JPEG's coded pixels begin.

    What lies before may hold a thumbnail, a whole JPEG with an end marker of its own.
    """
    stream.seek(2)
    while True:
        marker = stream.read(2)
        while marker[1:] == b"\xff":  # fill bytes
            marker = marker[1:] + stream.read(1)
        length = stream.read(2)
        if len(marker) < 2 or len(length) < 2 or marker[:1] != b"\xff":
            raise OSError("image file is truncated")
        if marker == b"\xff\xda":
            return stream.tell() - 2 + int.from_bytes(length)
        stream.seek(int.from_bytes(length) - 2, 1)


def _sixteen_bit_to_eight(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """Keep the high byte of a 16-bit grey image, as Pillow does for 16-bit RGB."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise WSSSError(
            f"{path} holds values outside 0..65535 (mode {image.mode}); expected 8 or 16 bits per "
            "channel, convert it"
        )
    return (values >> 8).astype(np.uint8)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Read any common image as RGB, decoding it once.

    Grey is repeated over the channels, CMYK and palettes are converted, an alpha channel is
    dropped (not blended), 16-bit values keep their high byte, and EXIF orientation is not applied
    (see the module's docstring).

    Returns:
        uint8 array (H, W, 3), writable.

    Raises:
        WSSSError: the file is missing, corrupt, truncated or of an unusable type.
    """
    image = _decode(path)
    if image.mode == "F":
        raise WSSSError(f"{path} holds floating-point pixels; expected 8 or 16 bits, convert it")
    if image.mode.startswith("I"):
        return np.repeat(_sixteen_bit_to_eight(path, image)[..., None], 3, axis=2)
    if "transparency" in image.info:  # straight to RGB, Pillow warns about transparent palettes
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def read_mask(
    path: Path, *, num_classes: int, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Read a mask of class ids: 0 background, 1..num_classes foreground, 255 ignored.

    Args:
        path: palette (``P``) or 8-bit grey (``L``) image whose stored values are the ids.
        num_classes: K, the number of foreground classes.
        size: (height, width) of the image that the mask belongs to, if it is to be checked.

    Returns:
        uint8 array (H, W).

    Raises:
        WSSSError: the file is missing, corrupt, coloured, of another size, or holds other ids.
    """
    image = _decode(path)
    if image.mode not in ("P", "L"):
        raise WSSSError(
            f"mask {path} has mode {image.mode}; expected class ids in a palette (P) or 8-bit grey "
            "(L) PNG, use the original index PNG or map its colours back to ids"
        )
    mask = np.array(image)
    if size is not None and mask.shape != size:
        raise WSSSError(
            f"mask {path} is {mask.shape[1]}x{mask.shape[0]} (width x height) but its image is "
            f"{size[1]}x{size[0]}; expected the same size, use the mask that belongs to the image"
        )
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    unknown = [int(i) for i in present if num_classes < i != IGNORE_INDEX]
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise WSSSError(
            f"mask {path} holds class id {shown}; expected 0..{num_classes} or {IGNORE_INDEX} "
            f"(ignored) for {num_classes} classes, check the class list or remap the ids"
        )
    return mask


def read_saliency(path: Path, *, threshold: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read a grey saliency map; pixels above ``threshold`` are salient.

    Args:
        path: 8-bit grey, 1-bit or palette image.
        threshold: grey level in 0..254.
        size: (height, width) of the image that the map belongs to.

    Returns:
        uint8 array (H, W), 1 where salient and 0 elsewhere.

    Raises:
        WSSSError: the file is missing, corrupt, coloured or of another size.
    """
    image = _decode(path)
    if image.mode not in ("L", "1", "P"):
        raise WSSSError(
            f"saliency map {path} has mode {image.mode}; expected 8-bit grey (L), convert it"
        )
    grey = np.asarray(image.convert("L"))
    if grey.shape != size:
        raise WSSSError(
            f"saliency map {path} is {grey.shape[1]}x{grey.shape[0]} (width x height) but its "
            f"image is {size[1]}x{size[0]}; expected the same size"
        )
    return (grey > threshold).astype(np.uint8)


def voc_palette(n: int = 256) -> list[int]:
    """Give the colours of the VOC devkit as a flat list of 3n values, for `Image.putpalette`.

    Bit b of the id's three lowest bits goes to red, green and blue, highest colour bit first;
    then the id is shifted by three (the devkit's ``VOClabelcolormap``).
    """
    palette = []
    for class_id in range(n):
        colour, rest = [0, 0, 0], class_id
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
        palette += colour
    return palette


def mask_png(ids: NDArray[np.uint8]) -> bytes:
    """Give class ids (H, W) as an index PNG with the VOC palette."""
    image = Image.fromarray(ids, mode="P")
    image.putpalette(voc_palette())
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def write_mask(ids: NDArray[np.uint8], path: Path) -> None:
    """Write class ids (H, W) as an index PNG that appears whole or not at all."""
    write_atomically(path, mask_png(ids))


class ImageFolderDataset(Dataset[dict[str, Any]]):
    """All images that lie directly in a folder, sorted by name, at native size (`wsss predict`).

    Hidden files, sub-folders and files of other types are left alone. An item is ``image``
    (3, H, W) normalised, ``rgb`` (H, W, 3) uint8, ``name`` (the file name without its suffix) and
    ``index``.

    Raises:
        WSSSError: the folder is missing or holds no image, or two images differ only in their
            suffix, so that their outputs would overwrite each other; while reading, see `read_rgb`.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise WSSSError(f"image folder {folder} is missing; expected a folder of images")
        self.paths = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")
            and path.is_file()
        )
        if not self.paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise WSSSError(f"image folder {folder} holds no image; expected files of {kinds}")
        by_name: dict[str, Path] = {}
        for path in self.paths:
            if path.stem in by_name:
                raise WSSSError(
                    f"{by_name[path.stem]} and {path} share the name {path.stem!r}, their results "
                    "would overwrite each other; rename one"
                )
            by_name[path.stem] = path

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        rgb = read_rgb(path)
        return {"image": normalise(rgb), "rgb": rgb, "name": path.stem, "index": index}
