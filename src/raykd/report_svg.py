"""Report SVG: a figure drawn once, which the page holds inline and the Markdown report as a file.

Positions across are percentages of the width and positions down are pixels, so that a figure fits a phone and a wide
screen with its text unscaled. Colours are classes of `templates/style.j2`.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, floor, isfinite

import numpy as np
from markupsafe import Markup

from raykd.effects import Effect

_TICK_STEPS = (0.5, 1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000)
_LINE_PX = 16  # Height of a line of text.
_MARK_PX = 13  # Height of one mark's line in a forest plot.
_SCATTER_PX = 260
_CURVE_PX = 92
_MAX_POINTS = 240  # A curve with more points looks the same and makes the file larger.
_TITLE_CHARACTERS = 44  # A line of this length fits a figure of 360 pixels.
_HEAD_LEVELS = 5  # Steps of a heat map's colour scale on each side of 0.


@dataclass(frozen=True)
class Figure:
    """A figure: what is drawn, and the words that go with it."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    caption: str
    """What the marks mean, for the line below the figure."""
    description: str
    """The numbers in words, for a screen reader."""
    height: int
    """In pixels."""
    content: Markup
    """SVG elements, to be put into an `<svg class="chart">` of any width."""


@dataclass(frozen=True)
class Axis:
    """An axis from the first to the last of its ticks."""

    ticks: list[float]

    def position(self, value: float) -> float:
        """Where a value lies, in percent of the axis' length."""
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
    """A class of colour; none for a symbol whose colour varies."""


@dataclass(frozen=True)
class ForestRow:
    """A row of a forest plot: one mark for each symbol of the plot, and the same values as text."""

    name: str
    color: str
    marks: Sequence[Mark | None]
    texts: Sequence[str]


@dataclass(frozen=True)
class ScatterPoint:
    """An arm in a scatter plot: where it lies across, and one mark up for each symbol of the plot."""

    name: str
    color: str
    across: Mark
    up: Sequence[Mark]
    text: str


@dataclass(frozen=True)
class Panel:
    """One of several small plots over each other's width."""

    title: str
    content: Markup
    """SVG elements, in a viewport of the panel's width and of the height that all panels share."""
    above: str = ""
    """The text on top of the plot, such as the end of its scale."""
    below: tuple[str, str] = ("", "")
    """The texts under its left and right ends."""


def axis_over(values: Iterable[float | None], least: float, most: float) -> Axis:
    """Return an axis with up to nine round ticks that holds all values, clipped to `least` and `most`."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 100.0)
    step = next((step for step in _TICK_STEPS if (high - low) / step <= 7), _TICK_STEPS[-1])
    first, last = floor(low / step), ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    ticks = [step * k for k in range(first, last + 1)]
    clipped = [tick for tick in ticks if least <= tick <= most]
    return Axis(clipped if len(clipped) > 1 else ticks)


def forest_plot(
    rows: Sequence[ForestRow], axis: Axis, symbols: Sequence[str], legend: Sequence[Key], unit: str
) -> tuple[Markup, int]:
    """Draw rows of values with intervals over one axis.

    Args:
        rows: from the top down.
        axis: shared by all rows.
        symbols: of the marks of a row, in their order.
        legend: what the symbols and colours mean.
        unit: of the axis, for its end.

    Returns:
        SVG elements and their height in pixels.
    """
    parts, y = _started(legend)
    for row in rows:
        for line in _wrapped(row.name, _TITLE_CHARACTERS):
            parts.append(_text("0", y + 12, line, css="name"))
            y += _LINE_PX
        for number, (symbol, text) in enumerate(zip(symbols, row.texts, strict=True)):
            parts.append(_key(number, len(symbols), y + 7, Key(symbol, text, row.color)))
        y += _LINE_PX + 2
        height = _MARK_PX * len(symbols) + 4
        lines = [_grid(axis, height)]
        for number, (symbol, mark, text) in enumerate(zip(symbols, row.marks, row.texts, strict=True)):
            if mark is not None:
                lines.append(_mark_across(axis, mark, symbol, 2 + _MARK_PX * (number + 0.5), f"{row.name}: {text}"))
        parts.append(_viewport("4%", "92%", y, height, Markup('<g class="{}">{}</g>').format(row.color, _join(lines))))
        y += height + 10
    labels = [_text(f"{axis.position(tick):.2f}%", 10, _tick_text(axis, tick), anchor="middle") for tick in axis.ticks]
    parts += [_viewport("4%", "92%", y, _LINE_PX, _join(labels)), _text("50%", y + 28, unit, anchor="middle")]
    return _join(parts), y + 34


def scatter_plot(
    points: Sequence[ScatterPoint],
    x: Axis,
    y: Axis,
    symbols: Sequence[str],
    legend: Sequence[Key],
    titles: tuple[str, str],
) -> tuple[Markup, int]:
    """Draw points with intervals both ways.

    Args:
        points: one for each arm.
        x: the axis across.
        y: the axis up.
        symbols: of the marks of a point, in their order.
        legend: what the symbols and colours mean.
        titles: of the axis across and of the axis up.

    Returns:
        SVG elements and their height in pixels.
    """
    parts, top = _started(legend)
    parts.append(_text("0", top + 12, titles[1]))
    lines = [
        Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>').format(x.position(tick), _SCATTER_PX)
        + _text(f"{x.position(tick):.2f}%", _SCATTER_PX + 18, f"{tick:g}", anchor="middle")
        for tick in x.ticks
    ]
    lines += [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(_up(y, tick))
        + _text("-8", _up(y, tick) + 4, f"{tick:g}", anchor="end")
        for tick in y.ticks
    ]
    for point in points:
        drawn = [Markup("<title>{}</title>").format(point.text)]
        at = x.position(point.across.value)
        for symbol, mark in reversed(list(zip(symbols, point.up, strict=True))):
            drawn.append(_interval(f"{at:.2f}%", f"{at:.2f}%", _up(y, mark.low), _up(y, mark.high)))
            drawn.append(_symbol(symbol, f"{at:.2f}%", _up(y, mark.value)))
        low, high = (f"{x.position(bound):.2f}%" for bound in (point.across.low, point.across.high))
        height = _up(y, point.up[0].value)
        drawn.append(_interval(low, high, height, height))
        lines.append(Markup('<g class="{}">{}</g>').format(point.color, _join(drawn)))
    parts.append(_viewport("9%", "88%", top + 24, _SCATTER_PX, _join(lines)))
    bottom = top + 24 + _SCATTER_PX
    parts.append(_text("53%", bottom + 36, titles[0], anchor="middle"))
    return _join(parts), bottom + 42


def panel_grid(
    panels: Sequence[Panel], height: int, columns: int, heading: tuple[Markup, int] = (Markup(""), 0)
) -> tuple[Markup, int]:
    """Draw small plots side by side.

    Args:
        panels: in reading order.
        height: of each plot, in pixels.
        columns: how many stand side by side.
        heading: a legend or a scale above them, with its height.

    Returns:
        SVG elements and their height in pixels.
    """
    parts, y = [heading[0]], heading[1]
    step = 100 / columns
    width = f"{step - 4:.2f}%"
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        titles = [_wrapped(panel.title, _TITLE_CHARACTERS // columns) for panel in row]
        title_px = _LINE_PX * max(map(len, titles))
        above_px = _LINE_PX if any(panel.above for panel in row) else 4
        for number, (panel, title) in enumerate(zip(row, titles, strict=True)):
            texts = [_text("0", 12 + _LINE_PX * line, text, css="name") for line, text in enumerate(title)]
            plot_y = title_px + above_px
            texts.append(_text("0", plot_y - 4, panel.above, css="small"))
            texts.append(_text("0", plot_y + height + 14, panel.below[0], css="small"))
            texts.append(_text("100%", plot_y + height + 14, panel.below[1], css="small", anchor="end"))
            plot = _viewport("0", "100%", plot_y, height, panel.content)
            parts.append(_viewport(f"{step * number:.2f}%", width, y, plot_y + height, _join([*texts, plot])))
        y += title_px + above_px + height + (26 if any(any(panel.below) for panel in row) else 12)
    return _join(parts), y


def curves_panel(
    title: str,
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    scale: tuple[float, float],
    above: str,
    below: tuple[str, str],
) -> Panel:
    """Return a panel with a line for each curve.

    Args:
        title: of the panel.
        curves: the class of colour and the points of each; values that are not finite are left out.
        scale: the values at the bottom and at the top.
        above: the text on top.
        below: the texts under the left and right ends.
    """
    low, high = scale
    places = [x for _, curve in curves for x, _ in curve]
    first = min(places, default=0.0)
    width = (max(places, default=1.0) - first) or 1
    lines = [
        Markup('<polyline class="{}" points="{}"/>').format(
            color,
            " ".join(
                f"{100 * (x - first) / width:.2f},{60 - 60 * (value - low) / ((high - low) or 1):.2f}"
                for x, value in _thinned([point for point in curve if isfinite(point[1])])
            ),
        )
        for color, curve in curves
    ]
    grid = Markup('<path class="grid" d="M0 0H100M0 30H100M0 60H100"/>')
    plot = Markup(
        '<svg class="curve" width="100%" height="{}" viewBox="0 0 100 60" preserveAspectRatio="none">{}{}</svg>'
    ).format(_CURVE_PX, grid, _join(lines))
    return Panel(title, plot, above, below)


def curve_grid(panels: Sequence[Panel], keys: Sequence[Key] = ()) -> tuple[Markup, int]:
    """Draw panels of curves two side by side, under a legend, with the height of it all in pixels."""
    parts, height = _started(keys)
    return panel_grid(panels, _CURVE_PX, columns=2, heading=(_join(parts), height))


def heat_map(effect: Effect, most: float, shape: tuple[int, int], height: int) -> Markup:
    """Draw each head's effect as a cell: a row a layer, from the top down, and a column a head.

    Blue is negative and red is positive. Cells of effects that are not significant are pale, and those of undefined
    effects are not drawn.

    Args:
        effect: of L x H heads, layer by layer.
        most: the largest absolute value of the colour scale.
        shape: L and H.
        height: in pixels.
    """
    num_layers, num_heads = shape
    is_defined = np.isfinite(effect.value)
    levels = np.rint(_HEAD_LEVELS * np.where(is_defined, effect.value, 0.0) / most).clip(-_HEAD_LEVELS, _HEAD_LEVELS)
    runs: dict[str, list[str]] = {}
    for layer in range(num_layers):
        cells = range(layer * num_heads, (layer + 1) * num_heads)
        keys = [heat_class(int(levels[at]), bool(effect.is_clear[at])) if is_defined[at] else "" for at in cells]
        for css, run in groupby(range(num_heads), key=lambda head, keys=keys: keys[head]):
            heads = list(run)
            if css:
                runs.setdefault(css, []).append(f"M{heads[0]} {layer}.5h{len(heads)}")
    paths = [Markup('<path class="{}" d="{}"/>').format(css, "".join(cells)) for css, cells in sorted(runs.items())]
    return Markup(
        '<svg class="heads" width="100%" height="{0}" viewBox="0 0 {1} {2}" preserveAspectRatio="none">'
        '<rect width="{1}" height="{2}"/>{3}</svg>'
    ).format(height, num_heads, num_layers, _join(paths))


def heat_class(level: int, is_significant: bool) -> str:
    """Return the class of a heat map's cell, for a level from -5 to 5."""
    return f"h{level + _HEAD_LEVELS}" + ("" if is_significant else " pale")


def heat_scale(most: float) -> tuple[Markup, int]:
    """Draw the colour scale of heat maps, and return it with its height in pixels."""
    num_levels = 2 * _HEAD_LEVELS + 1
    cells = [Markup('<path class="h{}" d="M{} .5h1"/>').format(level, level) for level in range(num_levels)]
    scale = Markup(
        '<svg class="heads" width="50%" height="10" y="2" viewBox="0 0 {} 1" preserveAspectRatio="none">{}</svg>'
    ).format(num_levels, _join(cells))
    texts = [
        _text("0", 26, f"−{most:.3g}", css="small"),
        _text("25%", 26, "0", css="small", anchor="middle"),
        _text("50%", 26, f"+{most:.3g}", css="small", anchor="end"),
    ]
    return _join([scale, *texts]), 40


def _started(keys: Sequence[Key]) -> tuple[list[Markup], int]:
    """The elements of a figure that begins with a legend, two entries side by side, and where the next one goes."""
    entries = [_key(number % 2, 2, 8 + (_LINE_PX + 2) * (number // 2), key) for number, key in enumerate(keys)]
    return entries, (_LINE_PX + 2) * ceil(len(keys) / 2) + (12 if keys else 0)


def _key(column: int, num_columns: int, y: float, key: Key) -> Markup:
    parts = [_symbol(key.symbol, "7", 0), _text("18", 4, key.text)]
    return Markup('<svg class="{}" x="{:.2f}%" y="{}" overflow="visible">{}</svg>').format(
        key.color or "any", 100 / num_columns * column, y, _join(parts)
    )


def _symbol(symbol: str, x: str, y: float) -> Markup:
    """A mark at a place across, with its unit, and a place down."""
    if symbol == "diamond":
        # A nested viewport puts a path in pixels at a place in percent.
        path = '<svg x="{}" y="{:.1f}" overflow="visible"><path class="hollow" d="M0-6L6 0L0 6L-6 0Z"/></svg>'
        return Markup(path).format(x, y)
    if symbol in ("line", "dashed"):
        return Markup('<line class="{}" x1="0" x2="14" y1="{}" y2="{}"/>').format(symbol, y, y)
    css = "hollow" if symbol == "ring" else "dot"
    return Markup('<circle class="{}" cx="{}" cy="{:.1f}" r="4.5"/>').format(css, x, y)


def _mark_across(axis: Axis, mark: Mark, symbol: str, y: float, text: str) -> Markup:
    low, value, high = (f"{axis.position(each):.2f}%" for each in (mark.low, mark.value, mark.high))
    seeds = [
        Markup('<line class="seed" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>').format(
            axis.position(seed), y - 6, y + 6
        )
        for seed in mark.seeds
    ]
    parts = [Markup("<title>{}</title>").format(text), _interval(low, high, y, y), *seeds, _symbol(symbol, value, y)]
    return Markup('<g class="mark">{}</g>').format(_join(parts))


def _interval(x1: str, x2: str, y1: float, y2: float) -> Markup:
    return Markup('<line class="interval" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(x1, x2, y1, y2)


def _grid(axis: Axis, height: float) -> Markup:
    """Vertical lines at an axis' ticks."""
    return _join(
        Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="0" y2="{2}"/>').format(
            "zero" if tick == 0 else "grid", axis.position(tick), height
        )
        for tick in axis.ticks
    )


def _viewport(x: str, width: str, y: float, height: float, content: Markup) -> Markup:
    """Elements in a part of the width, of which their percentages are."""
    return Markup('<svg x="{}" y="{}" width="{}" height="{}" overflow="visible">{}</svg>').format(
        x, y, width, height, content
    )


def _text(x: str, y: float, text: str, css: str = "", anchor: str = "start") -> Markup:
    if not text:
        return Markup("")
    return Markup('<text class="{}" x="{}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        css or "label", x, y, anchor, text
    )


def _up(axis: Axis, value: float) -> float:
    """Where a value lies in a scatter plot, in pixels from the top."""
    return _SCATTER_PX * (1 - axis.position(value) / 100)


def _tick_text(axis: Axis, tick: float) -> str:
    """A tick's number, with its sign where the axis goes below 0."""
    text = f"{tick:+g}" if axis.ticks[0] < 0 and tick else f"{tick:g}"
    return text.replace("-", "−")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points: the mean of each stretch, and both ends as they are."""
    if len(curve) <= _MAX_POINTS:
        return list(curve)
    size = ceil((len(curve) - 2) / (_MAX_POINTS - 2))
    inner = curve[1:-1]
    stretches = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [
        (stretch[len(stretch) // 2][0], sum(value for _, value in stretch) / len(stretch)) for stretch in stretches
    ]
    return [curve[0], *means, curve[-1]]
