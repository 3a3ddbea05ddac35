"""A damaged line of the ledger loses no reading and no evaluation."""

import json
from pathlib import Path

import pytest

from wsss.core.errors import WSSSError
from wsss.evaluation.ledger import LEDGER_FILE, check_ledger, past_readings, record_reading

WHOLE = '{"time": "2026-01-01T00:00:00+00:00", "split": "val", "purpose": "report"}'
DAMAGED = ['{"time": "2026', "5", "null", "[]", "{}", "\x00\x00", "[" * 100_000, '{"split": 1}']


@pytest.mark.parametrize("line", DAMAGED)
@pytest.mark.parametrize("end", ["", "\n"])
def test_readings_before_and_after_a_damaged_line_count(
    line: str, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / LEDGER_FILE
    path.write_text(f"{WHOLE}\n{line}{end}")
    check_ledger(tmp_path)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path}: line 2 is damaged (")
    assert len(warning.splitlines()) == 1
    assert len(warning) < 400
    assert record_reading(tmp_path, split="val", purpose="report") == 2
    assert record_reading(tmp_path, split="train", purpose="report") == 1
    assert [entry["split"] for entry in past_readings(tmp_path)] == ["val", "val", "train"]
    lines = path.read_text().split("\n")
    assert lines[:2] == [WHOLE, line], "nothing that was there is lost"
    assert json.loads(lines[2])["split"] == "val"


def test_bytes_that_are_no_text_are_a_damaged_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(b"\xff\xfe\x00" + WHOLE.encode() + b"\n" + WHOLE.encode())
    check_ledger(tmp_path)
    assert "line 1 is damaged" in capsys.readouterr().err
    assert record_reading(tmp_path, split="val", purpose="report") == 2


def test_many_damaged_lines_are_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEDGER_FILE).write_text("x\n" * 50)
    check_ledger(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_ledger_and_none_are_not_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_ledger(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / LEDGER_FILE).write_text(f"{WHOLE}\n\n{WHOLE}\n")
    check_ledger(tmp_path)
    assert capsys.readouterr().err == ""
    assert len(past_readings(tmp_path)) == 2


def test_a_ledger_that_is_no_file_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(WSSSError, match=r"ledger\.jsonl: cannot be read \(it is no file\)"):
        check_ledger(tmp_path)


def test_a_ledger_that_cannot_be_written_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LEDGER_FILE).write_text(f"{WHOLE}\n")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(WSSSError, match=r"ledger\.jsonl: cannot be written \(Permission denied\)"):
        check_ledger(tmp_path)
