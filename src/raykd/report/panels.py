"""Report panels: figures of small multiples: curves, and heat maps of attention heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, isfinite

import numpy as np
from markupsafe import Markup

from raykd.analysis.head_effects import Effect
from raykd.report.svg import LINE_CHARACTERS, LINE_PX, join, svg_text, viewport, wrapped

CURVE_PX = 92
"""Height of a panel of curves."""
_MAX_POINTS = 240  # A curve with more points looks the same and makes the file larger.
_HEAD_LEVELS = 5  # Steps of a heat map's color scale on each side of 0.


@dataclass(frozen=True)
class Panel:
    """A small plot of a figure with several."""

    title: str
    content: Markup
    """SVG elements, for a viewport of the panel's width and of the panels' common height."""
    above: str = ""
    """The text above the plot, such as the end of its scale."""
    below: tuple[str, str] = ("", "")
    """The texts below its left and right ends."""


def panel_grid(panels: Sequence[Panel], height: int, columns: int, heading: tuple[Markup, int]) -> tuple[Markup, int]:
    """Draw small plots side by side.

    Args:
        panels: in reading order.
        height: of each plot, in pixels.
        columns: number of panels in a row.
        heading: a legend or a scale above them, with its height.

    Returns:
        SVG elements and their height in pixels.
    """
    parts, y = [heading[0]], heading[1]
    step = 100 / columns
    width = f"{step - 4:.2f}%"
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        titles = [wrapped(panel.title, LINE_CHARACTERS // columns - 2) for panel in row]
        plot_y = LINE_PX * max(map(len, titles)) + (LINE_PX if any(panel.above for panel in row) else 4)
        for number, (panel, title) in enumerate(zip(row, titles, strict=True)):
            # Titles are aligned at their last lines.
            first_y = plot_y - LINE_PX * len(title) - (LINE_PX if panel.above else 4) + 12
            texts = [svg_text("0", first_y + LINE_PX * line, text, css="name") for line, text in enumerate(title)]
            texts.append(svg_text("0", plot_y - 4, panel.above, css="small"))
            texts.append(svg_text("0", plot_y + height + 14, panel.below[0], css="small"))
            texts.append(svg_text("100%", plot_y + height + 14, panel.below[1], css="small", anchor="end"))
            plot = viewport("0", "100%", plot_y, height, panel.content)
            parts.append(viewport(f"{step * number:.2f}%", width, y, plot_y + height, join([*texts, plot])))
        y += plot_y + height + (26 if any(any(panel.below) for panel in row) else 12)
    return join(parts), y


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
        curves: the color class and the points of each; values that are not finite are left out.
        scale: the values at the bottom and at the top.
        above: the text above the plot.
        below: the texts below its left and right ends.
    """
    low, high = scale
    xs = [x for _, curve in curves for x, _ in curve]
    first = min(xs, default=0.0)
    width = (max(xs, default=1.0) - first) or 1
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
    ).format(CURVE_PX, grid, join(lines))
    return Panel(title, plot, above, below)


def heat_map(effect: Effect, largest: float, shape: tuple[int, int], height: int) -> Markup:
    """Draw each head's effect as a cell: a row for each layer, from the top, and a column for each head.

    Blue is negative and red is positive. Cells of effects that are not significant are pale, and those of undefined
    effects are not drawn.

    Args:
        effect: of L x H heads, layer by layer.
        largest: the largest absolute value of the color scale.
        shape: L and H.
        height: in pixels.
    """
    num_layers, num_heads = shape
    is_defined = np.isfinite(effect.value)
    levels = np.rint(_HEAD_LEVELS * np.where(is_defined, effect.value, 0.0) / largest).clip(-_HEAD_LEVELS, _HEAD_LEVELS)
    classes = np.array([f"h{level + _HEAD_LEVELS:.0f}" for level in levels], dtype=object)
    classes[~effect.is_significant] += " pale"
    classes[~is_defined] = ""
    cells: dict[str, list[str]] = {}
    for layer in range(num_layers):
        for css, first, length in _runs(classes[layer * num_heads : (layer + 1) * num_heads].tolist()):
            if css:
                cells.setdefault(css, []).append(f"M{first} {layer}.5h{length}")
    paths = [Markup('<path class="{}" d="{}"/>').format(css, "".join(moves)) for css, moves in sorted(cells.items())]
    return Markup(
        '<svg class="heads" width="100%" height="{0}" viewBox="0 0 {1} {2}" preserveAspectRatio="none">'
        '<rect width="{1}" height="{2}"/>{3}</svg>'
    ).format(height, num_heads, num_layers, join(paths))


def heat_scale(largest: float) -> tuple[Markup, int]:
    """Draw the color scale of heat maps, and return it with its height in pixels."""
    num_levels = 2 * _HEAD_LEVELS + 1
    cells = [Markup('<path class="h{}" d="M{} .5h1"/>').format(level, level) for level in range(num_levels)]
    scale = Markup(
        '<svg class="heads" width="50%" height="10" y="2" viewBox="0 0 {} 1" preserveAspectRatio="none">{}</svg>'
    ).format(num_levels, join(cells))
    texts = [
        svg_text("0", 26, f"−{largest:.3g}", css="small"),
        svg_text("25%", 26, "0", css="small", anchor="middle"),
        svg_text("50%", 26, f"+{largest:.3g}", css="small", anchor="end"),
    ]
    return join([scale, *texts]), 40


def _runs(values: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield each run of equal values: the value, the index of its first element and its length."""
    first = 0
    for value, run in groupby(values):
        length = len(list(run))
        yield value, first, length
        first += length


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MAX_POINTS` points: the means of equal segments between the unchanged ends."""
    if len(curve) <= _MAX_POINTS:
        return list(curve)
    size = ceil((len(curve) - 2) / (_MAX_POINTS - 2))
    inner = curve[1:-1]
    segments = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(segment[len(segment) // 2][0], sum(value for _, value in segment) / len(segment)) for segment in segments]
    return [curve[0], *means, curve[-1]]
