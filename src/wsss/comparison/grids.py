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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: with these a spreadsheet begins a formula, the wide ones in some languages
FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
#: a number with a sign, alone or as `wsss.comparison.tables` writes it; a missing one
NUMBER = re.compile(
    r"-$|[-+][\d.]+(e[-+]?\d+)?( ± [\d.]+)?( \[[-+]?[\d.]+, [-+]?[\d.]+\]( tie)?)?$"
)
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
    """Print tables to a terminal."""
    for grid in grids:
        table = Table(title=_shown(grid.title), title_justify="left")
        table.add_column(_shown(grid.header[0]))
        for heading in grid.header[1:]:
            table.add_column(_shown(heading), justify="right")
        for name, cells in grid.rows:
            texts = [(_shown(c.text), c.bold) for c in cells]
            table.add_row(
                _shown(name), *(f"[bold]{text}[/bold]" if bold else text for text, bold in texts)
            )
        console.print(table)
        for note in grid.notes:
            console.print(_on_one_line(note), markup=False, highlight=False)


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
    parts = []
    for grid in grids:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.header)
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(
                f"<td><b>{html.escape(c.text)}</b></td>" if c.bold
                else f"<td>{html.escape(c.text)}</td>"
                for c in cells
            )
            + "</tr>"
            for name, cells in grid.rows
        )  # fmt: skip
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in grid.notes)
        parts.append(
            f"<figure><figcaption>{html.escape(grid.title)}</figcaption><div class=scroll><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}</figure>"
        )
    return "\n".join(parts) + "\n"


#: suffix of a file -> how tables are written into it
FORMATS: dict[str, Callable[[Sequence[Grid]], str]] = {
    ".md": markdown,
    ".csv": comma_separated,
    ".tex": latex,
    ".html": html_tables,
}
