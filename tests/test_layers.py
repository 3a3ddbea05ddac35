"""The folders of ``src/wsss`` import only from folders below them, and no import hides a circle."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from layers import FILES, LATE, PICTURE, ROWS, SOURCE, arrows, draw, folder_of, imports_of

ROW_OF = {folder: row for row, folders in enumerate(ROWS) for folder in folders}
ARROWS = arrows()
#: what a method may import beside its own folder
OF_ALL_METHODS = {"base", "settings", "losses", "schedules"}
#: who may import ``wsss`` itself: for its version, for the list of public names, or, where
#: Lightning has its users call a method's class, for ``wsss.load_run``
OF_THE_FACE = {
    "wsss.cli",
    "wsss.evaluation.card",
    "wsss.methods.base",
    "wsss.runs.conversion",
    "wsss.runs.stored",
}
#: who may import by name: what is known only when it is called
BY_NAME = {"wsss", "wsss.cli", "wsss.core.declarations", "wsss.parity.run", "wsss.runs.stored"}
#: files that start before anything heavy may be imported
LIGHT = ["cli", "core.errors", "core.failures", "core.places"]


def broken_rule(module: str, other: str) -> str:
    """Which rule an import breaks; empty where none."""
    own, its = folder_of(module), folder_of(other)
    if not its:
        return "" if module in OF_THE_FACE else "the package's face imports everything"
    if own == its:
        return ""
    if not own:
        return "the package's face imports on first use"
    if ROW_OF[its] > ROW_OF[own]:
        return f"{own} lies below {its}"
    if ROW_OF[its] == ROW_OF[own]:
        return f"{own} and {its} stand side by side"
    return ""


def test_flat_files_are_the_command_and_the_face() -> None:
    assert sorted(path.name for path in (SOURCE / "wsss").glob("*.py")) == ["__init__.py", "cli.py"]
    assert {folder_of(module) for module in FILES} - {""} == {*ROW_OF}


def test_folders_import_from_below() -> None:
    for module, others in ARROWS.items():
        for other in sorted(others):
            reason = broken_rule(module, other)
            assert not reason, f"{module} imports {other}: {reason}"


def test_modules_form_no_circle() -> None:
    try:
        graphlib.TopologicalSorter(ARROWS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_of_ours_is_nested() -> None:
    """But for commands, which check their line before they import what is slow."""
    for module, path in FILES.items():
        if folder_of(module) == LATE:
            continue
        nested = {n for n in imports_of(path.read_text(), nested=True) if n in FILES}
        assert not nested, f"{module} imports {nested} inside a function or condition"


def parts_of(module: str) -> list[str]:
    return module.split(".")[2:]


def test_methods_know_no_other_method() -> None:
    for module, others in ARROWS.items():
        own = parts_of(module)
        if folder_of(module) != "methods" or not own or own[0] in (*OF_ALL_METHODS, "official"):
            continue
        for other in sorted(others):
            if folder_of(other) == "methods":
                its = next(iter(parts_of(other)), "")
                assert its in {own[0], *OF_ALL_METHODS}, f"{module} imports {other}"


def test_pure_parts_of_methods_know_no_lightning() -> None:
    for module, path in FILES.items():
        own = parts_of(module)
        if folder_of(module) != "methods" or len(own) != 2 or own[1] == "method":
            continue
        if "(WSSSModule):" in path.read_text():  # a second method on the same parts
            continue
        for other in sorted(imports_of(path.read_text(), nested=False)):
            pure = "lightning" not in other and not other.endswith((".method", "methods.base"))
            assert pure, f"{module} imports {other}"
            if own[1] == "official":
                inside = folder_of(other) == "methods" and other in FILES
                assert not inside or parts_of(other)[0] == "settings", f"{module} imports {other}"


@pytest.mark.parametrize("module", LIGHT)
def test_what_starts_first_is_light(module: str) -> None:
    for other in imports_of(FILES[f"wsss.{module}"].read_text(), nested=False):
        if other in FILES:
            assert other == "wsss" or other.removeprefix("wsss.") in LIGHT
        else:
            assert other.partition(".")[0] in sys.stdlib_module_names, other


def test_picture_is_that_of_the_code() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run: python tools/layers.py"


def test_few_files_import_by_name() -> None:
    found = {name for name, path in FILES.items() if "import_module(" in path.read_text()}
    assert found <= BY_NAME


def test_method_files_are_short() -> None:
    """A method is read in one file of 360 lines, its functions in one look of 60."""
    for path in sorted((SOURCE / "wsss" / "methods").rglob("method.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 360, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_names_of_tests_are_short() -> None:
    for path in Path(__file__).parent.rglob("test_*.py"):
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), flags=re.MULTILINE):
            assert len(name) <= 60, f"{path}: {name}"
