"""Helpers for tests of `wsss data prepare`: run it, kill it, compare what it leaves."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsss.cli import main
from wsss.core.lock import lock


def prepare(*arguments: str) -> None:
    assert main(["data", "prepare", *arguments]) == 0


def prepare_killed(number: int, *arguments: str) -> None:
    """Ends as by a power cut, just before the Nth file gets its final name."""
    child = os.fork()
    if child == 0:
        renamed = 0

        def kill(event: str, _: tuple[Any, ...]) -> None:
            nonlocal renamed
            if event == "os.rename":
                renamed += 1
                if renamed == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        main(["data", "prepare", *arguments])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@contextmanager
def in_another_process(root: Path) -> Iterator[None]:
    """Have another process prepare a folder, for as long as the block lasts."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        with lock(root, "preparing"):
            os.write(begun, b".")
            signal.pause()
    try:
        assert os.read(ready, 1) == b"."
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(begun)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
