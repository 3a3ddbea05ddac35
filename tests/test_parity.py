import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from series import GOLDEN

from wsss.errors import WSSSError
from wsss.parity import EXACT, LOSS, Tolerance, default_tolerance, deviation, run_parity
from wsss.parity.toco import KINDS


def copied(name: str, folder: Path, as_name: str | None = None, **changes: np.ndarray) -> None:
    """A golden file with changed (or, for None, removed) arrays."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as content:
        arrays = {key: content[key] for key in content.files} | changes
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez(folder / f"{as_name or name}.npz", **kept)


def test_every_visible_case_is_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("toco", GOLDEN) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(GOLDEN.glob("*.npz"))
    assert len(lines) == len(files) + 1
    for path, line in zip(files, lines, strict=False):
        with np.load(path, allow_pickle=False) as content:
            stored = sum(key.startswith(("out_", "out64_")) for key in content.files)
        # Everything the file holds was compared.
        assert re.match(rf"{path.stem} +{stored} arrays .* ok$", line), line
    assert lines[-1].startswith(f"toco: {len(files)} of {len(files)} cases ok")
    assert {path.stem for path in files} == set(KINDS)


def test_a_changed_number_fails_and_the_others_still_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(GOLDEN / "f_ptc.npz") as content:
        loss = content["out_loss_mixed"] * np.float32(1 + 1e-4)
    copied("f_ptc", tmp_path, out_loss_mixed=loss)
    copied("d_labels", tmp_path)
    shutil.copy(GOLDEN / "f_seg.npz", tmp_path)
    assert run_parity("toco", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" ok")
    assert "FAILED: out_loss_mixed is off by" in lines[1]
    assert lines[2].endswith(" ok")
    assert lines[3].startswith("toco: 2 of 3 cases ok, 1 failed, 0 not covered")


def test_an_output_that_nothing_produces_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied("f_seg", tmp_path, out_novelty=np.zeros(3, np.float32))
    assert run_parity("toco", tmp_path) == 1
    assert "FAILED: out_novelty was not produced" in capsys.readouterr().out


def test_kind_is_the_longest_known_stem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied("f_seg", tmp_path, as_name="f_seg_other")
    copied("f_seg", tmp_path, as_name="z_unknown")
    assert run_parity("toco", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"f_seg_other .* ok$", lines[0])
    assert re.match(r"z_unknown +not covered", lines[1])
    assert "1 of 2 cases ok, 0 failed, 1 not covered" in lines[2]


def test_corrupt_and_crippled_files_fail_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (GOLDEN / "e_par.npz").read_bytes()
    (tmp_path / "e_par.npz").write_bytes(content[: len(content) // 2])
    copied("f_ptc", tmp_path, in_tokens=None)
    copied("f_seg", tmp_path, as_name="f_seg_empty", **{k: None for k in seg_outputs()})
    copied("j_crf", tmp_path, out_prob_seg=np.zeros((2, 2), np.float32))
    assert run_parity("toco", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: not a readable .npz file" in lines[0]
    assert "FAILED: KeyError: 'tokens'" in lines[1]
    assert "FAILED: the file holds no out_* array" in lines[2]
    assert "FAILED: out_prob_seg has shape (6, 64, 64) instead of (2, 2)" in lines[3]


def seg_outputs() -> list[str]:
    with np.load(GOLDEN / "f_seg.npz") as content:
        return [key for key in content.files if key.startswith("out")]


def test_other_settings_are_taken_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = np.array('{"bkg_thre": 0.6, "high_thre": 0.7, "low_thre": 0.25}')
    copied("d_labels", tmp_path, cfg=cfg)
    assert run_parity("toco", tmp_path) == 1
    out = capsys.readouterr().out
    assert "out_label_nobox" in out
    assert "out_roi_mask" not in out


def test_empty_missing_and_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("toco", tmp_path) == 1
    assert "nothing was compared" in capsys.readouterr().out
    with pytest.raises(WSSSError, match="not a folder"):
        run_parity("toco", tmp_path / "nowhere")
    with pytest.raises(WSSSError, match="known: toco"):
        run_parity("afa", tmp_path)


def test_deviation_rules() -> None:
    nan = float("nan")
    assert deviation(np.array([1.0, nan]), np.array([1.0, nan])) == (0.0, 0.0)
    assert deviation(np.array([1.0, 2.0]), np.array([1.0, nan]))[0] == float("inf")
    assert deviation(np.array([2.0, nan]), np.array([1.0, 4.0]))[0] == float("inf")
    assert deviation(np.array([2.0, 4.0]), np.array([1.0, 4.0])) == (1.0, 0.25)
    assert deviation(np.float32(3), np.array([3.0])) == (0.0, 0.0)
    assert deviation(np.zeros((2, 3)), np.zeros((3, 2)))[0] == float("inf")
    assert deviation(np.array(["a", "b"]), np.array(["b", "a"]))[0] == float("inf")
    assert default_tolerance("loss_x", np.zeros(1, np.float32)) is LOSS
    assert default_tolerance("label", np.zeros(1, np.uint8)) is EXACT
    assert default_tolerance("cam", np.zeros(1, np.float32)) == Tolerance(absolute=5e-5)
