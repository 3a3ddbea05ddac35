"""Files that appear whole or not at all, their hashes, and folders that can be written."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.failures import NO_ROOM

# what flock answers on file systems without locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes its place when the block ends without an error.

    A reader sees the old file or the new one; the folder is created. The temporary file's name is
    fixed, so that the next writer overwrites what a killed process left; a name of each writer's
    own would leave its rest for good, or make every write list a folder of 100,000 masks. Two
    writers of one file write in turn: each locks the temporary file, and the system unlocks it
    when a process is killed. Nothing is forced to the disk: what a power cut leaves is the
    system's business.

    Raises:
        WSSSError: it cannot be written; what was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _in_turn(temporary):
            try:
                yield temporary
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)  # not after the move: by then it is another's
                raise
    except OSError as error:
        own = {str(each) for each in (temporary, path, *path.parents)}
        if error.filename is not None and str(error.filename) not in own:
            raise  # of another file that the block has to do with
        raise cannot_write(path, error, untouched=True) from error


@contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """Create a file and lock it, once whoever has it locked has moved or removed it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: as without this
                fcntl.flock(handle, fcntl.LOCK_EX)
            if is_same_file(handle, path):
                yield
                return
        finally:
            os.close(handle)


def is_same_file(handle: int, path: Path) -> bool:
    """Say whether an open file still lies under its name, that is, was not moved or removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as :func:`whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def append_line(path: Path, line: str) -> None:
    """Append a line in one write; one that another process left unfinished is ended first.

    Raises:
        WSSSError: it cannot be written whole.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            begun = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            content = b"\n" * begun + line.encode() + b"\n"
            if os.write(handle, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error


def read_json(path: Path, mend: str) -> Any:
    """Read a JSON file that may be damaged or a stranger's.

    Args:
        path: the file.
        mend: what to do where it cannot be read.

    Raises:
        WSSSError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WSSSError(f"{path}: cannot be read ({reason(error)}); {mend}") from error
    except (ValueError, RecursionError) as error:  # also bytes that are no text, groups without end
        said = " ".join(str(error).split())[:100]
        raise WSSSError(f"{path}: not valid JSON ({said}); {mend}") from error


def cannot_write(path: Path, error: OSError, *, untouched: bool = False) -> WSSSError:
    """Say in one line what could not be written, why, and what to do."""
    mend = "make room there, or choose another folder"
    if error.errno not in NO_ROOM:
        mend = "choose another folder, or let it be written"
    previous = "; a previous file is untouched" if untouched else ""
    return WSSSError(f"{path}: cannot be written ({reason(error)}){previous}; {mend}")


def reason(error: OSError) -> str:
    """Give what the system says of an error, without the path."""
    return error.strerror or first_line(error)


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
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)  # a full disk may still make empty files
            probe.flush()
    except OSError as error:
        raise cannot_write(folder, error) from error
