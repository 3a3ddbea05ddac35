"""One training at a time in a run folder."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsss.core.errors import WSSSError
from wsss.core.processes import is_alive
from wsss.core.ranks import is_first_process

SECONDS_OF_WORKERS = 15  # after which processes that load data have noticed that theirs is gone


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process; the system unlocks it when the process ends.

    Workers that load data have it too, and outlive a killed process by seconds: it waits for them.

    Raises:
        WSSSError: another process trains there.
    """
    if not is_first_process():  # which locks it for all
        yield
        return
    with (folder / ".lock").open("a+") as lock:
        until = time.monotonic() + SECONDS_OF_WORKERS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                lock.seek(0)
                holder = lock.read()
                if is_alive(holder) or time.monotonic() > until:
                    raise WSSSError(
                        f"{folder}: another process ({holder or 'unknown'}) is training here"
                    ) from error
                time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()}")
        lock.flush()
        yield
