"""One process at a time that trains, evaluates or writes in a folder."""

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.core.files import NO_LOCKS, cannot_write, is_same_file, reason
from wsss.core.processes import is_alive
from wsss.core.ranks import is_first_process

LOCK_FILE = ".lock"
SECONDS_OF_WORKERS = 15  # after which processes that load data have noticed that theirs is gone

# folders that this process has locked: a training that scores its own run is not in its own way
_own: set[Path] = set()


@contextmanager
def lock(folder: Path, doing: str = "training", *, patient: bool = False) -> Iterator[None]:
    """Lock a folder for this process; the system unlocks it when the process ends.

    Files appear whole in any case. The lock keeps files that belong together (``results.json`` and
    ``images.npz``, a page and its tables) from being written by two processes at once.

    Workers that load data have the lock too, and outlive a killed process by seconds: it waits for
    them.

    Args:
        folder: it exists.
        doing: what happens here, for the error of another process.
        patient: wait, however long, until the other process ends.

    Raises:
        WSSSError: another process works there and is not waited for, or the folder takes no lock.
    """
    path, key = folder / LOCK_FILE, folder.resolve()
    if not is_first_process() or key in _own:  # the first locks it for all
        yield
        return
    handle = _take(path, patient=patient)
    _own.add(key)
    try:
        with contextlib.suppress(OSError):  # on a full disk it is locked, by nobody known
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n{doing}\n".encode(), 0)
        yield
    finally:
        _own.discard(key)
        path.unlink(missing_ok=True)  # while it is locked: nobody else has taken it
        os.close(handle)


def _take(path: Path, *, patient: bool) -> int:
    """Open and lock the file; give its handle.

    Raises:
        WSSSError: another process has it, or it cannot be made or locked.
    """
    until, waits = time.monotonic() + SECONDS_OF_WORKERS, patient
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same_file(handle, path):
                return handle
            os.close(handle)  # whoever had it has removed it
        except OSError as error:
            holder, doing = _holder(handle)
            os.close(handle)
            if error.errno in NO_LOCKS:
                raise WSSSError(
                    f"{path.parent}: its file system has no locks ({reason(error)}), so two "
                    "commands could mix their files there; choose a folder elsewhere"
                ) from error
            if patient:
                if waits:
                    print(f"waiting for another process ({holder or 'unknown'}): {doing}")
                waits = False
            elif is_alive(holder) or time.monotonic() > until:
                raise WSSSError(
                    f"{path.parent}: another process ({holder or 'unknown'}) is {doing} here; "
                    "wait until it ends"
                ) from error
            time.sleep(0.2)


def _holder(handle: int) -> tuple[str, str]:
    """Read ``HOST PID`` of the process that has the lock, empty if unknown, and what it does."""
    lines = os.pread(handle, 300, 0).decode(errors="replace").splitlines()
    holder = lines[0] if lines and re.fullmatch(r"\S+ \d{1,9}", lines[0]) else ""
    doing = lines[1] if len(lines) > 1 and re.fullmatch(r"[a-z ]+", lines[1]) else "working"
    return holder, doing
