"""What a command prints when it fails is one line of bounded length."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsss.cli import main
from wsss.core.errors import WSSSError
from wsss.core.failures import JOB_STEM, exit_status_of, one_line


def fail(error: Exception) -> int:
    raise error


def test_a_long_line_keeps_key_and_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(JOB_STEM, str(tmp_path / "3"))
    text = f"data.class_names={'x' * 70_000}: expected one name a class"
    assert exit_status_of("train", lambda: fail(WSSSError(text))) == 2
    line = capsys.readouterr().err
    assert len(line) < 1300
    assert line.startswith("wsss train: data.class_names=xxx")
    assert line.endswith("expected one name a class\n")
    assert "characters) ..." in line
    assert len((tmp_path / "3.error").read_text()) < 1300


def test_a_line_is_one_line_and_steers_no_terminal() -> None:
    assert one_line("a\nb\r\x1b[2Jc\u2028d\udcff") == r"a\nb\r\x1b[2Jc\u2028d\udcff"
    assert one_line("kätzchen ± 1 · 猫") == "kätzchen ± 1 · 猫"


def test_a_full_disk_anywhere_is_named_with_a_mend(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "logs/metrics.csv")
    assert exit_status_of("train", lambda: fail(error)) == 2
    line = capsys.readouterr().err
    assert line.startswith("wsss train: logs/metrics.csv: cannot be written (No space left")
    assert "make room" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "x" * 70_000],
        ["eval", f"{'x' * 70_000}=1"],
        ["eval", f"run={'x/' * 35_000}"],
        ["eval", f"seed={'x' * 70_000}"],
        ["compare", "y" * 70_000],
        ["train", "data=minivoc", f"study={'x' * 70_000}"],
        ["train", "data=minivoc", f"data.label_source={'x' * 70_000}"],
        ["train", "data=minivoc", f"+{'x' * 70_000}=1"],
    ],
)
def test_refusals_of_long_values_are_short(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert len(error) < 1500
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("line", [["--help"], ["train", "--help"], ["train", "--keys"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(line: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "wsss.cli", *line]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_another_broken_pipe_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_status_of("train", lambda: fail(BrokenPipeError(errno.EPIPE, "a worker"))) == 1
    assert "a worker" in capfd.readouterr().err
