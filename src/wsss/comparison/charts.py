"""Charts as inline SVG, drawn by Vega-Lite: they need no script and no file beside the page.

A chart is about as wide as a narrow phone, so that its text stays readable there; wide pages put
several side by side. Colours are the page's CSS variables, so a chart follows the colour scheme.
A series has a colour, a dash pattern and a symbol: colour is never the only difference.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 320, 190  # of the frame, in pixels; labels come beside it
NUM_COLOURS = 8
DASHES: tuple[tuple[int, ...], ...] = (
    (1, 0), (6, 3), (3, 2), (8, 2, 2, 2), (12, 3), (8, 2, 2, 2, 2, 2),
)  # fmt: skip
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
MOST_POINTS = 200  # of a line, which is drawn about this many pixels wide
INK, FAINT, LINE = "var(--ink)", "var(--faint)", "var(--line)"
THEME: dict[str, Any] = {
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "gridColor": LINE, "domainColor": LINE,
        "tickColor": LINE, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "labelLimit": 130, "tickCount": 5,
    },
    "axisLeft": {"minExtent": 42},
    "header": {"labelColor": INK, "labelFontSize": 12, "labelLimit": 160, "labelPadding": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line of a chart, or the points of one name.

    Attributes:
        name: what it is; series of one name, such as a method's seeds, look alike.
        colour: number of its colour, dash pattern and symbol.
        points: (x, y), in the units of the axes; points that are not finite are left out.
        marks: (x, y, text) of points that stand out.
        bars: (low, high) of each point's error bar; none by default.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]] = ()
    bars: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Attributes:
        title: caption.
        svg: the drawing.
    """

    title: str
    svg: Markup


def colour_of(number: int) -> str:
    """Give a colour of the page."""
    return f"var(--c{number % NUM_COLOURS})"


def dash_of(number: int) -> tuple[int, ...]:
    """Give a dash pattern: of 48 numbers no two share it and their colour."""
    return DASHES[(number + number // 24) % len(DASHES)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    dots: bool = False,
) -> list[Chart]:
    """Draw lines over a common axis; nothing where no series has a finite point.

    Args:
        title: caption.
        series: the lines.
        x_label: below the x axis.
        y_label: beside the y axis, which begins at zero.
        x_names: names of the positions 0, 1, ... where x is no number.
        dots: mark every point.
    """
    lines = _records(series)
    marked = [one for one in lines if dots] + [
        _record(one, number, x, y, f"{one.name}: {text}")
        for number, one in enumerate(series)
        for x, y, text in one.marks
    ]
    if x_names:
        lines, marked = ([{**r, "x": x_names[int(r["x"])]} for r in rs] for rs in (lines, marked))
    layers = [
        {"data": {"values": lines}, "mark": {"type": "line", "strokeWidth": 2},
         "encoding": {"strokeDash": _scaled(series, "dash"), "detail": {"field": "line"}}},
        {"data": {"values": marked}, "mark": {"type": "point", "filled": True, "size": 60}},
    ]  # fmt: skip
    x = {"field": "x", "title": x_label, **_axis(zero=False)}
    if x_names:
        x |= {"type": "ordinal", "sort": list(x_names), "axis": {"labelAngle": 0}}
    y = {"field": "y", "title": y_label, **_axis(zero=True)}
    return _drawn(title, lines, series, {"layer": layers, "encoding": {"x": x, "y": y}})


def small_multiples(title: str, series: Sequence[Series]) -> list[Chart]:
    """Draw each name's lines in a frame of its own, with an axis of its own."""
    lines = _records(series)
    names = list(dict.fromkeys(record["name"] for record in lines))
    columns = max(1, min(2, len(names)))
    mark = {"type": "line", "strokeWidth": 1.2, "opacity": 0.8}
    frame = {
        "width": WIDTH // columns - (30 if columns > 1 else 0), "height": 84, "mark": mark,
        "encoding": {
            "x": {"field": "x", "title": None, **_axis(zero=False, ticks=2)},
            "y": {"field": "y", "title": None, **_axis(zero=False, ticks=3)},
            "color": _scaled(series, "colour"), "strokeDash": _scaled(series, "dash"),
            "detail": {"field": "line"}, "description": {"field": "text"},
        },
    }  # fmt: skip
    facet = {"field": "name", "type": "nominal", "title": None, "sort": names}
    content = {
        "facet": facet, "columns": columns, "spec": frame, "spacing": 14,
        "resolve": {"scale": {"y": "independent"}, "axis": {"x": "independent"}},
    }  # fmt: skip
    return _drawn(title, lines, series, content, framed=False)


def scatter(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> list[Chart]:
    """Draw points with their error bars."""
    records = _records(series)
    encoding = {
        "x": {"field": "x", "title": x_label, **_axis(zero=True, padding=14)},
        "y": {"field": "y", "title": y_label, **_axis(zero=False, padding=14)},
    }
    bars = {"mark": "rule", "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}}}
    points = {"mark": {"type": "point", "filled": True, "size": 90},
              "encoding": {"shape": _scaled(series, "shape")}}  # fmt: skip
    return _drawn(title, records, series, {"layer": [bars, points], "encoding": encoding})


def row_chart(
    title: str,
    rows: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    step: int = 18,
    zero: bool = True,
) -> list[Chart]:
    """Draw points in named rows, with error bars where a series has them.

    Args:
        title: caption.
        rows: names of the rows, from the top.
        series: points of (value, number of its row).
        x_label: below the axis of values.
        step: height of a row in pixels.
        zero: whether the axis of values begins at zero.
    """
    records = [{**one, "row": rows[int(one["y"])]} for one in _records(series)]
    order = {"field": "row", "type": "nominal", "title": None, "sort": list(rows),
             "axis": {"grid": True, "ticks": False, "domain": False}}  # fmt: skip
    encoding = {"x": {"field": "x", "title": x_label, **_axis(zero=zero)}, "y": order}
    bars = {
        "transform": [{"filter": "datum.high > datum.low"}],
        "mark": {"type": "rule", "size": 2},
        "encoding": {"x": {"field": "low"}, "x2": {"field": "high"}},
    }
    points = {
        "mark": {"type": "point", "filled": True, "opacity": 0.9},
        "encoding": {
            "shape": _scaled(series, "shape"),
            "size": {"field": "size", "type": "quantitative", "scale": None, "legend": None},
        },
    }
    content = {"layer": [bars, points], "encoding": encoding, "height": {"step": step}}
    return _drawn(title, records, series, content)


def _records(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Give a record a finite point; long lines are thinned."""
    found = []
    for number, one in enumerate(series):
        bars = one.bars or [(math.nan, math.nan)] * len(one.points)
        points = [
            (x, y, *bar)
            for (x, y), bar in zip(one.points, bars, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        ]
        every = max(1, -(-len(points) // MOST_POINTS))
        for x, y, low, high in [*points[:-1:every], *points[-1:]]:
            record = _record(one, number, x, y, f"{one.name}: {x:.4g}, {y:.4g}")
            if math.isfinite(low) and math.isfinite(high):
                record |= {"low": low, "high": high, "size": 110}
                record["text"] += f" [{low:.1f}, {high:.1f}]"
            found.append(record)
    return found


def _record(one: Series, number: int, x: float, y: float, text: str) -> dict[str, Any]:
    name = {"name": one.name, "line": number, "text": text, "size": 50}
    return name | {"x": float(f"{x:.5g}"), "y": float(f"{y:.5g}")}


def _axis(*, zero: bool, ticks: int = 5, padding: int = 0) -> dict[str, Any]:
    scale = {"zero": zero, "padding": padding} if padding else {"zero": zero, "nice": True}
    return {"type": "quantitative", "scale": scale, "axis": {"tickCount": ticks}}


def _scaled(series: Sequence[Series], what: str) -> dict[str, Any]:
    """Encode names by colour, dash pattern or symbol, without a legend: the page has it."""
    looks = {
        "colour": lambda one: colour_of(one.colour),
        "dash": lambda one: list(dash_of(one.colour)),
        "shape": lambda one: SHAPES[one.colour % len(SHAPES)],
    }
    chosen = {one.name: looks[what](one) for one in series}
    scale = {"domain": list(chosen), "range": list(chosen.values())}
    return {"field": "name", "type": "nominal", "scale": scale, "legend": None}


def _drawn(
    title: str,
    records: Sequence[Mapping[str, Any]],
    series: Sequence[Series],
    content: dict[str, Any],
    *,
    framed: bool = True,
) -> list[Chart]:
    """Draw a chart of records that it has no other data for; none where there are none."""
    if not records:
        return []
    if framed:
        content = {"width": WIDTH, "height": HEIGHT} | content
        content["encoding"] |= {
            "color": _scaled(series, "colour"),
            "description": {"field": "text"},
        }
    specification = {"data": {"values": records}, "config": THEME, **content}
    return [Chart(title, Markup(_svg(json.dumps(specification))))]


@lru_cache(maxsize=64)
def _svg(specification: str) -> str:
    """Draw a Vega-Lite specification; nothing is fetched, whatever a name says."""
    import vl_convert  # brings a JavaScript engine, which only a page with charts needs

    svg: str = vl_convert.vegalite_to_svg(specification, allowed_base_urls=[])
    # inside HTML no namespace is needed; the page sets the size
    return re.sub(r'<svg [^>]*(viewBox="[^"]*")>', r"<svg \1>", svg, count=1)
