"""The pages of the methods say what the code, its settings and its figures say."""

import ast
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # the tools are scripts, not a package

import docs_hooks  # noqa: E402

from wsss.methods.settings import StepQuirks  # noqa: E402

DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "wsss"
CONF = ROOT / "conf" / "method"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SECTIONS = [
    "Idea",
    "Computation",
    "Equations and code",
    "Configuration",
    "Schedule",
    "Departures",
    "Several processes",
    "Known and chosen",
    "Cost",
    "Results",
    "How exact",
    "On VOC and COCO",
]
# a variant lies on the page of the method that it overlays
METHODS = [
    path.stem
    for path in sorted(CONF.glob("*.yaml"))
    if f"_target_: wsss.methods.{path.stem}." in path.read_text(encoding="utf-8")
]
WITH_GOLDEN = sorted(path.name for path in (ROOT / "tests" / "golden").iterdir() if path.is_dir())
SWITCH = re.compile(r"`(\w+)`")
Q_ITEM = re.compile(r"\bQ\d+b?\b")


def text_of(method: str) -> str:
    return (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")


def section(method: str, title: str) -> str:
    assert f"\n## {title}\n" in text_of(method), f"docs/methods/{method}.md lacks '## {title}'"
    return re.split(r"^## ", text_of(method), flags=re.MULTILINE)[SECTIONS.index(title) + 1]


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells, without its heading, of every table in a text."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    rows = [[[c.strip() for c in row.split("|")[1:-1]] for row in t.splitlines()] for t in found]
    return [table[2:] for table in rows]


def docstring_of(method: str) -> str:
    path = SOURCE / "methods" / method / "method.py"
    path = path if path.is_file() else path.parents[1] / f"{method}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring is not None
    return docstring


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, inner in settings.items()
        for key, value in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_marker_and_link_leads_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    resolved = docs_hooks.FENCE.sub("", docs_hooks.resolve(text, page, root=ROOT))
    assert not re.search(r"(?<!`)\{\{code:", resolved)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_has_its_sections_in_order(method: str) -> None:
    assert re.findall(r"^## (.*)$", text_of(method), flags=re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("method", METHODS)
def test_configuration_is_that_of_the_method(method: str) -> None:
    settings = OmegaConf.load(CONF / f"{method}.yaml")
    settings.pop("defaults", None)
    config = flat(OmegaConf.to_container(settings, resolve=False))
    rows = tables(section(method, "Configuration"))[0]
    # YAML as the settings are read, in which 6e-5 is a number
    listed = OmegaConf.create("values:\n" + "\n".join(f"- {row[1].strip('`')}" for row in rows))
    values = OmegaConf.to_container(listed, resolve=False)["values"]
    stated = dict(zip((row[0].strip("`") for row in rows), values, strict=True))
    assert stated == {key: value for key, value in config.items() if "_target_" not in key}


def quirks_of(method: str) -> dict[str, list[str]]:
    """Switch -> its Q-numbers, from the comments above and behind the fields of ``Quirks``."""
    text = (SOURCE / "methods" / method / "official.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    (quirks,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == "Quirks"
    )
    found = {}
    for field in quirks.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = [lines[field.lineno - 1].partition("#")[2]]
            above = field.lineno - 2
            while lines[above].strip().startswith("#"):
                said.insert(0, lines[above])
                above -= 1
            assert " ".join(said).strip(), f"{method}: {field.target.id} says nothing"
            found[field.target.id] = Q_ITEM.findall(" ".join(said))
    return found | {field.name: [] for field in fields(StepQuirks)}  # of every code, no item of one


@pytest.mark.parametrize("method", WITH_GOLDEN)
def test_departures_are_the_switches_of_the_code(method: str) -> None:
    rows = tables(section(method, "Departures"))[0]
    listed = {name: Q_ITEM.findall(row[0]) for row in rows for name in SWITCH.findall(row[0])}
    assert listed == quirks_of(method)
    assert len(rows) == len(listed)
    official = SOURCE / "methods" / method / "official.py"
    assert set(Q_ITEM.findall(text_of(method))) == set(Q_ITEM.findall(official.read_text()))


@pytest.mark.parametrize("method", sorted({*METHODS} - {*WITH_GOLDEN}))
def test_departures_are_those_of_the_docstring(method: str) -> None:
    docstring = docstring_of(method)
    listed = re.search(r"^Departures.*:\n((?: {4}.*\n?)+)", docstring, flags=re.MULTILINE)
    assert listed is not None
    bullets = re.findall(r"^ {4}\* ([^:\n]*)", listed[1], flags=re.MULTILINE)
    rows = [row[0] for row in tables(section(method, "Departures"))[0]]
    assert [Q_ITEM.findall(row) for row in rows] == [Q_ITEM.findall(head) for head in bullets]
    assert set(Q_ITEM.findall(text_of(method))) == set(Q_ITEM.findall(docstring))


@pytest.mark.parametrize("method", WITH_GOLDEN)
def test_parity_cases_are_those_that_are_there(method: str) -> None:
    rows = tables(section(method, "How exact"))[0]
    named = [case for row in rows for case in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(p.stem for p in (ROOT / "tests/golden" / method).glob("*.npz"))


@pytest.mark.parametrize("method", METHODS)
def test_experiments_that_a_page_names_exist(method: str) -> None:
    for name in re.findall(r"\+experiments=(\w+/\w+)", text_of(method)):
        assert (ROOT / "experiments" / f"{name}.yaml").is_file(), name


def in_one_line(method: str) -> str:
    return " ".join(section(method, "Cost").split())


@pytest.mark.parametrize("method", WITH_GOLDEN)
def test_figures_of_a_step_are_those_measured(method: str) -> None:
    (name,) = re.findall(r"\.\./benchmarks/(\w+\.json)", section(method, "Cost"))
    ours, official = json.loads((DOCS / "benchmarks" / name).read_text())["sides"]
    gigabytes = [side["peak_memory_bytes"] / 2**30 for side in (ours, official)]
    said = in_one_line(method)
    # figures of before 2026-11-27 have the ratio of the fastest steps, for sides were not paired
    ratio = official.get("ratio", official.get("ratio_fastest"))
    assert (
        f"{ours['fastest_seconds']:.1f} s, computed the official way "
        f"{official['fastest_seconds']:.1f} s ({ratio:.2f} times)"
    ) in said
    memory = f"{gigabytes[0]:.1f} and {gigabytes[1]:.1f} GiB ({official['ratio_memory']:.2f} times)"
    assert memory in said


def test_figures_of_the_contrast_are_those_measured() -> None:
    measured = json.loads((DOCS / "benchmarks" / "pce_cpu.json").read_text())
    ways = ("closed form", "all pairs")
    closed, pairs = (round(1000 * measured["rows"][-1][way]) for way in ways)
    first, second = (measured["exponents"][way] for way in ways)
    said = in_one_line("tkp_pcl")
    assert f"{measured['rows'][-1]['tokens']:,} patches takes {closed} ms" in said
    assert f"{pairs} ms as matrices" in said
    assert f"patches^{first:.2f} and patches^{second:.2f}" in said


def test_waits_of_a_step_are_those_counted() -> None:
    counted = json.loads((ROOT / "tests" / "device_figures.json").read_text())
    found = {
        method: [sum(figures[p]["waits"].values()) for p in ("first phase", "second phase")]
        for method, figures in counted.items()
        if "first phase" in figures and not method.startswith("segmenter")
    }
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (table,) = (rows for rows in tables(page) if any("finite loss" in row[-1] for row in rows))
    names = {"MCTformer+": "mctformer", "TKP-PCL": "tkp_pcl"}
    listed = {names.get(row[0], row[0].lower()): [int(n) for n in row[1:3]] for row in table}
    assert listed == found


# ---- the hook ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "README.md").touch()
    package = tmp_path / "src" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "part.py").write_text(
        '"""Has LIMIT in its docstring."""\n'  # 1
        "LIMIT = 3\n"
        "\n"
        "\n"
        "class Thing:\n"  # 5
        "    size: int\n"
        "\n"
        "    @property\n"
        "    def half(self) -> int:\n"
        '        """Returns half the size."""\n'  # 10
        "        # a note\n"
        "        return self.size // 2\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pack", "src/pack/__init__.py"),
        ("pack.part", "src/pack/part.py"),
        ("pack.part:LIMIT", "src/pack/part.py:2"),
        ("pack.part:Thing", "src/pack/part.py:5"),
        ("pack.part:Thing.size", "src/pack/part.py:6"),
        ("pack.part:Thing.half", "src/pack/part.py:9"),
        ('pack.part:Thing.half@"size"', "src/pack/part.py:12"),
        ('pack.part:Thing@"a note"', "src/pack/part.py:11"),
        ('pack.part@"LIMIT"', "src/pack/part.py:2"),
    ],
)
def test_marker_is_a_place_in_the_source(repository: Path, spec: str, expected: str) -> None:
    page = f"See {{{{code:{spec}}}}}."
    assert docs_hooks.resolve(page, "methods/a.md", root=repository) == f"See `{expected}`."


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("pack.gone", "no module pack.gone"),
        ("pack.part:Gone", "nothing there is called Gone"),
        ("pack.part:Thing.gone", "nothing there is called gone"),
        ("pack.part:LIMIT.size", "nothing there is called LIMIT"),
        ('pack.part:Thing.half@"LIMIT"', 'no line of it has "LIMIT"'),
        ("pack part", "expected MODULE"),
    ],
)
def test_marker_that_leads_nowhere_is_named(repository: Path, spec: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"docs/methods/a.md: {{{{code:{spec}}}}}: {reason}")
    ):
        docs_hooks.resolve(f"{{{{code:{spec}}}}}", "methods/a.md", root=repository)


def test_links_that_leave_the_site(repository: Path) -> None:
    rest = "[two](../b.md) [three](https://x.org/a.md)"
    page = f"[one](../../experiments/README.md) {rest} {{{{code:pack}}}}"
    plain, known = (
        docs_hooks.resolve(page, "methods/a.md", root=repository, repo_url=url)
        for url in (None, "https://host/wsss/")
    )
    assert plain == f"one (`experiments/README.md`) {rest} `src/pack/__init__.py`"
    base = "https://host/wsss/blob/HEAD"
    code = f"[`src/pack/__init__.py`]({base}/src/pack/__init__.py)"
    assert known == f"[one]({base}/experiments/README.md) {rest} {code}"
    with pytest.raises(ValueError, match="no such file"):
        docs_hooks.resolve("[a](../../gone.md)", "methods/a.md", root=repository)


def test_code_stays_as_it_is(repository: Path) -> None:
    page = """Write `{{code:MODULE:NAME}}`, e.g. {{code:pack}}:

````markdown title="a.md"
```text
{{code:gone}} [a](../../gone.md)
```
{{code:gone}}
````

  ~~~
{{code:gone}}
  ~~~
And {{code:pack.part:LIMIT}}
"""
    expected = page.replace("{{code:pack}}", "`src/pack/__init__.py`")
    expected = expected.replace("{{code:pack.part:LIMIT}}", "`src/pack/part.py:2`")
    assert docs_hooks.resolve(page, "methods/a.md", root=repository) == expected


def test_mkdocs_calls_the_hook() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/toco.md"))
    marker = "{{code:wsss.methods.toco.method:ToCo}}"
    config = SimpleNamespace(repo_url="https://host/wsss")
    made = docs_hooks.on_page_markdown(marker, page=page, config=config, files=None)
    assert re.fullmatch(
        r"\[`src/wsss/methods/toco/method.py:(\d+)`\]\(https://host/.*/method.py#L\1\)", made
    )
