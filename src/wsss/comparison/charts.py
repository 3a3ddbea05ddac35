"""Charts as inline SVG, drawn by Vega-Lite: they need no script and no file beside the page.

A chart is about as wide as a narrow phone, so that its text stays readable there; wide pages put
several side by side. Colours are the page's CSS variables, so a chart follows the colour scheme.
A name has a colour, a dash pattern and a symbol: colour is never the only difference.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from markupsafe import Markup

from wsss.core.failures import one_line

WIDTH, HEIGHT = 320, 190  # of the frame, in pixels; labels come beside it
NUM_COLOURS = 8
LONGEST_TEXT = 100_000  # in characters
DASHES = ([1, 0], [6, 3], [3, 2], [8, 2, 2, 2], [12, 3], [8, 2, 2, 2, 2, 2])
SYMBOLS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "cross": "✚",
           "triangle-down": "▼"}  # fmt: skip
INK, LINE, FAINT, PANEL = "var(--ink)", "var(--line)", "var(--faint)", "var(--panel)"
CHOSEN = "var(--c1)"  # of what stands out among lines that are coloured by a number
THEME = {
    "background": None,
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "gridColor": LINE, "domainColor": LINE,
             "tickColor": LINE, "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 130,
             "titleFontWeight": "normal"},
    "axisLeft": {"minExtent": 42},
    "header": {"labelColor": INK, "labelFontSize": 12, "labelLimit": 160, "labelPadding": 2},
}  # fmt: skip


class Point(NamedTuple):
    """A point of a chart; one that is not finite is left out.

    Attributes:
        name: what looks alike, such as a method.
        x: a number, or the name of a place.
        y: a number, or the name of a row.
        text: shown beside the pointer; name and numbers by default.
        low: lower end of its error bar, along the axis of numbers.
        high: upper end; NaN for no bar.
        line: which line of its name it is on; None: on none.
        dot: whether it is drawn itself.
    """

    name: str
    x: float | str
    y: float | str
    text: str = ""
    low: float = math.nan
    high: float = math.nan
    line: int | None = None
    dot: bool = True


class Chart(NamedTuple):
    """A chart of a page: its caption and drawing."""

    title: str
    svg: Markup


class Axis(NamedTuple):
    """One of several parallel axes.

    Attributes:
        title: its name.
        ticks: texts at places between its ends, 0 and 1.
    """

    title: str
    ticks: Sequence[tuple[float, str]]


class Strand(NamedTuple):
    """A line through parallel axes.

    Attributes:
        places: where it meets each axis, 0 to 1.
        text: shown beside the pointer.
        level: from 0 to 1; the higher, the stronger its colour.
        labels: texts at its places, where it stands out.
        dashed: whether it is the one that all others are seen against.
    """

    places: Sequence[float]
    text: str
    level: float
    labels: Sequence[str] = ()
    dashed: bool = False


def look_of(number: int) -> dict[str, Any]:
    """Give colour, dash pattern and symbol: of 48 numbers no two share colour and dash."""
    return {
        "color": f"var(--c{number % NUM_COLOURS})",
        "strokeDash": DASHES[(number + number // 24) % len(DASHES)],
        "shape": list(SYMBOLS)[number % len(SYMBOLS)],
    }


def draw(
    title: str,
    names: Sequence[str],
    points: Sequence[Point],
    *,
    x: str,
    y: str = "",
    zero: str = "xy",
    rows: int = 0,
    multiples: bool = False,
    bands: bool = False,
) -> list[Chart]:
    """Draw points, their error bars and the lines between them.

    Args:
        title: caption.
        names: of the points; the number of a name decides how it looks.
        points: in the order of their lines, places and rows.
        x: title of the x axis.
        y: title of the y axis.
        zero: axes that begin at zero.
        rows: height of a row in pixels, where ``y`` is the name of one.
        multiples: give each name a frame and a y axis of its own.
        bands: join the error bars of a line to a band.

    Returns:
        One chart; none where no point is finite.
    """
    records = [_record(p) for p in points if all(map(_finite, (p.x, p.y)))]
    if not records:
        return []
    loose = not rows and all(record["line"] is None for record in records)
    axes = {
        "x": _axis(
            records, "x", x, zero="x" in zero, padding=14 * loose, ticks=2 if multiples else 5
        ),
        "y": _axis(
            records, "y", y, zero="y" in zero, padding=14 * loose, ticks=2 if multiples else 5
        ),
    }
    value = "x" if rows else "y"
    looks = {key: _scale(key, names) for key in ("color", "strokeDash", "shape")}
    dots = {
        "shape": looks["shape"],
        "size": {"field": "size", "type": "quantitative", "scale": None},
    }
    bar = {"type": "area", "opacity": 0.15} if bands else {"type": "rule", "size": 2}
    layers = [
        {"transform": [{"filter": "datum.high > datum.low"}], "mark": bar,
         "encoding": {value: {"field": "low"}, f"{value}2": {"field": "high"}}},
        {"transform": [{"filter": "datum.line !== null"}],
         "mark": {"type": "line", "strokeWidth": 1.2 if multiples else 2},
         "encoding": {"strokeDash": looks["strokeDash"], "detail": {"field": "line"}}},
        {"transform": [{"filter": "datum.dot"}], "mark": {"type": "point", "filled": True},
         "encoding": dots},
    ]  # fmt: skip
    frame: dict[str, Any] = {
        "width": WIDTH // 2 - 30 if multiples else WIDTH,
        "height": {"step": rows} if rows else 84 if multiples else HEIGHT,
        "layer": layers,
        "encoding": {**axes, "color": looks["color"], "description": {"field": "text"}},
    }
    if multiples:
        order = [name for name in names if any(record["name"] == name for record in records)]
        facet = {"field": "name", "type": "nominal", "title": None, "sort": order}
        resolve = {"scale": {"y": "independent"}, "axis": {"x": "independent"}}
        frame = {"facet": facet, "columns": 2, "spacing": 14, "resolve": resolve, "spec": frame}
    specification = {"data": {"values": records}, "config": THEME, **frame}
    return [Chart(title, Markup(_svg(json.dumps(_printable(specification)))))]


def draw_parallel(title: str, axes: Sequence[Axis], strands: Sequence[Strand]) -> list[Chart]:
    """Draw lines through axes that lie below each other, each with its title at its left.

    Args:
        title: caption.
        axes: from the top.
        strands: in the order in which they are drawn, the last one above all.

    Returns:
        One chart; none without lines.
    """
    if not strands:
        return []
    place = {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1]}}
    titles = [one_line(axis.title, 100) for axis in axes]
    row = {"field": "axis", "type": "nominal", "title": None, "sort": None,
           "scale": {"domain": list(range(len(axes))), "type": "point", "padding": 0.6},
           "axis": {"labelExpr": f"{json.dumps(titles)}[datum.value]", "grid": True,
                    "domain": False, "ticks": False}}  # fmt: skip
    lines = [
        {"axis": number, "x": x, "strand": index, "text": strand.text, "colour": _shade(strand),
         "dash": [4, 3] if strand.dashed else [1, 0], "size": 3 if strand.labels else 1.4}
        for index, strand in enumerate(strands)
        for number, x in enumerate(strand.places)
    ]  # fmt: skip
    ends = [
        {"axis": number, "x": x, "text": text, "align": _aligned(x)}
        for number, axis in enumerate(axes)
        for x, text in axis.ticks
    ]
    dots = [
        {"axis": number, "x": x, "text": text, "align": _aligned(x)}
        for strand in strands
        for number, (x, text) in enumerate(zip(strand.places, strand.labels, strict=False))
    ]
    raw = {"type": "nominal", "scale": None}
    layers = [
        {"data": {"values": lines}, "mark": {"type": "line"},
         "encoding": {"detail": {"field": "strand"},
                      "color": {"field": "colour", **raw}, "strokeDash": {"field": "dash", **raw},
                      "strokeWidth": {"field": "size", **raw},
                      "description": {"field": "text"}}},
        *_texts(ends, dy=11, fill=FAINT),
        {"data": {"values": dots}, "mark": {"type": "point", "filled": True, "size": 60,
                                            "color": CHOSEN}},
        *_texts(dots, dy=-10, fill=INK, fontWeight="bold"),
    ]  # fmt: skip
    specification = {
        "config": THEME,
        "width": WIDTH,
        "height": {"step": 44},
        "encoding": {"x": place, "y": row},
        "layer": layers,
    }
    return [Chart(title, Markup(_svg(json.dumps(_printable(specification)))))]


def _texts(values: Sequence[Mapping[str, Any]], **look: Any) -> list[dict[str, Any]]:
    """Draw texts, readable where a line crosses them."""
    mark = {"type": "text", "align": {"expr": "datum.align"}, "limit": 90, "fontSize": 11, **look}
    around = {**mark, "fill": PANEL, "stroke": PANEL, "strokeWidth": 4, "aria": False}
    encoding = {"text": {"field": "text"}}
    return [
        {"data": {"values": values}, "mark": each, "encoding": encoding} for each in (around, mark)
    ]


def _shade(strand: Strand) -> str:
    """Give the colour of a line: one of five steps, or that of what stands out."""
    if strand.labels:
        return CHOSEN
    return INK if strand.dashed else f"var(--v{min(int(5 * strand.level), 4)})"


def _aligned(x: float) -> str:
    """Say how a text is set that begins, ends or has its middle at a place of an axis."""
    return "left" if x < 0.1 else "right" if x > 0.9 else "center"


def _finite(value: float | str) -> bool:
    return isinstance(value, str) or math.isfinite(value)


def _record(point: Point) -> Mapping[str, Any]:
    """Give the data of a point; its size is larger with a bar, as a mean's among single runs."""
    x, y = (value if isinstance(value, str) else f"{value:.4g}" for value in point[1:3])
    record: dict[str, Any] = {"text": point.text or f"{point.name}: {x}, {y}", "size": 50}
    if point.low < point.high:
        ends = {"text": f"{record['text']} [{point.low:.1f}, {point.high:.1f}]", "size": 110}
        record |= ends | {"low": point.low, "high": point.high}
    return record | {key: getattr(point, key) for key in ("name", "x", "y", "line", "dot")}


def _axis(
    records: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    *,
    zero: bool,
    padding: int,
    ticks: int,
) -> dict[str, Any]:
    """Encode an axis of numbers, or of names in the order in which they come."""
    values = [record[key] for record in records]
    if all(isinstance(value, int) for value in values):  # no half ones
        ticks = max(1, min(ticks, max(values) - min(values)))
    axis = {"tickCount": ticks, "labelAngle": 0, "grid": True}
    found: dict[str, Any] = {"field": key, "title": title or None, "axis": axis}
    if isinstance(values[0], str):
        names = list(dict.fromkeys(values))
        return found | {"type": "nominal", "sort": names}
    scale = {"zero": zero, "padding": padding} if padding else {"zero": zero, "nice": True}
    return found | {"type": "quantitative", "scale": scale}


def _scale(key: str, names: Sequence[str]) -> dict[str, Any]:
    """Encode names by how they look, without a legend: the page has it."""
    looks = [look_of(number)[key] for number in range(len(names))]
    scale = {"domain": list(names), "range": looks}
    return {"field": "name", "type": "nominal", "scale": scale, "legend": None}


def _printable(node: Any) -> Any:
    """Write out in every text what is no character of an SVG, which the renderer dies of."""
    if isinstance(node, Mapping):
        return {key: _printable(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_printable(value) for value in node]
    return one_line(node, LONGEST_TEXT) if isinstance(node, str) else node


@lru_cache(maxsize=64)  # a page is often drawn again with most of its charts unchanged
def _svg(specification: str) -> str:
    """Draw a Vega-Lite specification; nothing is fetched, whatever a name says."""
    import vl_convert  # brings a JavaScript engine, which only a page with charts needs

    svg: str = vl_convert.vegalite_to_svg(specification, allowed_base_urls=[])
    # inside HTML no namespace is needed; the page sets the size
    return re.sub(r'<svg [^>]*(viewBox="[^"]*")>', r"<svg \1>", svg, count=1)
