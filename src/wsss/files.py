"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one; its folder is created.

    The temporary file's name is fixed, so that what a killed process left is overwritten by the
    next; a file has one writer at a time. Nothing is forced to the disk: what a power cut leaves is
    the system's business.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
