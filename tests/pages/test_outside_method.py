"""A method from outside the clone: a package that declares it, and a folder of settings."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import PLAIN, SMALL, printer
from test_add_a_method import files_of_the_page

from wsss.benchmark import steps
from wsss.benchmark.arguments import BenchmarkConfig
from wsss.benchmark.runner import Side, TimedSide
from wsss.core.places import choices
from wsss.data.builtin import minivoc_root
from wsss.runs.line import compose_line
from wsss.training.search import Plan, plan_search

TINY = [*SMALL, *PLAIN, "budget.max_steps=2", "budget.warmup_steps=1", "data.limit=4"]
METADATA = "Metadata-Version: 2.1\nName: labtoy\nVersion: 1.0\n"
DECLARED = """[wsss.methods]
labtoy = labtoy.method:LabCAM
[wsss.views]
labtoy = labtoy.views:LabView
"""
VIEW = '''"""The views of the toy."""

from wsss.data.views.clustercam import ClusterCAMView


class LabView(ClusterCAMView):
    """The same square crop."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose code and settings are the page's, on ``sys.path`` but not declared."""
    site = tmp_path / "site"
    files = files_of_the_page()
    code = files["src/wsss/methods/toy.py"].replace("ToyCAM", "LabCAM")
    settings = files["conf/method/toy.yaml"].replace(
        "wsss.methods.toy.ToyCAM", "labtoy.method.LabCAM"
    )
    settings = settings.replace("wsss.data.views.clustercam.ClusterCAMView", "labtoy.views.LabView")
    for path, text in {
        "__init__.py": "",
        "method.py": code.replace("Toy CAM", "Lab CAM"),
        "views.py": VIEW,
        "conf/method/labtoy.yaml": settings,
        "conf/space/labtoy.yaml": "method.lr: {low: 1e-6, high: 1e-2, log: true}\n",
    }.items():
        (site / "labtoy" / path).parent.mkdir(parents=True, exist_ok=True)
        (site / "labtoy" / path).write_text(text)
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    yield site
    for name in [name for name in sys.modules if name.split(".")[0] == "labtoy"]:
        del sys.modules[name]


def declare(site: Path) -> None:
    """Install the package, as far as Python can see."""
    info = site / "labtoy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(DECLARED)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    return printer(capsys)


def planned(line: list[str]) -> Plan:
    """Plan a search that begins at a line."""
    return plan_search(line, trials=2, startup=1, seed=0)


def one_step(config: BenchmarkConfig, group: list[Side]) -> list[dict[str, Any]]:
    """Time a side here: another process would not have the package on its path."""
    (timed,) = (TimedSide(vars(config), side) for side in group)
    timed.step()
    return [timed.result()]


def test_an_undeclared_package_is_neither_found_nor_run(
    package: Path, printed: Callable[..., str]
) -> None:
    assert "labtoy" not in choices("method")
    assert "method=labtoy: no such choice" in printed("train", "method=labtoy", status=2)
    declare(package)
    assert "labtoy" in choices("method")
    assert "labtoy" not in sys.modules  # to list it is not to run it
    assert "did you mean method.lr?" in printed(
        "train", "method=labtoy", "method.lrr=1", *TINY, status=2
    )
    assert "labtoy.method" not in sys.modules
    assert "method.lr float > 0" in printed("train", "method=labtoy", "--keys", "method.lr")
    assert set(planned(["method=labtoy", "data=minivoc"]).space) == {"method.lr"}


@pytest.mark.slow
def test_a_declared_method_runs_through_every_verb(
    package: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(package)
    printed("train", "method=labtoy", *TINY)
    (run,) = Path("runs/default").glob("labcam-minivoc-s0-*")
    (run / "results.json").unlink()  # stopped before it was scored: it goes on
    printed("train", "method=labtoy", *TINY)
    assert json.loads((run / "results.json").read_text())["method"] == "Lab CAM"
    printed("eval", f"run={run}", "eval.cam_threshold=0.4", "out=again")
    assert "Lab CAM (n=1)" in printed("compare", "runs/default")
    printed("report", "runs/default", "out=report", "gallery=0", "resamples=50")
    assert "Lab CAM" in Path("report/index.html").read_text()
    printed("pseudo", f"run={run}", "out=labels")
    assert len(list(Path("labels").glob("*.png"))) == 4
    Path("photos").mkdir()
    shutil.copy(next((minivoc_root() / "VOC2012" / "JPEGImages").glob("*.jpg")), "photos")
    printed("predict", f"run={run}", "images=photos", "out=masks")
    assert "no parity cases for method 'labtoy'" in printed("parity", "labtoy", ".", status=2)
    monkeypatch.setattr(steps, "run_in_turn", one_step)
    tiny = ["backbone=vit_pico", "image_size=64", "num_classes=4", "repeats=1", "warmup=0"]
    assert "ours alone" in printed("benchmark", "method=labtoy", *tiny, "device=cpu")
    # without its declaration the stored run is a stranger's
    shutil.rmtree(package / "labtoy-1.0.dist-info")
    assert "trust=[labtoy]" in printed("eval", f"run={run}", "out=more", status=2)
    printed("eval", f"run={run}", "out=more", "trust=[labtoy]")


@pytest.mark.slow
def test_a_folder_of_settings_is_enough_with_the_word_trust(
    package: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ["--config-dir", str(package / "labtoy" / "conf")]
    printed("train", "method=labtoy", *TINY, *folder)
    (run,) = Path("runs/default").glob("labcam-minivoc-s0-*")
    assert "trust=[labtoy]" in printed("eval", f"run={run}", "out=again", status=2)
    printed("eval", f"run={run}", "out=again", "trust=[labtoy]")
    monkeypatch.setattr(steps, "run_in_turn", one_step)
    tiny = ["backbone=vit_pico", "image_size=64", "num_classes=4", "repeats=1", "warmup=0"]
    assert "ours alone" in printed("benchmark", *folder, "method=labtoy", *tiny, "device=cpu")
    lines = ["method=labtoy", f"hydra.searchpath=[file://{folder[1]}]", "data=minivoc"]
    assert compose_line(lines).method["_target_"] == "labtoy.method.LabCAM"
    assert set(planned(lines).space) == {"method.lr"}
    outside = ["tune", *folder, "method=labtoy", "data=minivoc", "method.lr=0.1"]
    assert "method.lr=0.1: outside of 1e-06 to 0.01" in printed(*outside, status=2)
