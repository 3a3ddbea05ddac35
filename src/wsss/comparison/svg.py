"""Charts as inline SVG: no script, no file beside the page, colours from the page's variables.

A chart is about as wide as a narrow phone, so that its text stays readable there; wide pages put
several side by side. Series k has the page's colour ``--c{k}`` and a dash pattern of its own, so
that colour is not the only difference between series.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 380, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40  # left: five digits beside the axis label
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")
NUM_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one dot of a scatter plot.

    Attributes:
        name: shown by the tooltip.
        colour: number of its colour and dash pattern.
        points: (x, y), in the units of the axes.
        marks: (x, y, text) of points that stand out.
        spread: half height of an error bar on every point, 0 for none.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]] = ()
    spread: float = 0.0


@dataclass
class _Axes:
    """A frame with ticks; maps values to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def draw(self, x_label: str, y_label: str, x_names: Sequence[str] | None = None) -> None:
        """Draw grid lines, tick labels and axis labels."""
        for value in ticks(*self.y_range):
            y = self.y(value)
            self.parts.append(f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            self.parts.append(_text(LEFT - 5, y + 4, f"{value:g}", "end"))
        positions = [*range(len(x_names))] if x_names else ticks(*self.x_range)
        for index, value in enumerate(positions):
            label = x_names[index] if x_names else f"{value:g}"
            self.parts.append(_text(self.x(value), HEIGHT - BOTTOM + 16, label, "middle"))
        self.parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.parts.append(
            f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(y_label)}</text>"
        )

    def svg(self, title: str) -> str:
        """Write the whole chart as a figure."""
        return figure(title, "".join(self.parts), HEIGHT)


def figure(title: str, content: str, height: float) -> str:
    """Write an SVG of the common width in a captioned figure."""
    return (
        f"<figure class=chart><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">'
        f"{content}</svg></figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _style(colour: int) -> str:
    dash = DASHES[colour % len(DASHES)]
    stroke = f"--c{colour % NUM_COLOURS}"
    return f'style="stroke:var({stroke});fill:none" stroke-width="2" stroke-dasharray="{dash}"'


def _fill(colour: int) -> str:
    return f'style="fill:var(--c{colour % NUM_COLOURS})"'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Give round values within a range, about as many as wanted."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= wanted:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """Give a range that holds all values, never empty."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if from_zero else low - margin), high + margin


def _finite(series: Sequence[Series]) -> list[Series]:
    """Give the series with points, NaN left out."""
    kept = []
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
        if points:
            kept.append(Series(one.name, one.colour, points, one.marks, one.spread))
    return kept


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    from_zero: bool = True,
    dots: bool = False,
) -> str:
    """Draw lines over a common axis; nothing where no series has a finite point.

    Args:
        title: caption.
        series: the lines.
        x_label: below the x axis.
        y_label: beside the y axis.
        x_names: names of the positions 0, 1, ... where x is no number.
        from_zero: whether the y axis starts at zero.
        dots: mark every point.
    """
    series = _finite(series)
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y + s for one in series for _, y in one.points for s in (-one.spread, one.spread)]
    low, high = min(xs), max(xs)
    span = (-0.3, len(x_names) - 0.7) if x_names else (low, high if high > low else low + 1)
    axes = _Axes(span, _span(ys, from_zero=from_zero))
    axes.draw(x_label, y_label, x_names)
    for one in series:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in one.points)
        axes.parts.append(
            f'<polyline points="{path}" {_style(one.colour)}><title>{html.escape(one.name)}'
            "</title></polyline>"
        )
        shown = [*one.marks, *((x, y, f"{y:.1f}") for x, y in one.points if dots)]
        for x, y, text in shown:
            axes.parts.append(_dot(axes, x, y, one.colour, f"{one.name}: {text}"))
    return axes.svg(title)


def _dot(axes: _Axes, x: float, y: float, colour: int, tooltip: str) -> str:
    return (
        f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4" {_fill(colour)}>'
        f"<title>{html.escape(tooltip)}</title></circle>"
    )


def scatter(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Draw named dots with error bars."""
    series = _finite(series)
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = [y + s for one in series for _, y in one.points for s in (-one.spread, one.spread)]
    axes = _Axes(_span(xs, from_zero=True), _span(ys, from_zero=False))
    axes.draw(x_label, y_label)
    for one in series:
        for x, y in one.points:
            if one.spread:
                low, high = axes.y(y - one.spread), axes.y(y + one.spread)
                axes.parts.append(
                    f'<path d="M{axes.x(x):.1f} {low:.1f}V{high:.1f}" {_style(one.colour)}/>'
                )
            axes.parts.append(_dot(axes, x, y, one.colour, f"{one.name}: {x:.3g}, {y:.1f}"))
            right = axes.x(x) < WIDTH * 0.6
            shift, anchor = (7, "start") if right else (-7, "end")
            axes.parts.append(_text(axes.x(x) + shift, axes.y(y) - 6, one.name, anchor))
    return axes.svg(title)


def bar_chart(
    title: str, rows: Sequence[str], series: Sequence[tuple[str, int, Sequence[float | None]]]
) -> str:
    """Draw horizontal bars in percent, grouped by row.

    Args:
        title: caption.
        rows: names of the rows.
        series: (name, colour, value of each row or None).
    """
    bar, gap, left = 8, 8, 96
    step = bar * len(series) + gap
    height = TOP + step * len(rows) + 22
    known = [value for _, _, values in series for value in values if value is not None]
    scale = (WIDTH - left - 40) / max([*known, 1e-9])
    parts = []
    for row, name in enumerate(rows):
        top = TOP + row * step
        parts.append(_text(left - 6, top + bar * len(series) / 2 + 4, name, "end"))
        for index, (label, colour, values) in enumerate(series):
            value = values[row]
            if value is None or not math.isfinite(value):
                continue
            y, length = top + index * bar, max(value * scale, 0.5)
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 1}" '
                f"{_fill(colour)}><title>{html.escape(label)}, {html.escape(name)}: {value:.1f}"
                "</title></rect>"
            )
            parts.append(
                f'<text class=tiny x="{left + length + 4:.1f}" y="{y + bar - 1}">{value:.1f}</text>'
            )
    return figure(title, "".join(parts), height)
