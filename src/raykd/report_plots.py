"""Report plots: small inline SVG in the page's own colours.

Positions along a track are percentages, so a plot fits a phone and a wide screen with its text unscaled.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor

from markupsafe import Markup

from raykd.measured import Share
from raykd.report_cost import teacher_share, written_by_the_teacher
from raykd.report_text import interval, percent, points, points_interval
from raykd.results import Results

_STEPS = (0.5, 1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000)
_LINE_PX = 13  # Height of one mark's line within a track.
_MAX_POINTS = 240  # More than this in a curve cannot be seen, and makes the file large.


@dataclass(frozen=True)
class Axis:
    """A horizontal axis in percent or points, from the first to the last of its ticks."""

    ticks: list[float]

    def at(self, value: float) -> float:
        """Where a value lies on a track, in percent of its width."""
        low, high = self.ticks[0], self.ticks[-1]
        return 100 * (value - low) / (high - low)


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in the unit of the axis, on one line of a track."""

    value: float
    low: float | None = None
    high: float | None = None
    shape: str = "dot"
    """`dot`, `ring` or `diamond`."""
    seeds: Sequence[float] = ()
    """The single seeds' values, drawn as ticks."""


@dataclass(frozen=True)
class FigureRow:
    """A labelled track, and the numbers beside it, a line for each mark: value and interval."""

    name: str
    kind: str
    svg: Markup
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A forest plot: rows over one axis."""

    rows: list[FigureRow]
    axis: Markup


@dataclass(frozen=True)
class LossPanel:
    """The loss curves of an arm's trials."""

    name: str
    svg: Markup
    top: float
    first_step: int
    last_step: int


def accuracy_figure(results: Results) -> Figure:
    """Each arm's strict (dot) and flexible (ring) accuracy, seeds pooled, single seeds as ticks."""
    arms = [arm for arm in results.arms if arm.measured.n]
    shares = [share for arm in arms for share in (arm.measured.strict, arm.measured.flexible)]
    single = [trial.measured.strict.value for arm in arms for trial in arm.trials]
    axis = axis_over(_percents([*_bounds(shares), *single]), 0, 100)
    rows = []
    for arm in arms:
        pair = (arm.measured.strict, arm.measured.flexible)
        seeds = _percents(trial.measured.strict.value for trial in arm.trials)
        marks = [_share_mark(pair[0], "dot", seeds if len(seeds) > 1 else ()), _share_mark(pair[1], "ring")]
        rows.append(_share_row(axis, arm.name, arm.kind, marks, pair, ("strict", "flexible")))
    return Figure(rows, _axis_labels(axis, lambda tick: f"{tick:g} %"))


def difference_figure(results: Results) -> Figure:
    """Each arm's difference to the baseline in points, strict (dot) and flexible (ring)."""
    both = list(zip(results.strict, results.flexible, strict=True))
    bounds = [bound for pair in both for c in pair for bound in (c.low, c.high)]
    axis = axis_over(_percents([0, *bounds]), -100, 100)
    kinds = {arm.name: arm.kind for arm in results.arms}
    rows = []
    for pair in both:
        marks = [
            Mark(100 * c.difference, 100 * c.low, 100 * c.high, shape)
            for c, shape in zip(pair, ("dot", "ring"), strict=True)
        ]
        texts = [(points(c.difference), points_interval(c)) for c in pair]
        name = pair[0].arm
        label = f"{name}: strict {' '.join(texts[0])} points, flexible {' '.join(texts[1])} points"
        rows.append(FigureRow(name, kinds[name], _track(axis, marks, kinds[name], label), texts))
    return Figure(rows, _axis_labels(axis, lambda tick: f"{tick:+g}".replace("-", "−") if tick else "0"))


def teacher_figure(results: Results) -> Figure:
    """The teacher's accuracy by strategy (diamond) above that of the student it taught (dot), both strict."""
    found: list[tuple[str, str, tuple[Share, Share]]] = []
    for made in written_by_the_teacher(results):
        teacher = teacher_share(made)
        students = [arm for name in made.get("arms") or [] if (arm := results.arm(name))]
        found += [(arm.name, arm.kind, (teacher, arm.measured.strict)) for arm in students]
        if not students:
            found.append((str(made.get("strategy", "")), "unprimed", (teacher, Share())))
    axis = axis_over(_percents(_bounds([share for *_, pair in found for share in pair])), 0, 100)
    rows = [
        _share_row(
            axis,
            name,
            kind,
            [_share_mark(pair[0], "diamond"), _share_mark(pair[1], "dot")],
            pair,
            ("teacher", "student"),
        )
        for name, kind, pair in found
    ]
    return Figure(rows, _axis_labels(axis, lambda tick: f"{tick:g} %"))


def loss_panels(results: Results) -> list[LossPanel]:
    """A panel for each arm that was trained, all on one scale."""
    curves = {arm.name: [trial.losses for trial in arm.trials if trial.losses] for arm in results.arms}
    top = max((loss for of_arm in curves.values() for curve in of_arm for _, loss in curve), default=0.0)
    panels = []
    for name, of_arm in curves.items():
        if of_arm and top > 0:
            steps = [step for curve in of_arm for step, _ in curve]
            svg = _loss_curves(of_arm, top, f"Training loss of {name} by step")
            panels.append(LossPanel(name, svg, top, min(steps), max(steps)))
    return panels


def _share_row(
    axis: Axis,
    name: str,
    kind: str,
    marks: Sequence[Mark | None],
    shares: tuple[Share, Share],
    words: tuple[str, str],
) -> FigureRow:
    texts = [(percent(share.value), interval(share)) for share in shares]
    said = ", ".join(f"{word} {value} percent ({bounds})" for word, (value, bounds) in zip(words, texts, strict=True))
    return FigureRow(name, kind, _track(axis, marks, kind, f"{name}: {said}"), texts)


def _percents(shares: Iterable[float | None]) -> list[float]:
    return [100 * share for share in shares if share is not None]


def _bounds(shares: Iterable[Share]) -> list[float | None]:
    return [bound for share in shares for bound in (share.low, share.high)]


def _share_mark(share: Share, shape: str, seeds: Sequence[float] = ()) -> Mark | None:
    if share.value is None or share.low is None or share.high is None:
        return None
    return Mark(100 * share.value, 100 * share.low, 100 * share.high, shape, seeds)


def axis_over(values: Iterable[float | None], least: float, most: float) -> Axis:
    """An axis with up to nine round ticks that holds all values, clipped to `least` and `most`."""
    found = [value for value in values if value is not None]
    low, high = (min(found), max(found)) if found else (0.0, 100.0)
    step = next((step for step in _STEPS if (high - low) / step <= 7), _STEPS[-1])
    first, last = floor(low / step), ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    ticks = [step * k for k in range(first, last + 1)]
    kept = [tick for tick in ticks if least <= tick <= most]
    return Axis(kept if len(kept) > 1 else ticks)


def _track(axis: Axis, marks: Sequence[Mark | None], kind: str, label: str) -> Markup:
    """One row of a forest plot: each mark on its own line, over the axis' grid.

    Args:
        axis: shared by all rows of the plot.
        marks: from the top down; None leaves its line empty.
        kind: the arm's kind, which colours the row.
        label: what a screen reader says.
    """
    height = _LINE_PX * len(marks) + 10
    parts = [_grid(axis, height)]
    for line, mark in enumerate(marks):
        if mark is not None:
            parts.append(_mark(axis, mark, 5 + _LINE_PX * (line + 0.5)))
    return Markup('<svg class="track {}" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        kind, height, label, Markup("").join(parts)
    )


def _axis_labels(axis: Axis, text: Callable[[float], str]) -> Markup:
    """The numbers below a forest plot's tracks."""
    labels = Markup("").join(
        Markup('<text x="{:.2f}%" y="14" text-anchor="middle">{}</text>').format(axis.at(tick), text(tick))
        for tick in axis.ticks
    )
    return Markup('<svg class="track axis" width="100%" height="20" aria-hidden="true">{}</svg>').format(labels)


def _loss_curves(curves: Sequence[Sequence[tuple[int, float]]], top: float, label: str) -> Markup:
    """One panel with a curve for each seed, from 0 to `top`, over its own steps."""
    last_step = max((step for curve in curves for step, _ in curve), default=1) or 1
    first_step = min((step for curve in curves for step, _ in curve), default=0)
    width = (last_step - first_step) or 1
    lines = Markup("").join(
        Markup('<polyline points="{}"/>').format(
            " ".join(
                f"{100 * (step - first_step) / width:.2f},{60 - 60 * loss / top:.2f}" for step, loss in _thinned(curve)
            )
        )
        for curve in curves
        if curve
    )
    grid = Markup('<path class="grid" d="M0 0H100M0 30H100M0 60H100"/>')
    return Markup(
        '<svg class="curve" viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
    ).format(label, grid, lines)


def bar(share: float | None) -> Markup:
    """A bar for a share of its cell's width, drawn beside the number that it stands for."""
    if share is None:
        return Markup("")
    return Markup(
        '<svg class="bar" width="100%" height="4" aria-hidden="true">'
        '<rect class="rest" width="100%" height="4" rx="2"/><rect width="{:.1f}%" height="4" rx="2"/></svg>'
    ).format(100 * min(max(share, 0.0), 1.0))


def _grid(axis: Axis, height: float) -> Markup:
    return Markup("").join(
        Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="{}"/>').format(
            "zero" if tick == 0 else "grid", axis.at(tick), axis.at(tick), height
        )
        for tick in axis.ticks
    )


def _mark(axis: Axis, mark: Mark, y: float) -> Markup:
    parts = []
    if mark.low is not None and mark.high is not None:
        parts.append(
            Markup('<line class="interval" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>').format(
                axis.at(mark.low), axis.at(mark.high), y, y
            )
        )
    for seed in mark.seeds:
        parts.append(
            Markup('<line class="seed" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>').format(
                axis.at(seed), axis.at(seed), y - 6, y + 6
            )
        )
    # A nested SVG puts a shape in pixels at a place in percent.
    shape = '<path d="M0-6L6 0L0 6L-6 0Z"/>' if mark.shape == "diamond" else '<circle r="4.5"/>'
    parts.append(
        Markup('<svg class="{}" x="{:.2f}%" y="{}" overflow="visible">{}</svg>').format(
            mark.shape, axis.at(mark.value), y, Markup(shape)
        )
    )
    return Markup('<g class="mark {}">{}</g>').format(mark.shape, Markup("").join(parts))


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_MAX_POINTS` points: the mean of each stretch, and both ends as they are."""
    if len(curve) <= _MAX_POINTS:
        return list(curve)
    size = ceil((len(curve) - 2) / (_MAX_POINTS - 2))
    inner = curve[1:-1]
    stretches = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(stretch[len(stretch) // 2][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]
    return [curve[0], *means, curve[-1]]
