"""Files that appear whole or not at all, their hashes, and folders that can be written."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsss.core.errors import WSSSError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes its place when the block ends without an error.

    A reader sees the old file or the new one; the folder is created. The temporary file's name is
    fixed, so that what a killed process left is overwritten by the next; a file has one writer at a
    time. Nothing is forced to the disk: what a power cut leaves is the system's business.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as :func:`whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def first_line(error: BaseException) -> str:
    """Give what an error says, as one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def file_sha256(path: Path) -> str:
    """Hash a file's bytes with SHA-256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_writable(folder: Path) -> None:
    """Create a folder, and prove that it can be written before hours of work go into it.

    Raises:
        WSSSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WSSSError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
