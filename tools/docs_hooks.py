"""Hook of the documentation site: places in the source code, and links that leave the site.

``{{code:MODULE:NAME}}`` in a page becomes the file and line where NAME is defined,
``{{code:MODULE:NAME@"TEXT"}}`` the first line of NAME's code that contains TEXT (docstrings do not
count), ``{{code:MODULE}}`` the file. MODULE is dotted and lies below ``src`` or the repository's
root (``tests.methods.test_toco``); NAME may be a class, a function, a constant or a path to one
(``ToCo.cams``). Only the syntax tree is read, nothing is imported. So a page's line numbers are
those of the code it is built from, and a name that is gone stops the build.

Links from a page to files outside ``docs`` work where the repository is browsed. In the site they
lead to the repository if mkdocs knows it (``repo_url``), else they become the file's name.

Fenced code, and a marker right after a backtick, stay as they are.

Usable without mkdocs: :func:`resolve` is a plain function of a page's text.
"""

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"

FENCE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"(?<!`)\{\{code:(.*?)\}\}")
SPEC = re.compile(r'(?P<module>[\w.]+)(?::(?P<name>[\w.]+))?(?:@"(?P<text>.+)")?')
LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)")


def resolve(markdown: str, page: str, *, root: Path = ROOT, repo_url: str | None = None) -> str:
    """Resolve a page's markers and its links to files outside ``docs``.

    Args:
        markdown: the page.
        page: its path below ``docs``.
        root: the repository.
        repo_url: where the repository can be browsed, or None.

    Raises:
        ValueError: a marker or link leads nowhere; names page and marker.
    """

    def linked(text: str, path: str, line: int | None = None) -> str:
        if repo_url is None:
            return text
        anchor = "" if line is None else f"#L{line}"
        return f"[{text}]({repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})"

    def code(match: re.Match[str]) -> str:
        try:
            path, line = place(match[1], root)
        except LookupError as error:
            raise ValueError(f"{DOCS}/{page}: {match[0]}: {error.args[0]}") from error
        return linked(f"`{path}`" if line is None else f"`{path}:{line}`", path, line)

    def leaving(match: re.Match[str]) -> str:
        target = urlsplit(match["target"])
        if target.scheme or not target.path:
            return match[0]
        found = (root / DOCS / page).parent.joinpath(target.path).resolve()
        if found.is_relative_to(root / DOCS):
            return match[0]  # mkdocs' own business
        if not found.is_relative_to(root) or not found.exists():
            raise ValueError(f"{DOCS}/{page}: {match[0]}: no such file in the repository")
        path = found.relative_to(root).as_posix()
        text = match["text"]
        if repo_url is None and text.strip("`") != path:
            text = f"{text} (`{path}`)"
        return linked(text, path)

    def resolved(part: str) -> str:
        # links first: those that a marker becomes are absolute
        return MARKER.sub(code, LINK.sub(leaving, part))

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [resolved(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, resolved(markdown[end:])])


def place(spec: str, root: Path = ROOT) -> tuple[str, int | None]:
    """Find file below the root, and line, of a marker's inside; see the module's docstring.

    Raises:
        LookupError: there is no such module, name or text.
    """
    parts = SPEC.fullmatch(spec)
    if parts is None:
        raise LookupError('expected MODULE, MODULE:NAME or MODULE:NAME@"TEXT"')
    relative = Path(*parts["module"].split("."))
    candidates = [Path(top, relative) for top in ("src", "")]
    files = [one.with_suffix(".py") for one in candidates] + [
        one / "__init__.py" for one in candidates
    ]
    path = next((one for one in files if (root / one).is_file()), None)
    if path is None:
        raise LookupError(f"no module {parts['module']}")
    tree, lines = _read(root / path, (root / path).stat().st_mtime_ns)
    node: ast.AST = tree
    if parts["name"]:
        node = _definition(tree.body, parts["name"].split("."))
    line = getattr(node, "lineno", None)
    if parts["text"]:
        line = _line_with(parts["text"], node, lines)
    return path.as_posix(), line


@cache
def _read(path: Path, changed: int) -> tuple[ast.Module, list[str]]:
    """Read syntax tree and lines of a file as last ``changed`` (mkdocs serve goes on)."""
    source = path.read_text(encoding="utf-8")
    return ast.parse(source), source.splitlines()


def _definition(body: Sequence[ast.stmt], names: Sequence[str]) -> ast.stmt:
    """Find the statement that defines a dotted name."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == names[0]:
                return node if len(names) == 1 else _definition(node.body, names[1:])
            continue
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        found = any(isinstance(one, ast.Name) and one.id == names[0] for one in targets)
        if found and len(names) == 1:
            return node
    raise LookupError(f"nothing there is called {names[0]}")


def _line_with(text: str, node: ast.AST, lines: Sequence[str]) -> int:
    """Find the first line of a node's code, its own docstring aside, that contains a text."""
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", len(lines))
    skipped: range = range(0)
    body = getattr(node, "body", None)
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        skipped = range(body[0].lineno, (body[0].end_lineno or 0) + 1)
    for number in range(first, last + 1):
        if number not in skipped and text in lines[number - 1]:
            return number
    raise LookupError(f'no line of it has "{text}"')


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Resolve a page: mkdocs calls this for every page, before Markdown is parsed."""
    return resolve(markdown, page.file.src_uri, repo_url=config.repo_url or None)
