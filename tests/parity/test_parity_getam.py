"""The stored numbers of GETAM's official code, through the same command as for users."""

from pathlib import Path

import numpy as np
import pytest
from series import GOLDEN

from wsss.parity.run import run_parity

CASES = sorted(path.stem for path in (GOLDEN.parent / "getam").glob("*.npz"))


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{name}.npz").symlink_to(GOLDEN.parent / "getam" / f"{name}.npz")
    assert run_parity("getam", tmp_path) == 0, capsys.readouterr().out


def test_every_kind_is_there() -> None:
    kinds = {"a_encoder", "b_network", "c_cam", "d_pamr", "e_complete", "e_pipeline", "f_ce"}
    kinds |= {"f_energy", "f_saliency", "g_phase1", "g_phase2", "h_optim", "i_inference", "j_data"}
    assert kinds <= set(CASES)


@pytest.mark.parametrize(
    ("name", "array", "change"),
    [
        ("c_cam", "out_map", 1.001),
        ("e_complete", "out_label_normal", 0),
        ("g_phase1", "out_lr_phase1", 1.0001),
        ("h_optim", "out_sched_short", 1.0001),
        ("j_data", "out_image", 1.01),
    ],
)
def test_a_wrong_number_is_noticed(
    name: str, array: str, change: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(GOLDEN.parent / "getam" / f"{name}.npz", allow_pickle=False) as content:
        arrays = {key: content[key] for key in content.files}
    arrays[array] = (arrays[array] * change).astype(arrays[array].dtype)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    assert run_parity("getam", tmp_path) == 1
    assert f"{array} is off by" in capsys.readouterr().out
