"""One process at a time in a folder, and one line where it is not free."""

import errno
import fcntl
import multiprocessing
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from wsss.core.errors import WSSSError
from wsss.core.lock import LOCK_FILE, lock

FORK = multiprocessing.get_context("fork")


def _hold(folder: Path, doing: str, ready: Any) -> None:
    with lock(folder, doing):
        ready.set()
        time.sleep(600)


def test_the_other_process_and_its_work_are_named(tmp_path: Path) -> None:
    ready = FORK.Event()
    other = FORK.Process(target=_hold, args=(tmp_path, "labelling", ready))
    other.start()
    assert ready.wait(60)
    try:
        text = rf"^{re.escape(str(tmp_path))}: another process \(\S+ {other.pid}\) is labelling"
        with pytest.raises(WSSSError, match=text), lock(tmp_path, "evaluating"):
            pass
    finally:
        other.kill()
        other.join()
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()


def test_a_patient_process_waits_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = FORK.Event()
    other = FORK.Process(target=_hold, args=(tmp_path, "making labels", ready))
    other.start()
    assert ready.wait(60)
    killer = threading.Timer(1, other.kill)
    killer.start()
    try:
        with lock(tmp_path, patient=True):
            assert killer.finished.is_set(), "while the other had it"
    finally:
        other.kill()
        other.join()
    found = capsys.readouterr().out.splitlines()
    holder = f"{socket.gethostname()} {other.pid}"
    assert found == [f"waiting for another process ({holder}): making labels"]


def test_a_process_is_not_in_its_own_way_and_leaves_nothing(tmp_path: Path) -> None:
    with lock(tmp_path, "training"), lock(tmp_path / ".." / tmp_path.name, "evaluating"):
        assert (tmp_path / LOCK_FILE).read_text().split("\n")[1] == "training"
    assert not os.listdir(tmp_path)
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 10_000, b"host 99999999999999999999\nx\n"])
def test_what_lies_in_the_file_is_no_matter(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with lock(tmp_path):
        pass


def test_a_folder_without_room_for_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(WSSSError, match=r"\.lock: cannot be written \(Is a dir"), lock(tmp_path):
        pass
    with pytest.raises(WSSSError, match=r"\.lock: cannot be written"), lock(tmp_path / "absent"):
        pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    began = time.monotonic()
    with pytest.raises(WSSSError, match=r"has no locks .*choose a folder"), lock(tmp_path):
        pass
    assert time.monotonic() - began < 5, "there is nobody to wait for"
