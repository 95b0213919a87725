"""Report SVG: figures as SVG elements, inline in the HTML page and as files for the Markdown report.

Horizontal positions are percentages of the width and vertical positions are pixels, so that a figure fits narrow and
wide screens without scaling its text. Colors are classes of `templates/style.j2`.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor

from markupsafe import Markup

_TICK_STEPS = (0.5, 1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000)
LINE_PX = 16  # Height of a line of text.
_MARK_PX = 13  # Height of a mark's line in a forest plot.
_SCATTER_PX = 260
LINE_CHARACTERS = 44  # A line of this length fits a figure of 360 pixels.


@dataclass(frozen=True)
class Figure:
    """A figure: its SVG elements, title, caption and description."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    caption: str
    """The explanation of the marks, below the figure."""
    description: str
    """The numbers in words, for a screen reader."""
    height: int
    """In pixels."""
    content: Markup
    """SVG elements for an `<svg class="chart">` of any width."""


@dataclass(frozen=True)
class PlotAxis:
    """An axis from the first to the last of its ticks."""

    ticks: list[float]

    def position(self, value: float) -> float:
        """Return the position of a value, in percent of the axis' length."""
        low, high = self.ticks[0], self.ticks[-1]
        return 100 * (value - low) / (high - low)


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in the unit of the axis."""

    value: float
    low: float
    high: float
    seeds: Sequence[float] = ()
    """The values of single seeds, drawn as ticks."""


@dataclass(frozen=True)
class Key:
    """A legend entry."""

    symbol: str
    """`dot`, `ring`, `diamond`, `line` or `dashed`."""
    text: str
    color: str = ""
    """A color class; empty for a symbol whose color varies."""


@dataclass(frozen=True)
class ForestRow:
    """A row of a forest plot: one mark for each symbol of the plot, and the same values as text."""

    name: str
    color: str
    marks: Sequence[Mark | None]
    texts: Sequence[str]


@dataclass(frozen=True)
class ScatterPoint:
    """An arm in a scatter plot: its x value, and one y value for each symbol of the plot."""

    name: str
    color: str
    x: Mark
    ys: Sequence[Mark]
    text: str


def axis_over(values: Iterable[float | None], minimum: float, maximum: float) -> PlotAxis:
    """Return an axis with up to nine round ticks that contains all values, clipped to `minimum` and `maximum`."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 100.0)
    step = next((step for step in _TICK_STEPS if (high - low) / step <= 7), _TICK_STEPS[-1])
    first, last = floor(low / step), ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    ticks = [step * k for k in range(first, last + 1)]
    clipped = [tick for tick in ticks if minimum <= tick <= maximum]
    return PlotAxis(clipped if len(clipped) > 1 else ticks)


def forest_plot(
    rows: Sequence[ForestRow], axis: PlotAxis, symbols: Sequence[str], keys: Sequence[Key], title: str
) -> tuple[Markup, int]:
    """Draw rows of values with intervals over one axis.

    Args:
        rows: from top to bottom.
        axis: shared by all rows.
        symbols: of the marks of a row, in their order.
        keys: the entries of the legend.
        title: of the axis, with its unit.

    Returns:
        SVG elements and their height in pixels.
    """
    head, y = legend(keys)
    parts = [head]
    for row in rows:
        for line in wrapped(row.name, LINE_CHARACTERS):
            parts.append(svg_text("0", y + 12, line, css="name"))
            y += LINE_PX
        for number, (symbol, text) in enumerate(zip(symbols, row.texts, strict=True)):
            parts.append(_key(number, len(symbols), y + 7, Key(symbol, text, row.color)))
        y += LINE_PX + 2
        height = _MARK_PX * len(symbols) + 4
        lines = [_grid(axis, height)]
        for number, (symbol, mark, text) in enumerate(zip(symbols, row.marks, row.texts, strict=True)):
            if mark is not None:
                lines.append(_mark_across(axis, mark, symbol, 2 + _MARK_PX * (number + 0.5), f"{row.name}: {text}"))
        parts.append(viewport("4%", "92%", y, height, Markup('<g class="{}">{}</g>').format(row.color, join(lines))))
        y += height + 10
    labels = [
        svg_text(f"{axis.position(tick):.2f}%", 10, _tick_text(axis, tick), anchor="middle") for tick in axis.ticks
    ]
    parts += [viewport("4%", "92%", y, LINE_PX, join(labels)), svg_text("50%", y + 28, title, anchor="middle")]
    return join(parts), y + 34


def scatter_plot(
    points: Sequence[ScatterPoint],
    x: PlotAxis,
    y: PlotAxis,
    symbols: Sequence[str],
    keys: Sequence[Key],
    titles: tuple[str, str],
) -> tuple[Markup, int]:
    """Draw points with horizontal and vertical intervals.

    Args:
        points: one for each arm.
        x: the horizontal axis.
        y: the vertical axis.
        symbols: of the marks of a point, in their order.
        keys: the entries of the legend.
        titles: of the x axis and of the y axis.

    Returns:
        SVG elements and their height in pixels.
    """
    head, top = legend(keys)
    parts = [head, svg_text("0", top + 12, titles[1])]
    lines = [
        Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>').format(x.position(tick), _SCATTER_PX)
        + svg_text(f"{x.position(tick):.2f}%", _SCATTER_PX + 18, f"{tick:g}", anchor="middle")
        for tick in x.ticks
    ]
    lines += [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(_scatter_y(y, tick))
        + svg_text("-8", _scatter_y(y, tick) + 4, f"{tick:g}", anchor="end")
        for tick in y.ticks
    ]
    lines += [_scatter_point(point, x, y, symbols) for point in points]
    parts.append(viewport("9%", "88%", top + 24, _SCATTER_PX, join(lines)))
    bottom = top + 24 + _SCATTER_PX
    parts.append(svg_text("53%", bottom + 36, titles[0], anchor="middle"))
    return join(parts), bottom + 42


def _scatter_point(point: ScatterPoint, x: PlotAxis, y: PlotAxis, symbols: Sequence[str]) -> Markup:
    parts = [Markup("<title>{}</title>").format(point.text)]
    value = f"{x.position(point.x.value):.2f}%"
    for symbol, mark in reversed(list(zip(symbols, point.ys, strict=True))):
        parts.append(_interval(value, value, _scatter_y(y, mark.low), _scatter_y(y, mark.high)))
        parts.append(_symbol(symbol, value, _scatter_y(y, mark.value)))
    low, high = (f"{x.position(bound):.2f}%" for bound in (point.x.low, point.x.high))
    height = _scatter_y(y, point.ys[0].value)
    parts.append(_interval(low, high, height, height))
    return Markup('<g class="{}">{}</g>').format(point.color, join(parts))


def legend(keys: Sequence[Key]) -> tuple[Markup, int]:
    """Draw a legend, two entries side by side, and return it with its height in pixels."""
    entries = [_key(number % 2, 2, 8 + (LINE_PX + 2) * (number // 2), key) for number, key in enumerate(keys)]
    return join(entries), (LINE_PX + 2) * ceil(len(keys) / 2) + (12 if keys else 0)


def _key(column: int, num_columns: int, y: float, key: Key) -> Markup:
    parts = [_symbol(key.symbol, "7", 0), svg_text("18", 4, key.text)]
    return Markup('<svg class="{}" x="{:.2f}%" y="{}" overflow="visible">{}</svg>').format(
        key.color or "any", 100 / num_columns * column, y, join(parts)
    )


def _symbol(symbol: str, x: str, y: float) -> Markup:
    """Draw a symbol at `x`, a length with its unit, and `y` in pixels."""
    if symbol == "diamond":
        # A path has no percentages: a nested viewport positions it.
        path = '<svg x="{}" y="{:.1f}" overflow="visible"><path class="hollow" d="M0-6L6 0L0 6L-6 0Z"/></svg>'
        return Markup(path).format(x, y)
    if symbol in ("line", "dashed"):
        return Markup('<line class="{}" x1="0" x2="14" y1="{}" y2="{}"/>').format(symbol, y, y)
    css = "hollow" if symbol == "ring" else "dot"
    return Markup('<circle class="{}" cx="{}" cy="{:.1f}" r="4.5"/>').format(css, x, y)


def _mark_across(axis: PlotAxis, mark: Mark, symbol: str, y: float, text: str) -> Markup:
    low, value, high = (f"{axis.position(bound):.2f}%" for bound in (mark.low, mark.value, mark.high))
    seeds = [
        Markup('<line class="seed" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>').format(
            axis.position(seed), y - 6, y + 6
        )
        for seed in mark.seeds
    ]
    parts = [Markup("<title>{}</title>").format(text), _interval(low, high, y, y), *seeds, _symbol(symbol, value, y)]
    return Markup('<g class="mark">{}</g>').format(join(parts))


def _interval(x1: str, x2: str, y1: float, y2: float) -> Markup:
    return Markup('<line class="interval" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(x1, x2, y1, y2)


def _grid(axis: PlotAxis, height: float) -> Markup:
    """Draw vertical lines at an axis' ticks."""
    return join(
        Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="0" y2="{2}"/>').format(
            "zero" if tick == 0 else "grid", axis.position(tick), height
        )
        for tick in axis.ticks
    )


def viewport(x: str, width: str, y: float, height: float, content: Markup) -> Markup:
    """Return a nested viewport; percentages inside its content are of its width."""
    return Markup('<svg x="{}" y="{}" width="{}" height="{}" overflow="visible">{}</svg>').format(
        x, y, width, height, content
    )


def svg_text(x: str, y: float, text: str, css: str = "", anchor: str = "start") -> Markup:
    """Draw a line of text; nothing for an empty text."""
    if not text:
        return Markup("")
    return Markup('<text class="{}" x="{}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        css or "label", x, y, anchor, text
    )


def _scatter_y(axis: PlotAxis, value: float) -> float:
    """Return the vertical position of a value in a scatter plot, in pixels from the top."""
    return _SCATTER_PX * (1 - axis.position(value) / 100)


def _tick_text(axis: PlotAxis, tick: float) -> str:
    """Return a tick's number, with its sign where the axis includes negative values."""
    text = f"{tick:+g}" if axis.ticks[0] < 0 and tick else f"{tick:g}"
    return text.replace("-", "−")


def wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width` characters; an empty text is one empty line."""
    return textwrap.wrap(text, width) or [""]


def join(parts: Iterable[Markup]) -> Markup:
    """Return the elements as one piece of markup."""
    return Markup("").join(parts)
