"""Which files are images: those of a folder, of a pattern, or one. Nothing here imports torch."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from wsss.core.errors import WSSSError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def find_images(source: Path | str) -> dict[str, Path]:
    """Find the images of a folder, of a pattern (``photos/**/*.jpg``), or one file.

    Of a folder these are the images that lie directly in it; hidden files and files of other types
    are left alone. A name is that of the file without its suffix, behind its folder where the
    images lie in several.

    Args:
        source: folder, pattern or file.

    Returns:
        Name -> path, sorted.

    Raises:
        WSSSError: nothing is there, or two images differ only in their suffix, so that what is
            made of them would overwrite each other.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        paths = _images_among(place.iterdir())
    elif place.exists():
        paths = [place]
    elif glob.has_magic(str(source)):
        paths = _images_among(map(Path, glob.glob(str(place), recursive=True)))
    else:
        raise WSSSError(
            f"{source} is missing; expected a folder of images, one image, or a pattern in quotes, "
            "as 'photos/*.jpg'"
        )
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        verb = "holds" if place.is_dir() else "matches"
        raise WSSSError(f"{source} {verb} no image; expected files of {kinds}")
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    by_name: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(shared).with_suffix("").as_posix()
        if name in by_name:
            raise WSSSError(
                f"{by_name[name]} and {path} share the name {name!r}, their results would "
                "overwrite each other; rename one"
            )
        by_name[name] = path
    return by_name


def _images_among(paths: Iterable[Path]) -> list[Path]:
    """Keep the files that are images by their suffix and not hidden, sorted."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    )
