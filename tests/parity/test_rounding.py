"""Tolerances follow the rounding of float32; a wrong number still fails."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from series import GOLDEN

from wsss.parity.cases import Case, Kind, allowed_for
from wsss.parity.run import compare, run_case
from wsss.parity.tolerances import EXACT, ROUNDING, Tolerance, rounding_error, widened

TIGHT = [
    ("toco", "f_energy", "out_lattice_AS"),
    ("toco", "f_ctc", "out_loss_per_image_tau0.5"),
    ("clustercam", "par", "out_10"),
    ("clustercam", "seg_loss", "loss"),
    ("clustercam", "gradients", "loss_seg"),
    ("clustercam", "cluster_block", "Z"),
    ("getam", "f_energy", "out_lattice_AS"),
    ("mctformer", "f_loss", "out_loss_cct"),
]


@pytest.mark.parametrize(("method", "name", "key"), TIGHT)
def test_rounding_passes_and_a_wrong_number_fails(
    method: str, name: str, key: str, tmp_path: Path
) -> None:
    kinds = import_module(f"wsss.parity.{method}").KINDS
    with np.load(GOLDEN.parent / method / f"{name}.npz", allow_pickle=False) as content:
        arrays = {k: content[k] for k in content.files}
    found = []
    for factor in (1 + 2.5e-6, 1 - 1e-4):
        changed = (arrays[key] * factor).astype(arrays[key].dtype)
        np.savez(tmp_path / f"{name}.npz", **{**arrays, key: changed})
        found.append(run_case(tmp_path / f"{name}.npz", kinds).problem)
    assert found[0] == ""
    assert found[1].startswith(f"{key} is off by")


def test_a_tolerance_is_at_least_the_rounding() -> None:
    values = np.array([0.0, -20.0, np.nan, 3.0], np.float32)
    assert widened(Tolerance(absolute=5e-5), values, 0.0).absolute == pytest.approx(20 * ROUNDING)
    assert widened(Tolerance(absolute=1.0), values, 0.0) == Tolerance(absolute=1.0)
    assert widened(Tolerance(relative=1e-6), values, 1e-3).absolute == pytest.approx(4e-3)
    assert 5e-6 < ROUNDING < 1e-5


@pytest.mark.parametrize("stated", [EXACT, Tolerance(relative=1e-12), Tolerance(relative=1e-8)])
def test_exact_and_float64_tolerances_stay(stated: Tolerance) -> None:
    assert widened(stated, np.array([5.0]), 1e-3) is stated
    assert widened(Tolerance(spare=0.1), np.array([5]), 0.0) == Tolerance(spare=0.1)


def test_what_rounding_cannot_explain_widens_nothing() -> None:
    double = np.array([10.0, 1.0])
    assert rounding_error(double + 5e-5, double) == pytest.approx(5e-5)
    assert rounding_error(double + 1e-3, double) == 0


def test_the_float64_twin_of_a_case_sets_the_bound() -> None:
    """A float32 run 6e-5 away from its float64 twin allows four times that, not twenty."""
    single = np.array([10.0, 1.0], np.float32)
    double = single.astype(np.float64) + 6e-5
    for inputs, names in ((None, ("out_x", "out64_x")), ((), ("x", "x_fp64"))):
        kind = Kind(lambda _: {}, {"": Tolerance(absolute=1e-6)}, inputs)
        case = Case("a", {}, {}, {}, dict(zip(names, (single, double), strict=True)))
        assert allowed_for(kind, case, names[0], single).absolute == pytest.approx(2.4e-4, rel=0.1)
        produced = {"x": single + 2e-4, "x_fp64": double}
        assert not compare(kind, case, produced).problem
        produced["x"] = single + 1.2e-3
        assert compare(kind, case, produced).problem.startswith(f"{names[0]} is off by")


def test_an_altered_array_does_not_excuse_itself() -> None:
    """An alteration makes the twins differ, which must not widen what is compared with them."""
    double = np.array([10.0, 1.0])
    kind = Kind(lambda _: {}, {"": Tolerance(absolute=5e-5)})
    case = Case("a", {}, {}, {}, {"out_x": (double * 1.0001).astype(np.float32), "out64_x": double})
    assert compare(kind, case, {"x": double}).problem.startswith("out_x is off by")
