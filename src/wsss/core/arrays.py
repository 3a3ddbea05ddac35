"""NumPy files of strangers: what their headers declare is checked before memory is touched."""

import io
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line

#: (name, shape, dtype) of an array that is about to be read; raises WSSSError to refuse it
Check = Callable[[str, tuple[int, ...], np.dtype[Any]], None]
LARGEST = 2**30  # bytes of one array, where nothing else bounds it
# a byte of a deflated file stands for at most so many, give or take a short file
DEFLATED = 1032
MAGIC = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # but for names of fields, which nobody has here
}


def at_most(largest: int = LARGEST) -> Check:
    """Make a check that refuses arrays of more bytes."""

    def check(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if math.prod(shape) * dtype.itemsize > largest:
            raise WSSSError(f"{name or 'it'} declares {dtype} {shape}, more than {largest:,} bytes")

    return check


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of a ``.npy`` stream, and nothing behind it.

    Raises:
        ValueError: it is none, or declares no array.
    """
    version = np.lib.format.read_magic(stream)
    if version not in MAGIC:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = MAGIC[version](stream)
    if any(isinstance(side, bool) or side < 0 for side in shape):
        raise ValueError(f"a shape {shape}")
    return shape, dtype


def read_npy(path: Path, check: Check) -> NDArray[Any] | None:
    """Read the array of a ``.npy`` file; None where it holds pickled objects.

    Raises:
        WSSSError: the check refused it, the file is damaged or shorter than it declares.
    """
    try:
        with path.open("rb") as stream:
            shape, dtype = read_header(stream)
            if dtype.hasobject:
                return None
            check("", shape, dtype)
            size = path.stat().st_size - stream.tell()
            _check_length("it", shape, dtype, size)
            stream.seek(0)
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except Exception as error:  # whatever NumPy raises at a stranger's bytes
        raise unreadable(path, error) from error


def read_npz(
    path: Path, check: Check, wanted: Callable[[str], bool] | None = None
) -> dict[str, NDArray[Any]]:
    """Read arrays of a ``.npz`` file by name; none of them is unpickled.

    Args:
        path: the file.
        check: of each array, before it is read.
        wanted: says by name which are read; None: all.

    Raises:
        WSSSError: the check refused one, the file is damaged or shorter than it declares.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                name: _member(archive, info, name, check)
                for info in archive.infolist()
                if (name := info.filename.removesuffix(".npy")) is not None
                and (wanted is None or wanted(name))
            }
    except Exception as error:  # zip, zlib, NumPy and memory errors share no base class
        raise unreadable(path, error) from error


def names_in(path: Path) -> Sequence[str]:
    """List the names of a ``.npz`` file's arrays.

    Raises:
        WSSSError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename.removesuffix(".npy") for info in archive.infolist()]
    except Exception as error:  # zip, zlib and OS errors share no base class
        raise unreadable(path, error) from error


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, check: Check
) -> NDArray[Any]:
    """Read one array of an archive, whose checksum is compared at its end."""
    if info.file_size > DEFLATED * info.compress_size + 1024:
        raise ValueError(f"{name} declares {info.file_size:,} bytes, more than lie in the file")
    with archive.open(info) as stream:
        shape, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects")
        check(name, shape, dtype)
        header = stream.tell()
        _check_length(name, shape, dtype, info.file_size - header)
        content = stream.read()
    with archive.open(info) as stream:
        content = stream.read(header) + content
    return np.asarray(np.lib.format.read_array(io.BytesIO(content), allow_pickle=False))


def _check_length(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    declared = math.prod(shape) * dtype.itemsize
    if size < declared:
        raise ValueError(f"{name} declares {dtype} {shape}, {declared:,} bytes, but has {size:,}")


def unreadable(path: Path, error: Exception) -> WSSSError:
    """Say in one line why a file's arrays cannot be read."""
    if isinstance(error, MemoryError):
        said = "it needs more memory than there is"
    else:
        said = " ".join(str(error).split()) or type(error).__name__
    return WSSSError(f"{path}: cannot be read as arrays ({one_line(said, 200)})")
