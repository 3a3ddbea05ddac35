"""The layers of ``src/wsss``: which folder may import which, and a picture of what they do import.

``python tools/layers.py`` draws ``docs/images/layers.svg`` anew from the code; a test compares the
two, and ``tests/test_layers.py`` holds the code to the rows below.
"""

import ast
import html
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PICTURE = ROOT / "docs" / "images" / "layers.svg"
#: from the ground up; a folder imports from lower rows only, folders of one row not each other
ROWS = [
    ["core"],
    ["maps", "models"],
    ["data", "methods"],
    ["evaluation"],
    ["results"],
    ["runs"],
    ["training", "comparison", "parity", "benchmark"],
    ["commands"],
    ["cli"],
]
LATE = "commands"  # the one folder that imports inside functions
WIDTH, BOX, GAP = 880, 44, 34  # of the picture, of a box's height, between rows, in pixels


def name_of(path: Path) -> str:
    """Give the dotted name of a file below ``src``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((SOURCE / "wsss").rglob("*.py"))}


def folder_of(module: str) -> str:
    """Give the folder that a module belongs to; empty for the package's own face."""
    return module.removeprefix("wsss").strip(".").partition(".")[0]


def imports_of(text: str, *, nested: bool) -> set[str]:
    """Modules that a file imports at its top or, ``nested``, anywhere else."""
    tree = ast.parse(text)
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        if (id(node) in top) is nested:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # a relative one could lead anywhere; ruff refuses it too
            assert node.module, f"line {node.lineno}: a relative import"
            assert not node.level, f"line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return found


def arrows() -> dict[str, set[str]]:
    """Give, for each module, those of ours that it imports at its top.

    A command imports what is slow only once its line is checked, so of commands all imports count.
    """
    found = {}
    for name, path in FILES.items():
        others = imports_of(path.read_text(), nested=False)
        if folder_of(name) == LATE:
            others |= imports_of(path.read_text(), nested=True)
        found[name] = {other for other in others if other in FILES}
    return found


def draw() -> str:
    """Draw the folders as boxes, row above row, their imports as lines."""
    pairs = {
        (folder_of(module), folder_of(other))
        for module, others in arrows().items()
        for other in others
    }
    pairs = {(own, its) for own, its in pairs if own and its and own != its}
    height = len(ROWS) * (BOX + GAP) + GAP // 2
    places: dict[str, tuple[float, float, float]] = {}
    for row, folders in enumerate(ROWS):
        width = (WIDTH - 20 * (len(folders) + 1)) / len(folders)
        for column, folder in enumerate(folders):
            left = 20 + column * (width + 20)
            places[folder] = (left, height - (row + 1) * (BOX + GAP) + GAP / 2, width)
    lines, boxes = [], []
    for own, its in sorted(pairs):
        (x1, y1, w1), (x2, y2, w2) = places[own], places[its]
        # lines between the same boxes' middles would lie on each other
        start = x1 + w1 * (0.15 + 0.7 * list(places).index(its) / len(places))
        end = x2 + w2 * (0.15 + 0.7 * list(places).index(own) / len(places))
        lines.append(
            f'<line x1="{start:.0f}" y1="{y1 + BOX:.0f}" x2="{end:.0f}" y2="{y2:.0f}">'
            f"<title>{own} imports {its}</title></line>"
        )
    for folder, (left, top, width) in places.items():
        path = FILES[f"wsss.{folder}"]
        said = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        room = int(width / 6.2)
        said = said if len(said) <= room else f"{said[: room - 3].rstrip()}..."
        boxes.append(
            f'<g><rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX}" rx="6"/>'
            f'<text x="{left + 10:.0f}" y="{top + 18:.0f}" class="name">{folder}</text>'
            f'<text x="{left + 10:.0f}" y="{top + 35:.0f}">{html.escape(said)}</text></g>'
        )
    style = (
        "line{stroke:#4f7cac;opacity:.35}rect{fill:#f4f6f8;stroke:#4f7cac}"
        "text{font:11px sans-serif;fill:#333}.name{font:bold 13px sans-serif}"
    )
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    body = "\n".join([*lines, *boxes])
    paper = f'<rect width="{WIDTH}" height="{height}" style="fill:white;stroke:none"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n'
        f"{paper}\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
