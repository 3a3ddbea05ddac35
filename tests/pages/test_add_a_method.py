"""Every method has its four files, and docs/add_a_method.md adds one without changing another."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_docs_methods
from small_runs import PLAIN, SMALL, printer

import wsss.methods
from wsss.benchmark import steps
from wsss.benchmark.arguments import BenchmarkConfig
from wsss.benchmark.runner import Side, TimedSide
from wsss.core import places
from wsss.data.builtin import minivoc_root

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "add_a_method.md"
FILE_BLOCK = re.compile(r'^(`{3,})\w+ title="([^"]+)"\n(.*?)^\1$', re.MULTILINE | re.DOTALL)
PLAIN_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def missing_files(root: Path) -> list[str]:
    """List what the methods of a tree lack of code, settings, test and page."""
    missing, configured = [], set()
    for settings in sorted((root / "conf" / "method").glob("*.yaml")):
        target = re.search(r"_target_: wsss\.methods\.(\w+)\.", settings.read_text())
        if target is None:  # another one's settings, laid over
            assert "defaults:" in settings.read_text(), settings
            continue
        name = target[1]
        configured.add(name)
        code = f"src/wsss/methods/{name}.py"  # of a longer method: a folder
        if (root / "src" / "wsss" / "methods" / name).is_dir():
            code = f"src/wsss/methods/{name}/method.py"
        paths = [code, f"tests/methods/test_{name}.py", f"docs/methods/{name}.md"]
        missing += [path for path in paths if not (root / path).is_file()]
    for settings in sorted((root / "conf" / "random_walk").glob("*.yaml")):  # not one that maps
        configured |= {*re.findall(r"_target_: wsss\.methods\.(\w+)\.", settings.read_text())}
    methods = root / "src" / "wsss" / "methods"
    for path in sorted([*methods.glob("*.py"), *methods.glob("*/method.py")]):
        name = path.parent.name if path.name == "method.py" else path.stem
        if "(WSSSModule):" in path.read_text() and name not in configured:
            missing.append(f"conf/method/{name}.yaml")
    return missing


def files_of_the_page() -> dict[str, str]:
    """Path -> content of the files that the page shows."""
    return {path: text for _, path, text in FILE_BLOCK.findall(PAGE.read_text())}


def test_every_method_has_code_settings_test_and_page() -> None:
    assert missing_files(PROJECT) == []


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    files = files_of_the_page()
    assert sorted(files) == [
        "conf/method/toy.yaml",
        "docs/methods/toy.md",
        "src/wsss/methods/toy.py",
        "tests/methods/test_toy.py",
    ]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert missing_files(tmp_path) == []
    for path, text in files.items():
        (tmp_path / path).unlink()
        assert missing_files(tmp_path) == [path]
        (tmp_path / path).write_text(text)
    # the same as a folder
    (tmp_path / "src/wsss/methods/toy").mkdir()
    (tmp_path / "src/wsss/methods/toy.py").rename(tmp_path / "src/wsss/methods/toy/method.py")
    assert missing_files(tmp_path) == []
    (tmp_path / "conf/method/toy.yaml").unlink()
    assert missing_files(tmp_path) == ["conf/method/toy.yaml"]


def test_the_quirk_of_the_page_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = PLAIN_BLOCK.findall(PAGE.read_text())
    official = ModuleType("official")
    monkeypatch.setitem(sys.modules, "official", official)  # dataclasses look their module up
    exec(compile(text, str(PAGE), "exec"), official.__dict__)
    corrected, all_on = official.CORRECTED, official.OFFICIAL
    assert (corrected.padding_counts, all_on.padding_counts) == (False, True)
    assert "# Q1: " in text
    assert "`padding_counts` (Q1)" in PAGE.read_text()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configurations of this tree with the page's files, where the program looks for them."""
    root = tmp_path / "tree"
    shutil.copytree(PROJECT / "conf", root / "conf")
    (root / "experiments").symlink_to(PROJECT / "experiments")
    for path, text in files_of_the_page().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(places, "PACKAGE", root / "src" / "wsss")
    folders = [*wsss.methods.__path__, str(root / "src" / "wsss" / "methods")]
    monkeypatch.setattr(wsss.methods, "__path__", folders)
    yield root
    sys.modules.pop("wsss.methods.toy", None)


def test_the_toys_page_is_what_is_asked_of_pages(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "ROOT": tree,
        "DOCS": tree / "docs",
        "SOURCE": tree / "src" / "wsss",
        "CONF": tree / "conf" / "method",
    }
    for name, folder in folders.items():
        monkeypatch.setattr(test_docs_methods, name, folder)
    test_docs_methods.test_every_marker_and_link_leads_somewhere("methods/toy.md")
    test_docs_methods.test_a_page_has_its_sections_in_order("toy")
    test_docs_methods.test_configuration_is_that_of_the_method("toy")
    test_docs_methods.test_departures_are_those_of_the_docstring("toy")


@pytest.mark.slow
def test_the_page_adds_a_method_to_every_command(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = printer(capsys)
    monkeypatch.chdir(tmp_path)
    test = tree / "tests" / "methods" / "test_toy.py"
    tests: dict[str, object] = {}
    exec(compile(test.read_text(), test, "exec"), tests)
    for name, function in tests.items():
        if name.startswith("test_"):
            assert callable(function)
            function()

    assert "toco|toy" in printed("train", "--help")
    printed(
        "train",
        "method=toy",
        *SMALL,
        *PLAIN,
        "budget.max_steps=2",
        "budget.warmup_steps=1",
        "data.limit=4",
    )
    (run,) = Path("runs/default").glob("toycam-minivoc-s0-*")
    printed("eval", f"run={run}", "eval.cam_threshold=0.4", "out=again")
    assert json.loads((run / "results.json").read_text())["method"] == "Toy CAM"
    assert "Toy CAM (n=1)" in printed("compare", "runs/default", "by=method", "out=table.md")
    assert "Toy CAM (n=1)" in Path("table.md").read_text()
    printed("report", "runs/default", "out=report", "gallery=0", "resamples=50")
    assert "Toy CAM" in Path("report/index.html").read_text()
    printed("pseudo", f"run={run}", "out=labels")
    assert len(list(Path("labels").glob("*.png"))) == 4
    photos = Path("photos")
    photos.mkdir()
    shutil.copy(next((minivoc_root() / "VOC2012" / "JPEGImages").glob("*.jpg")), photos)
    printed("predict", f"run={run}", "images=photos", "out=masks")
    assert len(list(Path("masks").glob("*_overlay.jpg"))) == 1

    # a process of its own would look for the method in the true tree
    def one_step(config: BenchmarkConfig, group: list[Side]) -> list[dict[str, Any]]:
        (timed,) = (TimedSide(vars(config), side) for side in group)
        timed.step()
        return [timed.result()]

    monkeypatch.setattr(steps, "run_in_turn", one_step)
    tiny = ["backbone=vit_pico", "image_size=64", "num_classes=4", "repeats=1", "warmup=0"]
    shown = printed("benchmark", "method=toy", *tiny, "device=cpu", "out=step.json")
    assert "method=toy: no official way of computing is written down, ours alone" in shown
    (side,) = json.loads(Path("step.json").read_text())["sides"]
    assert (side["name"], list(side["losses"])) == ("ours", ["cls_loss"])
    options = ["image_size=64", "count=1", "repeats=1", "out=loading.json"]
    printed("benchmark", "part=data", "method=toy", *options)
    (loading,) = json.loads(Path("loading.json").read_text())["methods"]
    assert set(loading["images_per_second_fastest"]) == {"ours"}
    assert "no parity cases for method 'toy'" in printed("parity", "toy", "cases", status=2)
    assert "no converter for 'toy'" in printed("convert", "toy", "a.pth", "b.ckpt", status=2)
