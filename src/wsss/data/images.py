"""Pixels in and out: images, index masks, normalisation, the VOC palette.

Orientation tags (EXIF) are applied wherever an image is read, as viewers and annotation tools do:
in training, in evaluation, in `wsss predict`. A mask belongs to the upright picture. One that has
the size of the stored pixels and not of the upright picture was drawn on the stored ones, and is
turned along. Where both sizes are the same (turned by 180 degrees, mirrored, a square) nothing in
the files says which it was; then the mask counts as upright, and `wsss data check` warns.
"""

import io
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, write_atomically
from wsss.maps.pixels import IGNORE_INDEX

JPEG_TAIL = 65536  # bytes in which the end marker is looked for; some cameras append data


# EXIF orientation -> what makes the stored pixels upright; 1, and whatever is no tag, is nothing
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "upside down and mirrored",
    5: "turned by 90 degrees and mirrored",
    6: "turned by 90 degrees",
    7: "turned by 270 degrees and mirrored",
    8: "turned by 270 degrees",
}
ON_ITS_SIDE = 5  # from this tag on, width and height are swapped
PNG_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # texts that may hold the tag

# Pillow warns of an attack from half its limit on; beyond the limit it raises, see _unreadable
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _decode(path: Path) -> Image.Image:
    """Open, fully decode and turn upright one file, so that truncation shows here, not later."""
    try:
        with Image.open(path) as image:
            return _upright(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _unreadable(
            path, error, "cannot be decoded", "expected a complete image file, copy or download it"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    tag = _tag(image)
    return image.transpose(UPRIGHT[tag]) if tag > 1 else image


def _unreadable(path: Path, error: Exception, what: str, mend: str) -> WSSSError:
    """Say why a file cannot be read, with what helps: a copy of a huge image is as huge."""
    if isinstance(error, FileNotFoundError):
        return WSSSError(f"{path} is missing; expected an image file there")
    if isinstance(error, PermissionError | IsADirectoryError):
        return WSSSError(f"{path} cannot be read ({error.strerror}); expected a readable file")
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        return WSSSError(
            f"{path} has {int(pixels[0]) if pixels else 0:,} pixels, at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,} are read; scale it down or cut it into tiles, "
            "its mask too"
        )
    reason = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        mend = "expected JPEG, PNG or the like: convert it, or copy it"
    return WSSSError(f"{path} {what} ({reason}); {mend} again")


def _tag(image: Image.Image) -> int:
    """Give the orientation tag that is still to be applied, 1..8."""
    if image.format == "TIFF":  # Pillow applies it while decoding, and in the header's size
        return 1
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken block of metadata; the pixels may be whole
        return 1
    return tag if tag in UPRIGHT else 1


def _header_tag(image: Image.Image, path: Path) -> int:
    """Give the orientation tag of an image that is not decoded, and decode it only if it must be.

    A PNG may have its tag behind the pixels, where Pillow would decode all of them to look.
    """
    return 1 if image.format == "PNG" and not _png_is_tagged(path) else _tag(image)


def _png_is_tagged(path: Path) -> bool:
    """Look through the chunks of a PNG for one that may hold an orientation."""
    with path.open("rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4]), head[4:]
            if kind == b"eXIf":
                return True
            start = stream.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if start.startswith(PNG_TEXTS):
                return True
            stream.seek(length - len(start) + 4, 1)
    return False


def orientation(path: Path) -> int:
    """Give the orientation tag of an image, 1..8; 1 is upright.

    Raises:
        WSSSError: the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            return _header_tag(image, path)
    except Exception as error:
        raise _unreadable(path, error, "is no image", "copy or download it") from error


def image_size(path: Path) -> tuple[int, int]:
    """Read the header of an image, and check that a JPEG is complete; decode no pixels.

    Returns:
        (height, width) in pixels, upright: as `read_rgb` gives the image.

    Raises:
        WSSSError: the file is missing, is no image, or is a JPEG without its end marker.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            kind = image.format
            tag = _header_tag(image, path)
        if kind == "JPEG":
            with path.open("rb") as stream:
                pixels = _start_of_scan(stream)
                stream.seek(max(pixels, path.stat().st_size - JPEG_TAIL))
                if b"\xff\xd9" not in stream.read():  # cannot occur inside the coded pixels
                    raise OSError("image file is truncated")
    except Exception as error:  # as in _decode
        raise _unreadable(path, error, "is no complete image", "copy or download it") from error
    return (width, height) if tag >= ON_ITS_SIDE else (height, width)


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


def _sixteen_bit_to_eight(path: Path | str, image: Image.Image) -> NDArray[np.uint8]:
    """Keep the high byte of a 16-bit grey image, as Pillow does for 16-bit RGB."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise WSSSError(
            f"{path} holds values outside 0..65535 (mode {image.mode}); expected 8 or 16 bits per "
            "channel, convert it"
        )
    return (values >> 8).astype(np.uint8)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Read any common image as RGB, upright, decoding it once.

    Grey is repeated over the channels, CMYK and palettes are converted, an alpha channel is
    dropped (not blended), 16-bit values keep their high byte, and an EXIF orientation is applied
    (see the module's docstring).

    Returns:
        uint8 array (H, W, 3), writable.

    Raises:
        WSSSError: the file is missing, corrupt, truncated or of an unusable type.
    """
    return _rgb(_decode(path), path)


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert an image that Pillow has opened, as :func:`read_rgb` does a file.

    Raises:
        WSSSError: it is corrupt, truncated, closed or of an unusable type.
    """
    try:
        upright = _upright(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise WSSSError(f"image cannot be decoded ({first_line(error)})") from error
    return _rgb(upright, "image")


def _rgb(image: Image.Image, path: Path | str) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise WSSSError(f"{path} holds floating-point pixels; expected 8 or 16 bits, convert it")
    if image.mode.startswith("I"):
        return np.repeat(_sixteen_bit_to_eight(path, image)[..., None], 3, axis=2)
    if "transparency" in image.info:  # straight to RGB, Pillow warns about transparent palettes
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def read_mask(
    path: Path,
    *,
    num_classes: int,
    size: tuple[int, int] | None = None,
    image: Path | None = None,
) -> NDArray[np.uint8]:
    """Read a mask of class ids: 0 background, 1..num_classes foreground, 255 ignored.

    Args:
        path: palette (``P``) or 8-bit grey (``L``) image whose stored values are the ids.
        num_classes: K, the number of foreground classes.
        size: (height, width) of the image that the mask belongs to, if it is to be checked.
        image: that image; a mask of its stored pixels is turned with it (see the module).

    Returns:
        uint8 array (H, W).

    Raises:
        WSSSError: the file is missing, corrupt, coloured, of another size, or holds other ids.
    """
    drawn = _decode(path)
    if drawn.mode not in ("P", "L"):
        mend = "use the original index PNG or map its colours back to ids"
        if drawn.mode == "1":
            mend = "save it as 8-bit grey with 1 (the class) where it is white"
        raise WSSSError(
            f"mask {path} has mode {drawn.mode}; expected class ids in a palette (P) or 8-bit grey "
            f"(L) PNG, {mend}"
        )
    if size is not None:
        drawn = _fitted(drawn, f"mask {path}", size, image)
    mask = np.array(drawn)
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    unknown = [int(i) for i in present if num_classes < i != IGNORE_INDEX]
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise WSSSError(
            f"mask {path} holds class id {shown}; expected 0..{num_classes} or {IGNORE_INDEX} "
            f"(ignored) for {num_classes} classes, check the class list or remap the ids"
        )
    return mask


def _fitted(
    drawn: Image.Image, name: str, size: tuple[int, int], image: Path | None
) -> Image.Image:
    """Give a map at its image's size, turned along if it was drawn on the stored pixels.

    Args:
        drawn: the map.
        name: what it is, for the message.
        size: (height, width) of the upright image.
        image: the image, or None where only its size is known.

    Raises:
        WSSSError: it is of another size; the message names an orientation tag.
    """
    have = (drawn.height, drawn.width)
    if have == size:
        return drawn
    tag = 1 if image is None else orientation(image)
    if tag >= ON_ITS_SIDE and have == size[::-1]:
        return drawn.transpose(UPRIGHT[tag])
    why = f" as its EXIF orientation tag {tag} turns it" if tag > 1 else ""
    if tag == 1 and have == size[::-1]:
        why = ", as if one of them were turned (an EXIF orientation tag that was lost?)"
    raise WSSSError(
        f"{name} is {have[1]}x{have[0]} (width x height) but its image is {size[1]}x{size[0]}"
        f"{why}; expected the same size, use the one that belongs to the image"
    )


def read_saliency(
    path: Path, *, threshold: int, size: tuple[int, int], image: Path | None = None
) -> NDArray[np.uint8]:
    """Read a grey saliency map; pixels above ``threshold`` are salient.

    Args:
        path: 8-bit grey, 1-bit or palette image.
        threshold: grey level in 0..254.
        size: (height, width) of the image that the map belongs to.
        image: that image, as for `read_mask`.

    Returns:
        uint8 array (H, W), 1 where salient and 0 elsewhere.

    Raises:
        WSSSError: the file is missing, corrupt, coloured or of another size.
    """
    drawn = _decode(path)
    if drawn.mode not in ("L", "1", "P"):
        raise WSSSError(
            f"saliency map {path} has mode {drawn.mode}; expected 8-bit grey (L), convert it"
        )
    grey = np.asarray(_fitted(drawn, f"saliency map {path}", size, image).convert("L"))
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


def with_long_side(pixels: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Resize a picture (H, W, 3), bilinearly, or a map of ids (H, W), by its nearest pixels.

    Args:
        pixels: uint8.
        length: pixels that the longer side has afterwards; the shape is kept.
    """
    height, width = pixels.shape[:2]
    size = [max(1, int(length * side / max(height, width))) for side in (width, height)]
    how = Image.Resampling.BILINEAR if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(pixels).resize((size[0], size[1]), how))


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
