"""Files that appear whole, whoever writes them and whatever becomes of the disk."""

import errno
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wsss.core.errors import WSSSError
from wsss.core.files import append_line, make_writable, read_json, whole_file, write_atomically


@contextmanager
def full_disk(size: int = 8) -> Iterator[None]:
    """No file of this process may be larger, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _write(path: Path, letter: str, times: int) -> None:
    for _ in range(times):
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            for _ in range(50):
                stream.write(letter.encode() * 1000)
                stream.flush()


def test_two_writers_of_a_file_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    writers = [
        multiprocessing.get_context("fork").Process(target=_write, args=(path, letter, 60))
        for letter in "ab"
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 50_000
            assert len(set(content)) == 1, "of one writer"
            seen.add(content[0])
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0, "its file was taken from it"
    assert seen <= {*b"ab"}
    assert os.listdir(tmp_path) == ["results.json"]


def test_threads_write_a_file_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    threads = [threading.Thread(target=_write, args=(path, letter, 20)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(path.read_bytes())) == 1
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    left = tmp_path / ".mask.png.tmp"
    left.write_bytes(b"half of it" * 100)
    write_atomically(tmp_path / "mask.png", b"whole")
    assert (tmp_path / "mask.png").read_bytes() == b"whole"
    assert not left.exists()


def test_a_writer_that_is_killed_blocks_nobody(tmp_path: Path) -> None:
    path, begun = tmp_path / "a", multiprocessing.get_context("fork").Event()

    def hang() -> None:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"half")
            begun.set()
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=hang)
    process.start()
    assert begun.wait(60)
    process.kill()
    process.join()
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_a_full_disk_names_path_reason_and_mend(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, b"old")
    with full_disk(), pytest.raises(WSSSError) as caught:
        write_atomically(path, b"new" * 100)
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be written (File too large); a previous file is")
    assert "make room" in text
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.md"]
    with full_disk(), pytest.raises(WSSSError, match=r"cannot be written .*; make room"):
        make_writable(tmp_path / "new")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WSSSError, match=r"t\.md: cannot be written \(.*\).*another folder"):
        write_atomically(tmp_path / "file" / "t.md", b"")


def test_an_error_of_another_file_is_not_blamed_on_the_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), whole_file(tmp_path / "a.tar") as out:
        out.write_bytes((tmp_path / "absent").read_bytes())
    assert not os.listdir(tmp_path)


def test_lines_are_appended_whole_and_end_a_half_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"whole": 1}\n{"half')
    append_line(path, "next")
    assert path.read_text().split("\n") == ['{"whole": 1}', '{"half', "next", ""]
    with full_disk(10), pytest.raises(WSSSError, match=r"ledger\.jsonl: cannot be written"):
        append_line(path, "x" * 100)


def test_a_line_that_fits_in_part_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda handle, content: len(content) - 1)
    with pytest.raises(WSSSError, match=os.strerror(errno.ENOSPC)):
        append_line(tmp_path / "a", "text")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b""])
def test_json_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(WSSSError, match=r"a\.json: not valid JSON \(.*\); copy it again") as caught:
        read_json(path, "copy it again")
    assert len(str(caught.value)) < 400
