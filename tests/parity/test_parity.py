import re
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from series import GOLDEN

from wsss.core.errors import WSSSError
from wsss.parity import METHODS
from wsss.parity.cases import Case, Kind, read_case
from wsss.parity.run import compare, run_parity
from wsss.parity.tolerances import EXACT, LOSS, Tolerance, default_tolerance, deviation


def copied(name: str, folder: Path, as_name: str | None = None, **changes: np.ndarray) -> None:
    """A golden file with changed (or, for None, removed) arrays."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as content:
        arrays = {key: content[key] for key in content.files} | changes
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez(folder / f"{as_name or name}.npz", **kept)


@pytest.mark.parametrize("method", METHODS)
def test_every_visible_case_is_ok(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, kinds = GOLDEN.parent / method, import_module(f"wsss.parity.{method}").KINDS
    assert run_parity(method, folder) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(folder.glob("*.npz"))
    assert len(lines) == len(files) + 1
    covered = set()
    for path, line in zip(files, lines, strict=False):
        stem = max((stem for stem in kinds if path.stem.startswith(stem)), key=len)
        covered.add(stem)
        stored = len(read_case(path, kinds[stem].inputs).outputs)
        # Everything the file holds was compared.
        assert re.match(rf"{path.stem} +{stored} arrays .* ok$", line), line
    assert lines[-1].startswith(f"{method}: {len(files)} of {len(files)} cases ok")
    assert covered == set(kinds)


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
    copied("f_ctc", tmp_path, in_student=None)
    copied("f_seg", tmp_path, as_name="f_seg_empty", **{k: None for k in seg_outputs()})
    copied("j_crf", tmp_path, out_prob_seg=np.zeros((2, 2), np.float32))
    assert run_parity("toco", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: not a readable .npz file" in lines[0]
    assert "FAILED: nothing could be compared (the file lacks in_student; 14 arrays" in lines[1]
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


def test_arrays_of_plain_names_are_sorted_by_their_kind(tmp_path: Path) -> None:
    arrays = {
        "image": 1,
        "x": 2.0,
        "y_fp64": 3.0,
        "control_x": 4,
        "fp32_error": 5,
        "param_names": 6,
    }
    np.savez(tmp_path / "a.npz", config='{"depth": 2}', x_margin_lt_1e5=7, **arrays)
    case = read_case(tmp_path / "a.npz", ("image",))
    assert case.settings == {"depth": 2}
    assert set(case.inputs) == {"image"}
    assert set(case.outputs) == {"x", "y_fp64"}
    assert set(case.extra) == {"control_x", "fp32_error", "param_names", "x_margin_lt_1e5"}


def test_plain_outputs_are_each_compared_under_their_own_name() -> None:
    kind = Kind(lambda _: {}, {"": Tolerance(relative=1e-3), "out_fp64": Tolerance(1e-9)}, ())
    case = Case("a", {}, {}, {}, {"out": np.ones(2), "out_fp64": np.ones(2), "out_1": np.ones(2)})
    near = np.array([1.0, 1.0001])
    report = compare(kind, case, {"out": near, "out_fp64": near, "out_1": near})
    assert report.compared == 3
    assert report.problem.startswith("out_fp64 is off by 1.00e-04")
    assert "out_1 was not produced" in compare(kind, case, {"out": near, "out_fp64": near}).problem


@pytest.mark.parametrize(
    ("spare", "fits"), [(0.0, False), (0.2, True), (0.1, False), ("few", True)]
)
def test_a_stated_number_of_entries_may_be_off(spare: float | str, fits: bool) -> None:
    expected, actual = np.arange(10), np.arange(10)
    actual[:2] = 77
    kind = Kind(lambda _: {}, {"label": Tolerance(spare=spare)}, ())
    case = Case("a", {}, {}, {"few": np.array(2)}, {"label": expected})
    assert (not compare(kind, case, {"label": actual}).problem) is fits


def test_masked_entries_are_not_compared() -> None:
    kind, expected = Kind(lambda _: {}, {}, ()), np.array([1.0, 2.0])
    case = Case("a", {}, {}, {}, {"x": expected})
    off = np.array([1.0, 9.0])
    assert not compare(kind, case, {"x": np.ma.array(off, mask=[False, True])}).problem
    assert compare(kind, case, {"x": np.ma.array(off, mask=[True, False])}).problem


@pytest.mark.parametrize(
    ("name", "key"),
    [("cluster_block", "G"), ("cam", "cam_refined"), ("init_map", "random_mean_std_max")],
)
def test_a_changed_number_of_clustercam_fails(
    name: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(GOLDEN.parent / "clustercam" / f"{name}.npz") as content:
        arrays = {k: content[k] for k in content.files}
    arrays[key] = arrays[key] * np.float32(1.0001)
    np.savez(tmp_path / f"{name}_other.npz", **arrays)
    assert run_parity("clustercam", tmp_path) == 1
    assert f"FAILED: {key} is off by" in capsys.readouterr().out


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
