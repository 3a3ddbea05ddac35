"""Small tables that know which cells are set in bold, in five formats."""

import csv
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


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
        table = Table(title=grid.title, title_justify="left")
        table.add_column(grid.header[0])
        for heading in grid.header[1:]:
            table.add_column(heading, justify="right")
        for name, cells in grid.rows:
            table.add_row(name, *(f"[bold]{c.text}[/bold]" if c.bold else c.text for c in cells))
        console.print(table)
        for note in grid.notes:
            console.print(note, markup=False, highlight=False)


def markdown(grids: Sequence[Grid]) -> str:
    """Write tables as GitHub has them."""
    parts = []
    for grid in grids:
        lines = [f"**{grid.title}**", "", _pipes(grid.header)]
        lines.append(_pipes(["---", *["---:"] * (len(grid.header) - 1)]))
        for name, cells in grid.rows:
            lines.append(_pipes([name, *(f"**{c.text}**" if c.bold else c.text for c in cells)]))
        parts.append("\n".join([*lines, *(f"\n{note}" for note in grid.notes)]))
    return "\n\n".join(parts) + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def comma_separated(grids: Sequence[Grid]) -> str:
    """Write one CSV: table, row, column, value, bold; made for programs, so notes are left out."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "bold"])
    for grid in grids:
        for name, cells in grid.rows:
            for heading, cell in zip(grid.header[1:], cells, strict=True):
                writer.writerow([grid.title, name.strip(), heading, cell.text, int(cell.bold)])
    return buffer.getvalue()


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
            lines.append(" & ".join([_tex(name), *texts]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\\{{\footnotesize {_tex(note)}}}" for note in grid.notes]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"),
        ("$", r"\$"), ("±", r"$\pm$"), ("{", r"\{"), ("}", r"\}"), ("·", r"$\cdot$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


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
