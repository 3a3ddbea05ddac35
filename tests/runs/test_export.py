"""Exported networks: equal outputs in their own readers, what is said in the file, refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import METHODS, PLAIN, SMALL

from wsss.core.errors import WSSSError
from wsss.core.modes import evaluating
from wsss.evaluation.inference import resized
from wsss.maps.pixels import normalise
from wsss.runs.compose import compose_run
from wsss.runs.export import Localisation, export, largest_difference
from wsss.runs.folder import Run
from wsss.runs.prepare import prepare

LINES = METHODS | {"toco": ["method.decoder_channels=16"], "mctformer": []}


def run_of(method: str) -> Run:
    plain = [one for one in PLAIN if "deterministic" not in one]
    torch.manual_seed(0)
    return prepare(compose_run([f"method={method}", *SMALL, *plain, *LINES[method]]))


@pytest.fixture(scope="module")
def toco() -> Run:
    return run_of("toco")


def test_onnx_runtime_gives_what_the_module_gives(
    toco: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also at a size that nobody compared, with the normalisation that the file states."""
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "toco.onnx"
    assert export(toco, out, size="dynamic") < 1e-4
    assert f"{out}: seg as onnx; on 4 images its outputs differ" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map["wsss"])
    assert said["class_names"] == ["background", *toco.data.class_names]
    assert said["palette"][:2] == [[0, 0, 0], [128, 0, 0]]
    assert said["size"] == "dynamic"

    rgb = toco.data.eval_dataset("val")[5]["rgb"]
    rgb = np.asarray(Image.fromarray(rgb).resize((104, 72)))
    image = ((rgb / 255 - said["mean"]) / said["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    found, classes = session.run(said["outputs"], {"image": image})
    with evaluating(toco.module):
        outputs = toco.module(normalise(rgb)[None])
    assert outputs.seg_logits is not None
    logits = resized(outputs.seg_logits, (72, 104))
    np.testing.assert_allclose(found, logits.softmax(1).numpy(), atol=1e-4)
    np.testing.assert_allclose(classes, outputs.class_logits.sigmoid().numpy(), atol=1e-4)


# MoRe's and the segmenters' graphs are parts of these
@pytest.mark.parametrize("method", ["clustercam", "getam", "tkp_pcl", "weclip"])
def test_every_segmentation_head_is_exported(method: str, tmp_path: Path) -> None:
    run = run_of(method)
    assert export(run, tmp_path / "net.pt2", kind="pt2", size="48x64") < 1e-5
    program = torch.export.load(tmp_path / "net.pt2")
    probabilities, classes = program.module()(torch.zeros(1, 3, 48, 64))
    assert probabilities.shape == (1, 9, 48, 64)
    assert classes.shape == (1, 8)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 48, 64))


def test_torchscript_holds_maps_and_no_more_than_they_need(toco: Run, tmp_path: Path) -> None:
    out = tmp_path / "maps.pt"
    export(toco, out, kind="torchscript", source="cam", size="64")
    extra = {"wsss.json": ""}
    with pytest.warns(FutureWarning, match="deprecated"):
        loaded = torch.jit.load(out, _extra_files=extra)
    said = json.loads(extra["wsss.json"])
    assert said["inputs"] == ["image", "labels"]
    assert said["class_names"] == list(toco.data.class_names)
    assert said["palette"][0] == [128, 0, 0]
    image, labels = torch.randn(1, 3, 64, 64), torch.eye(8)[[2]]
    (maps,) = loaded(image, labels)
    with evaluating(toco.module):
        (expected,) = Localisation(toco.module)(image, labels)
    torch.testing.assert_close(maps, expected)
    assert maps[0, 2].any()
    assert not maps[0, :2].any()
    needed = sum(p.numel() * 4 for p in toco.module.backbone.parameters())
    whole = sum(p.numel() * 4 for p in toco.module.parameters())
    assert out.stat().st_size < needed + 400_000 < whole


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"kind": "onxx"}, r"format=onxx: expected .*did you mean onnx"),
    "source": ({"source": "mask"}, r"source=mask: expected seg or cam"),
    "size": ({"size": "4"}, r"size=4: expected SIDE, .*patch of 8 px"),
    "size of a text": ({"size": "axb"}, r"size=axb: expected SIDE"),
    "dynamic script": ({"kind": "torchscript", "size": "dynamic"}, r"size=dynamic: TorchScript"),
    "images": ({"images": "no/where"}, r"no/where is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, toco: Run, tmp_path: Path) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(WSSSError, match=message):
        export(toco, tmp_path / "net.pt", **{"kind": "pt2"} | arguments)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_equal_leave_no_file(toco: Run, tmp_path: Path) -> None:
    """The network of a run that has gone astray; NaN equals nothing."""
    (tmp_path / "net.pt2").write_text("a previous one")
    bias = next(toco.module.decoder.parameters())  # type: ignore[union-attr]
    before = bias.detach().clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.raises(WSSSError, match=r"not written: .* by up to nan, more than tolerance"):
            export(toco, tmp_path / "net.pt2", kind="pt2", size="64")
    finally:
        bias.data.copy_(before)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "a previous one"


def test_the_largest_difference_is_of_all_outputs() -> None:
    zeros = torch.zeros(2, 3)
    other = zeros.clone()
    other[1, 2] = -0.5
    assert largest_difference([(zeros, zeros)] * 2, [(zeros, zeros), (zeros, other)]) == 0.5


@pytest.mark.parametrize(("method", "source"), [("getam", "cam"), ("mctformer", None)])
def test_maps_that_no_graph_holds_are_refused(
    method: str, source: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WSSSError, match=r"source=cam: .* decides by values in Python"):
        export(run_of(method), tmp_path / "net.pt2", kind="pt2", source=source)
    assert len(capfd.readouterr().err) < 500, "no graph is printed"
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(
    toco: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WSSSError, match=r"onnxscript \(pip install 'wsss\[export\]'\)"):
        export(toco, tmp_path / "net.onnx")
