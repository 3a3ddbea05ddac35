"""What an array's header declares is compared with the file before memory is touched."""

import io
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wsss.core.arrays import at_most, names_in, read_npy, read_npz
from wsss.core.errors import WSSSError


def header(shape: tuple[int, ...], kind: str = "<f4", version: tuple[int, int] = (1, 0)) -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(f"{name}.npy", content)
    return path


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Memory for what the test has and 2 GB more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


HUGE = [
    header((2**39,)),
    header((2**13, 2**13, 2**13)),
    header((2**62, 2**62)),
    header((2**40,), "|V0"),
    header((2,), "|V2000000000"),
    header((4, 4)),
    header((4, 4)) + b"\0" * 63,
    header((-1, 4)) + b"\0" * 64,
    header((4,), "|O") + b"\0" * 64,
    header((4, 4), version=(9, 0)) + b"\0" * 64,
    b"\x93NUMPY",
    b"",
]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("content", HUGE)
def test_headers_that_lie_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    if b"'|O'" not in content:  # of pickled objects: read otherwise
        with pytest.raises(WSSSError, match=r"a\.npy: cannot be read as arrays"):
            read_npy(path, at_most())
    archive(tmp_path / "a.npz", {"x": content})
    with pytest.raises(WSSSError, match=r"a\.npz: cannot be read as arrays"):
        read_npz(tmp_path / "a.npz", at_most())


@pytest.mark.usefixtures("little_memory")
def test_a_file_of_terabytes_that_takes_no_room_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.npy"
    with path.open("wb") as stream:
        stream.write(header((2**40,)))
        stream.truncate(2**42 + 128)
    with pytest.raises(WSSSError, match=r"declares float32 \(1099511627776,\), more than"):
        read_npy(path, at_most())


def test_damaged_archives_are_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(4000).reshape(40, 100), names=np.array(["a", "b"]))
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(whole))]
        for _ in range(rng.integers(1, 4) if damaged else 0):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            names_in(path)
            found = read_npz(path, at_most(2**20), {"x", "names"}.__contains__)
        except WSSSError as error:
            refused.append(str(error))
            continue
        if "x" in found:  # its name may have been hit
            np.testing.assert_array_equal(found["x"], np.arange(4000).reshape(40, 100))
    assert len(refused) > 200
    assert all("\n" not in text and len(text) < 600 for text in refused)


def test_whole_files_are_read_in_every_order(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "c": values,
        "f": np.asfortranarray(values),
        "none": values[:0],
        "scalar": values.sum(),
    }
    np.savez(tmp_path / "a.npz", **arrays, text=np.array(["ä", "bc"]))
    found = read_npz(tmp_path / "a.npz", at_most())
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert found["text"].tolist() == ["ä", "bc"]
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    np.testing.assert_array_equal(read_npy(tmp_path / "f.npy", at_most()), values)
    np.save(tmp_path / "o.npy", {"a": 1}, allow_pickle=True)  # type: ignore[arg-type]
    assert read_npy(tmp_path / "o.npy", at_most()) is None
