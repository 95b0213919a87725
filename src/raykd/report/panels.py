"""Report panels: figures of several small plots side by side: curves, and heat maps of attention heads."""

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
_HEAD_LEVELS = 5  # Steps of a heat map's colour scale on each side of 0.


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


def panel_grid(panels: Sequence[Panel], height: int, columns: int, heading: tuple[Markup, int]) -> tuple[Markup, int]:
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
        titles = [wrapped(panel.title, LINE_CHARACTERS // columns - 2) for panel in row]
        plot_y = LINE_PX * max(map(len, titles)) + (LINE_PX if any(panel.above for panel in row) else 4)
        for number, (panel, title) in enumerate(zip(row, titles, strict=True)):
            # The last line of every title stands right above its plot.
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
    ).format(CURVE_PX, grid, join(lines))
    return Panel(title, plot, above, below)


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
    classes = [
        f"h{level + _HEAD_LEVELS:.0f}{'' if is_significant else ' pale'}" if is_drawn else ""
        for level, is_significant, is_drawn in zip(levels, effect.is_clear, is_defined, strict=True)
    ]
    cells: dict[str, list[str]] = {}
    for layer in range(num_layers):
        for css, first, length in _runs(classes[layer * num_heads : (layer + 1) * num_heads]):
            if css:
                cells.setdefault(css, []).append(f"M{first} {layer}.5h{length}")
    paths = [Markup('<path class="{}" d="{}"/>').format(css, "".join(own)) for css, own in sorted(cells.items())]
    return Markup(
        '<svg class="heads" width="100%" height="{0}" viewBox="0 0 {1} {2}" preserveAspectRatio="none">'
        '<rect width="{1}" height="{2}"/>{3}</svg>'
    ).format(height, num_heads, num_layers, join(paths))


def heat_scale(most: float) -> tuple[Markup, int]:
    """Draw the colour scale of heat maps, and return it with its height in pixels."""
    num_levels = 2 * _HEAD_LEVELS + 1
    cells = [Markup('<path class="h{}" d="M{} .5h1"/>').format(level, level) for level in range(num_levels)]
    scale = Markup(
        '<svg class="heads" width="50%" height="10" y="2" viewBox="0 0 {} 1" preserveAspectRatio="none">{}</svg>'
    ).format(num_levels, join(cells))
    texts = [
        svg_text("0", 26, f"−{most:.3g}", css="small"),
        svg_text("25%", 26, "0", css="small", anchor="middle"),
        svg_text("50%", 26, f"+{most:.3g}", css="small", anchor="end"),
    ]
    return join([scale, *texts]), 40


def _runs(values: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Equal neighbours: the value, the index of the first and how many there are."""
    first = 0
    for value, run in groupby(values):
        length = len(list(run))
        yield value, first, length
        first += length


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
