"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write, which takes its place when the block ends without an error.

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
    """Writes a file as :func:`whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
