"""The documentation site: no page needs a network, every method and recipe has its place."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from docs_hooks import FENCE
from docs_site import fetched_from_elsewhere, with_every_method

import wsss

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("content", "suffix", "expected"),
    [
        ('<script src="https://a.example/x.js"></script>', ".html", ["https://a.example/x.js"]),
        ('<link rel="stylesheet" href="//a.example/x.css">', ".html", ["//a.example/x.css"]),
        ('<img src="http://a.example/x.png">', ".html", ["http://a.example/x.png"]),
        ('<p style="background: url(https://a.example/b)">', ".html", ["https://a.example/b"]),
        ("<style>@import '//a.example/f'</style>", ".html", ["//a.example/f"]),
        ("@font-face {src: url('https://a.example/f')}", ".css", ["https://a.example/f"]),
        ('<a href="https://a.example">paper</a><img src="images/x.png">', ".html", []),
        ('<link rel="canonical" href="https://a.example">', ".html", []),
        ("a {background: url('data:image/svg+xml,http://www.w3.org')}", ".css", []),
    ],
)
def test_what_a_browser_would_fetch_is_found(
    content: str, suffix: str, expected: list[str]
) -> None:
    assert fetched_from_elsewhere(content, suffix) == expected


def test_a_new_methods_page_enters_the_navigation(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    for name in ("toco", "toy"):
        (tmp_path / "methods" / f"{name}.md").touch()
    nav = ["index.md", {"Methods": ["methods/toco.md"]}, {"Guides": ["data.md"]}]
    found = with_every_method(nav, tmp_path)
    assert found[1] == {"Methods": ["methods/toco.md", "methods/toy.md"]}
    assert (found[0], found[2]) == (nav[0], nav[2])


RECIPES = sorted(
    path
    for path in (PROJECT / "experiments").rglob("*.yaml")
    if path.stem.split("_")[0] in ("voc", "coco") and path.parent.name != "segmenter"
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_says_what_is_published_and_reproduced(path: Path) -> None:
    comment = path.read_text().split("defaults:")[0]
    assert "Published" in comment
    assert "eproduced: not yet run" in " ".join(comment.replace("#", "").split())
    page = (PROJECT / "docs" / "published.md").read_text()
    assert f"`{path.parent.name}/{path.stem}" in page
    for number in re.findall(r"\d\d\.\d", comment):  # mIoUs, in per cent
        assert number in page, number


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    pages = [PROJECT / "README.md", *(PROJECT / "experiments").rglob("*.md")]
    pages += (PROJECT / "docs").rglob("*.md")
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text("utf-8")))
        if ":" not in target
    ]
    assert len(links) > 50
    assert [(p.name, t) for p, t in links if not (p.parent / t).exists()] == []


def test_the_api_page_has_every_public_name() -> None:
    page = (PROJECT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(wsss.__all__) - {"__version__"})
