"""NumPy files of strangers: what their headers declare is checked before memory is touched."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsss.core.errors import WSSSError
from wsss.core.failures import one_line

LARGEST = 2**30  # bytes of one array, where nothing else bounds it
DEFLATED = 1032  # bytes that one byte of a deflated file stands for at most
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs in the names of fields alone
}


class Declared(NamedTuple):
    """What the header of an array says.

    Attributes:
        shape: of the array.
        fortran: whether its first axis runs fastest.
        dtype: of its values.
    """

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Room that it takes; values without width count one byte."""
        return math.prod(self.shape) * max(self.dtype.itemsize, 1)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


#: looks at an array by name before it is read; raises ValueError to refuse it
Check = Callable[[str, Declared], None]


def at_most(largest: int = LARGEST) -> Check:
    """Make a check that refuses arrays of more bytes."""

    def check(name: str, declared: Declared) -> None:
        if declared.bytes > largest:
            raise ValueError(f"{name} declares {declared}, more than {largest:,} bytes")

    return check


def read_header(stream: IO[bytes]) -> Declared:
    """Read the header of a ``.npy`` stream, and nothing behind it.

    Raises:
        ValueError: it is none, or declares no array.
    """
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the format is unknown")
    declared = Declared(*HEADERS[version](stream))
    if any(isinstance(side, bool) or side < 0 for side in declared.shape):
        raise ValueError(f"a shape {declared.shape} is none")
    return declared


def read_npy(path: Path, check: Check) -> NDArray[Any] | None:
    """Read the array of a ``.npy`` file; None where it holds pickled objects.

    Raises:
        WSSSError: the check refused it, or the file is damaged or shorter than it declares.
    """
    try:
        with path.open("rb") as stream:
            declared = read_header(stream)
            if declared.dtype.hasobject:
                return None
            check("it", declared)
            size = path.stat().st_size - stream.tell()
            if size < declared.bytes:
                raise ValueError(f"it declares {declared}, but has {size:,} bytes")
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
        WSSSError: the check refused one, or the file is damaged or shorter than it declares.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if wanted is None or wanted(name):
                    found[name] = _member(archive, info, name, check)
    except Exception as error:  # zip, zlib, NumPy and memory errors share no base class
        raise unreadable(path, error) from error
    return found


def names_in(path: Path) -> list[str]:
    """List the names of the arrays of a ``.npz`` file.

    Raises:
        WSSSError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # zip, zlib and OS errors share no base class
        raise unreadable(path, error) from error


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, check: Check
) -> NDArray[Any]:
    """Read one array of an archive, whose checksum is compared at the end of the stream."""
    if info.file_size > DEFLATED * info.compress_size + 1024:
        raise ValueError(f"{name} declares {info.file_size:,} bytes, more than the file can hold")
    with archive.open(info) as stream:
        declared = read_header(stream)
        if declared.dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects")
        check(name, declared)
        size = info.file_size - stream.tell()
        if size != math.prod(declared.shape) * declared.dtype.itemsize:
            raise ValueError(f"{name} declares {declared}, but has {size:,} bytes")
        flat = np.frombuffer(stream.read(), declared.dtype) if size else np.empty(0, declared.dtype)
    if declared.fortran:
        return flat.reshape(declared.shape[::-1]).T
    return flat.reshape(declared.shape)


def unreadable(path: Path, error: Exception) -> WSSSError:
    """Say in one line why a file's arrays cannot be read."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        said = "they need more memory than there is"
    return WSSSError(f"{path}: cannot be read as arrays ({one_line(said, 200)})")
