"""The command line itself: what it says, how fast, and how it refuses."""

import subprocess
import sys
import time

import pytest

from wsss.cli import VERBS, main

HEAVY = ("torch", "lightning", "timm", "hydra", "numpy")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    result = _python(
        f"import sys; from wsss.cli import main; status = main({arguments!r});"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr);"
        "sys.exit(status)"
    )
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
    assert "wsss" in result.stdout


def test_help_answers_in_a_second() -> None:
    # the fastest of three, so that a busy machine does not decide
    def once() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "wsss.cli", "--help"], capture_output=True, check=True
        )
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 1.0


def test_overview_says_what_every_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[4:]]
    summaries = {row[0]: row[1] for row in rows if len(row) == 2}
    assert VERBS.keys() <= summaries.keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean 'train'"),
        (["parity", "toco"], "usage: wsss parity METHOD DIR"),
        (["convert", "toco"], "usage: wsss convert"),
        (["parity", "toco", "no/such/folder"], "no/such/folder"),
        (["eval", "run=no/such/run"], "no/such/run"),
        (["data"], "usage: wsss data prepare voc|coco"),
        (["data", "prepare", "coca", "root=x"], "usage: wsss data prepare voc|coco"),
        (["data", "prepare", "voc"], "root is missing"),
        (["data", "prepare", "voc", "root=no/such"], "no/such is missing"),
        (["submit", "run=no/such/run"], "no/such/run"),
        (["train", "data=coco"], "data.root"),
        (["train", "data=table", "data.root=no/such"], "data folder no/such is missing"),
        (["eval"], "run"),
        (["eval", "rum=x"], "run"),
        (["eval", "masks=no/such/folder", "data=minivoc", "data.limit=4"], "no/such/folder"),
        (["eval", "run=x", "masks=y"], "one of run="),
        (["eval", "run=x", "name=IRN"], "name=IRN"),
        (["eval", "run=x", "seed=1"], "seed=1"),
        (["eval", "masks=x", "kind=boundary"], "kind=boundary"),
        (["compare"], "no run is given"),
        (["compare", "no/such/run"], "no/such/run"),
        (["compare", "x", "--by"], "--by: a value is missing"),
        (["compare", "x", "metrc=seed_miou"], "did you mean metric"),
        (["compare", "x", "out=table.docx"], "ending in .md"),
        (["report", "no/such/run", "out=report"], "no/such/run"),
        (["report", "x"], "out is missing"),
        (["benchmark", "part=crv"], "part=crv"),
        (["train", "data=minivoc", "eval.crf_backend=cuda"], "eval.crf_backend='cuda'"),
        (["predict", "run=no/such/run", "images=x", "out=y"], "no/such/run"),
        (["pseudo", "run=no/such/run"], "no/such/run"),
        (["pseudo", "run=no/such/run", "source=cams"], "source=cams"),
        (["pseudo", "rum=x"], "run"),
        (["benchmark", "part=pce", "tokens=[64]"], "tokens"),
        (["train", "method=segmenter", "data=minivoc"], "data.train_masks"),
        (["train", "method=segmenter", "data=minivoc", "data.train_masks=no/masks"], "no/masks"),
        (["convert", "toco", "no/such.pth", "out.ckpt"], "no/such.pth"),
        (["convert", "tocco", "x.pth", "out.ckpt"], "tocco"),
        (["convert", "toco", "x.pth", "out.pt"], ".ckpt"),
        (["train", "method=tocco"], "toco"),
        (["train", "method.ptc_wieght=0", "data=minivoc"], "method.ptc_weight"),
        (["train", "+method.ptc_wieght=0", "data=minivoc"], "method.ptc_weight"),
        (["train", "data=minivoc", "method.ptc_weight=high"], "method.ptc_weight"),
        (["train", "data=minivoc", "+budgett=3"], "budget"),
        (["train", "data=minivoc", "method.lr=nan"], "method.lr=nan: expected a finite number"),
        (["train", "data=minivoc", "method.scales=[1,inf]"], "method.scales.1=inf"),
        (["train", "data=minivoc", "eval.cam_threshold=nan"], "eval.cam_threshold=nan"),
        (["train", "data=minivoc", "seed=zero"], "seed"),
        (["train", "data=minivoc", "budget.max_steps=true"], "budget.max_steps"),
        (["train", "data=minivoc", "eval.crff=toco"], "eval.crf"),
        (["train", "data=minivoc", "+trainer.precisoin=16"], "trainer.precision"),
        (["train", "data=minivoc", "+experiments=toco/minivok"], "toco/minivoc"),
        (["train", "data=voc"], "data.root"),
        (["train", "data=voc", "data.root=no/such/VOC", "backbone.weights=random"], "no/such/VOC"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: "pytest.TempPathFactory",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(tmp_path))
    try:
        status = main(arguments)
    except SystemExit as leave:  # Hydra's main ends the process itself
        status = int(leave.code or 0)
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "something was written"  # type: ignore[attr-defined]
