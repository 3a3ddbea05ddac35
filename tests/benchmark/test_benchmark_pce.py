"""The timed alternatives compute the same loss."""

import json
from pathlib import Path

import pytest
import torch

from wsss.benchmark.pce import PCEArguments, make_patches, measure, pce_matrix
from wsss.cli import main
from wsss.methods.tkp_pcl.patches import pce_loss


def test_all_pairs_are_the_closed_form() -> None:
    patches, sets = make_patches(PCEArguments(width=8, num_classes=3), 40, torch.device("cpu"))
    assert sets.high.sum(-1).min() >= 2
    values = [way(patches, sets) for way in (pce_loss, pce_matrix)]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad(value, patches)[0] for value in values]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "pce.json"
    arguments = ["tokens=[8,16,32]", "width=8", "num_classes=2", "repeats=1", "device=cpu"]
    assert main(["benchmark", "part=pce", *arguments, f"out={out}"]) == 0
    summary = json.loads(out.read_text())
    assert [row["tokens"] for row in summary["rows"]] == [8, 16, 32]
    for row in summary["rows"]:
        assert row["closed form, value"] == pytest.approx(row["all pairs, value"], abs=1e-5)


def test_linear_growth_differs_from_quadratic() -> None:
    """At a few thousand patches the two exponents are far apart, however busy the machine."""
    config = PCEArguments(tokens=[1024, 4096], width=64, num_classes=4, repeats=3)
    exponents = measure(config, torch.device("cpu"))["exponents"]
    assert exponents["closed form"] < exponents["all pairs"]
