"""Small tables that know which cells are set in bold, in five formats.

Names of classes, runs and methods are whatever somebody wrote into a file: each format writes them
so that they are text and nothing else.
"""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss.comparison.render import render

#: with these a spreadsheet begins a formula, the wide ones in some languages
FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
#: a number with a sign, alone or as `wsss.comparison.tables` writes it; a missing one
NUMBER = re.compile(
    r"-$|[-+][\d.]+(e[-+]?\d+)?( ± [\d.]+)?( \[[-+]?[\d.]+, [-+]?[\d.]+\]( tie)?)?$"
)
NAME, HEADING = 24, 12  # characters that are left of a row's name and of a heading
COUNT = re.compile(r"(?P<name>.*?)(?: \((?P<count>n=\d+)\))?", re.DOTALL)  # of a heading
TEX = {
    "\\": r"\textbackslash ", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "^": r"\textasciicircum ", "~": r"\textasciitilde ",
    "<": r"\textless ", ">": r"\textgreater ", "±": r"$\pm$", "·": r"$\cdot$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Text of a cell and whether it stands out."""

    text: str
    bold: bool = False


@dataclass
class Grid:
    """A table.

    Attributes:
        title: above it.
        header: headings of all columns, the row's name first.
        rows: name and cells of each row.
        notes: lines below it.
    """

    title: str
    header: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def print_grids(grids: Sequence[Grid], console: Console) -> None:
    """Print tables to a terminal: names are shortened, numbers never; wide tables go on below.

    Columns are shortened before rows, and alike in all tables that have the same ones.
    """
    short: dict[tuple[str, ...], list[str]] = {}
    for grid in grids:
        heads, names, needed = _texts(grid)
        columns = _columns(heads)
        if columns in short or _width([heads[0], *names], heads[1:], needed) <= console.width:
            continue
        beginning = _beginning(columns)
        rest = [name.removeprefix(beginning) for name in columns]
        short[columns] = shortened(rest, [HEADING] * len(rest))
        if beginning:
            console.print(f"columns without their common {beginning}", markup=False)
    for grid in grids:
        heads, names, needed = _texts(grid)
        title, columns = grid.title, _columns(heads)
        if columns in short:
            counts = [COUNT.fullmatch(head)["count"] for head in heads[1:]]  # type: ignore[index]
            alike = len({*counts}) == 1
            title += f", {counts[0]}" if alike and counts[0] else ""
            heads[1:] = [
                f"{name} ({count})" if count and not alike else name
                for name, count in zip(short[columns], counts, strict=True)
            ]
            # names stay whole while two columns fit beside them
            widest = sorted(map(max, needed, map(len, heads[1:])))[-2:]
            spare = console.width - _width([], [""] * len(widest), widest)
            names = shortened(names, [max(NAME, spare)] * len(names))
        start = 0
        while start < len(needed) or start == 0:
            stop = start + 1
            while stop < len(needed) and (
                _width([heads[0], *names], heads[start + 1 : stop + 2], needed[start : stop + 1])
                <= console.width
            ):
                stop += 1
            shown = title if start == 0 else f"{title}, further columns"
            console.print(_block(grid, shown, names, heads, slice(start, stop)))
            start = stop
        for note in grid.notes:
            console.print(_on_one_line(note), markup=False, highlight=False)


def _texts(grid: Grid) -> tuple[list[str], list[str], list[int]]:
    """Give the headings of a table, the names of its rows and the widths of its other cells."""
    heads = [_on_one_line(text) for text in grid.header]
    names = [_on_one_line(name) for name, _ in grid.rows]
    needed = [
        max((len(_on_one_line(cells[k].text)) for _, cells in grid.rows), default=0)
        for k in range(len(heads) - 1)
    ]
    return heads, names, needed


def _columns(heads: Sequence[str]) -> tuple[str, ...]:
    """Give the names of a table's columns without the numbers of seeds."""
    return tuple(COUNT.fullmatch(head)["name"] for head in heads[1:])  # type: ignore[index]


def _beginning(names: Sequence[str]) -> str:
    """Give what names have in common up to a mark between their words; nothing of a single one."""
    alike = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    found = re.match(r".*[-/ ]", "".join(letters[0] for letters in alike))
    beginning = found[0] if found and len(names) > 1 else ""
    return beginning if all(name != beginning for name in names) else ""


def _width(names: Sequence[str], heads: Sequence[str], needed: Sequence[int]) -> int:
    """Give the width of a table with its borders."""
    widths = [max(width, len(head)) for width, head in zip(needed, heads, strict=True)]
    return 1 + sum(width + 3 for width in [max(map(len, names), default=0), *widths])


def _block(
    grid: Grid, title: str, names: Sequence[str], heads: Sequence[str], columns: slice
) -> Table:
    """Make a table of some columns of a grid."""
    table = Table(title=_shown(title), title_justify="left")
    table.add_column(escape(heads[0]), no_wrap=True)
    for heading in heads[1:][columns]:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for name, (_, cells) in zip(names, grid.rows, strict=True):
        texts = [(_shown(c.text), c.bold) for c in cells[columns]]
        table.add_row(
            escape(name), *(f"[bold]{text}[/bold]" if bold else text for text, bold in texts)
        )
    return table


def shortened(texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Cut the middle out of texts that are longer than their widths; none becomes another's.

    Args:
        texts: to shorten.
        widths: of each, in characters; all grow together where two texts would look alike.
    """
    for more in range(max(map(len, texts), default=0) + 1):
        found = [_cut(text, width + more) for text, width in zip(texts, widths, strict=True)]
        if len({*found}) == len({*texts}):
            break
    return found


def _cut(text: str, width: int) -> str:
    end = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _shown(text: str) -> str:
    """Write a text for a terminal, where rich takes ``[red]`` for a colour."""
    return escape(_on_one_line(text))


def markdown(grids: Sequence[Grid]) -> str:
    """Write tables as GitHub has them."""
    parts = []
    for grid in grids:
        lines = [f"**{_md(grid.title)}**", "", _pipes(map(_md, grid.header))]
        lines.append(_pipes(["---", *["---:"] * (len(grid.header) - 1)]))
        for name, cells in grid.rows:
            texts = [(_md(c.text), c.bold) for c in cells]
            lines.append(_pipes([_md(name), *(f"**{t}**" if bold else t for t, bold in texts)]))
        parts.append("\n".join([*lines, *(f"\n{_md(note)}" for note in grid.notes)]))
    return "\n\n".join(parts) + "\n"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _md(text: str) -> str:
    """Write a text for Markdown, where HTML is HTML and ``](`` makes a link or loads a picture."""
    plain = html.escape(_on_one_line(text), quote=False).replace("\\", "\\\\")
    return plain.replace("](", "]\\(").replace("`", "\\`")


def _on_one_line(text: str) -> str:
    """Give a text without line breaks and other characters that steer a terminal or a table."""
    return "".join(c if c.isprintable() else " " for c in text)


def comma_separated(grids: Sequence[Grid]) -> str:
    """Write one CSV: table, row, column, value, bold; made for programs, so notes are left out."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "bold"])
    for grid in grids:
        for name, cells in grid.rows:
            for heading, cell in zip(grid.header[1:], cells, strict=True):
                texts = (grid.title, name.strip(), heading, cell.text)
                writer.writerow([*map(_harmless, texts), int(cell.bold)])
    return buffer.getvalue()


def _harmless(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would take for a formula; numbers are none."""
    plain = _on_one_line(text)
    return f"'{plain}" if plain.lstrip().startswith(FORMULAS) and not NUMBER.match(plain) else plain


def latex(grids: Sequence[Grid]) -> str:
    """Write tables with booktabs."""
    parts = []
    for grid in grids:
        lines = [
            r"\begin{table}",
            rf"\caption{{{_tex(grid.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, grid.header)) + r" \\",
            r"\midrule",
        ]
        for name, cells in grid.rows:
            texts = [rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in cells]
            guard = "{}" if name.startswith(("[", "*")) else ""  # else part of the line's end
            lines.append(" & ".join([guard + _tex(name), *texts]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\\{{\footnotesize {_tex(note)}}}" for note in grid.notes]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in _on_one_line(text))


def html_tables(grids: Sequence[Grid]) -> str:
    """Write ``<table>`` elements; the page brings the style."""
    return render("tables.html", grids=grids)


#: suffix of a file -> how tables are written into it
FORMATS: dict[str, Callable[[Sequence[Grid]], str]] = {
    ".md": markdown,
    ".csv": comma_separated,
    ".tex": latex,
    ".html": html_tables,
}
