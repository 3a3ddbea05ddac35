"""Hook of the documentation site: every method's page has its place, and nothing needs a network.

A page in ``docs/methods`` enters the navigation by itself, so that a new method needs no other file
than its own. After the build every page and style sheet is searched for what a browser would fetch
from elsewhere; ordinary links to other sites are fine.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SECTION = "Methods"
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(|@import)\s*['"]?((?:https?:)?//[^'")\s]+)""", re.IGNORECASE)
#: what a browser fetches unasked; of links only those that are no addresses of pages
FETCHED = ("src", "srcset", "data", "poster")
PAGES = ("canonical", "next", "prev", "alternate")


class _Fetched(HTMLParser):
    """A parser that collects addresses on other machines that opening a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag."""
        values = {name: value or "" for name, value in attrs}
        wanted = [values[name] for name in FETCHED if name in values]
        if tag == "link" and values.get("rel") not in PAGES:
            wanted.append(values.get("href", ""))
        self.found += [value for value in wanted if ELSEWHERE.match(value)]
        self.found += STYLE.findall(values.get("style", ""))


def fetched_from_elsewhere(content: str, suffix: str) -> list[str]:
    """List what a page (``.html``) or style sheet (``.css``) would fetch from other machines."""
    if suffix == ".css":
        return STYLE.findall(content)
    parser = _Fetched()
    parser.feed(content)
    styles = re.findall(r"<style[^>]*>(.*?)</style>", content, re.DOTALL)
    return parser.found + STYLE.findall("".join(styles))


def with_every_method(nav: list[Any], docs: Path) -> list[Any]:
    """Give the navigation, with every page of ``docs/methods`` in its section of methods."""
    every = [f"methods/{path.name}" for path in sorted((docs / "methods").glob("*.md"))]
    return [
        {SECTION: [*item[SECTION], *(page for page in every if page not in item[SECTION])]}
        if isinstance(item, dict) and SECTION in item
        else item
        for item in nav
    ]


def on_config(config: Any) -> Any:
    """Complete the navigation; mkdocs calls this with its configuration."""
    config.nav = with_every_method(config.nav, Path(config.docs_dir))
    return config


def on_post_build(config: Any) -> None:
    """Search the site for foreign addresses; mkdocs calls this when it is written.

    Raises:
        PluginError: names the first file that a browser would need a network for.
    """
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            found = fetched_from_elsewhere(path.read_text(encoding="utf-8"), path.suffix)
            if found:
                raise PluginError(f"{path.relative_to(site)} would fetch {found[0]}")
