"""Report figures: the figures of an experiment's results, each drawn once for the page and for a file."""

from collections.abc import Iterable, Sequence

import numpy as np

from raykd.analysis.attention_results import AttentionResults
from raykd.analysis.comparison import Comparison
from raykd.analysis.scores import MeanCI, Proportion
from raykd.config.experiment import BASE
from raykd.report.attention import NAMES, mean_by_layer, num_significant
from raykd.report.cost import teacher_generated, teacher_share
from raykd.report.panels import CURVE_PX, Panel, curves_panel, heat_map, heat_scale, panel_grid
from raykd.report.results import Results
from raykd.report.svg import (
    Figure,
    ForestRow,
    Key,
    Mark,
    PlotAxis,
    ScatterPoint,
    axis_over,
    forest_plot,
    legend,
    scatter_plot,
)
from raykd.report.text import points_and_interval, share_and_interval

HEADS = "attention_heads_"
"""The prefix of the names of the figures by head."""
_NUM_COLORS = 8
_KINDS = {"primed": "primed teacher", "baseline": "unprimed teacher", "other": "for comparison"}
_STRICT, _FLEXIBLE = Key("dot", "strict match"), Key("ring", "flexible extract")


def figures(results: Results) -> list[Figure]:
    """Return the figures that have data, in the report's order."""
    shown = [
        _accuracy(results),
        _differences(results),
        *_scatter_figures(results),
        _teacher(results),
        _training(results),
    ]
    if results.attention and results.attention.arms:
        shown += [_layers(results, results.attention), *_heads(results.attention)]
    return [figure for figure in shown if figure]


def _accuracy(results: Results) -> Figure | None:
    """Draw each arm's strict (dot) and flexible (ring) accuracy, seeds pooled, single seeds as ticks."""
    arms = [arm for arm in results.arms if arm.scores.n]
    rows = []
    for arm in arms:
        shares = [arm.scores.strict, arm.scores.flexible]
        seeds = _percents(trial.scores.strict.value for trial in arm.trials)
        marks = [_mark(shares[0], seeds if len(seeds) > 1 else ()), _mark(shares[1])]
        rows.append(ForestRow(arm.name, _color(arm.kind), marks, [share_and_interval(share) for share in shares]))
    return _forest(
        "accuracy",
        "Accuracy by arm",
        "Seeds are pooled. Lines are 95 % confidence intervals and short ticks are single seeds. The n of an "
        "interval is the number of problems, because every seed answers the same ones; variation between training "
        "seeds is not in it.",
        rows,
        axis=_share_axis(rows),
        symbols=(_STRICT, _FLEXIBLE),
        unit="Accuracy, %",
    )


def _differences(results: Results) -> Figure | None:
    """Draw each arm's difference from its baseline, strict (dot) and flexible (ring)."""
    kinds = {arm.name: arm.kind for arm in results.arms}
    rows = []
    for strict, flexible in zip(results.strict, results.flexible, strict=True):
        marks = [_difference_mark(strict), _difference_mark(flexible)]
        texts = [points_and_interval(strict), points_and_interval(flexible)]
        rows.append(ForestRow(strict.arm, _color(kinds[strict.arm]), marks, texts))
    return _forest(
        "differences",
        "Differences from the baseline",
        "Lines are 95 % confidence intervals of the paired difference.",
        rows,
        axis=axis_over([0, *_bounds(rows)], -100, 100),
        symbols=(_STRICT, _FLEXIBLE),
        unit="Difference in accuracy, percentage points",
    )


def _teacher(results: Results) -> Figure | None:
    """Draw the teacher's strict accuracy by strategy (diamond) and the distilled student's (dot)."""
    rows = []
    for completions in teacher_generated(results):
        teacher = teacher_share(completions)
        arms = [arm for name in completions.get("arms") or [] if (arm := results.arm(name))]
        students = [(arm.name, arm.kind, arm.scores.strict) for arm in arms]
        if not students:
            students = [(str(completions.get("strategy", "")), "unprimed", Proportion())]
        for name, kind, student in students:
            texts = [share_and_interval(teacher), share_and_interval(student)]
            rows.append(ForestRow(name, _color(kind), [_mark(teacher), _mark(student)], texts))
    return _forest(
        "teacher",
        "Accuracy of teacher and student",
        "Strict match. The teacher answers training problems with its prompt and the student answers test problems "
        "without it, so the two accuracies are not directly comparable.",
        rows,
        axis=_share_axis(rows),
        symbols=(Key("diamond", "teacher, training set"), Key("dot", "student, test set")),
        unit="Accuracy, %",
    )


def _forest(
    name: str, title: str, caption: str, rows: Sequence[ForestRow], axis: PlotAxis, symbols: Sequence[Key], unit: str
) -> Figure | None:
    if not rows:
        return None
    shown = {row.color for row in rows}
    keys = [*symbols, *(Key("line", text, color) for color, text in _KINDS.items() if color in shown)]
    content, height = forest_plot(rows, axis, [key.symbol for key in symbols], keys, unit)
    words = [
        f"{row.name}: " + ", ".join(f"{key.text} {text}" for key, text in zip(symbols, row.texts, strict=True))
        for row in rows
    ]
    return Figure(name, title, caption, "; ".join(words), height, content)


def _scatter_figures(results: Results) -> list[Figure | None]:
    """Draw accuracy against the format rate, and against the length of answers."""
    return [
        _scatter(
            results,
            "format_rate",
            "Accuracy against format rate",
            "Format rate, %",
            [_mark(arm.scores.format_rate) for arm in results.arms if arm.scores.n],
            x_max=100,
        ),
        _scatter(
            results,
            "answer_length",
            "Accuracy against answer length",
            "Tokens per answer",
            [_mean_mark(arm.scores.tokens) for arm in results.arms if arm.scores.n],
            x_max=float("inf"),
        ),
    ]


def _scatter(
    results: Results, name: str, title: str, x_title: str, x_marks: Sequence[Mark | None], x_max: float
) -> Figure | None:
    colors = _arm_colors(results)
    points = []
    for arm, x_mark in zip([arm for arm in results.arms if arm.scores.n], x_marks, strict=True):
        strict, flexible = _mark(arm.scores.strict), _mark(arm.scores.flexible)
        if x_mark and strict and flexible:
            text = f"{arm.name}: strict {strict.value:.1f} %, flexible {flexible.value:.1f} %, at {x_mark.value:.1f}"
            points.append(ScatterPoint(arm.name, colors[arm.name], x_mark, [strict, flexible], text))
    if not points:
        return None
    keys = [_STRICT, _FLEXIBLE, *(Key("dot", point.name, point.color) for point in points)]
    x = axis_over([bound for point in points for bound in (point.x.low, point.x.high)], 0, x_max)
    y = axis_over([bound for point in points for mark in point.ys for bound in (mark.low, mark.high)], 0, 100)
    symbols = [_STRICT.symbol, _FLEXIBLE.symbol]
    content, height = scatter_plot(points, x, y, symbols, keys, (x_title, "Accuracy, %"))
    words = "; ".join(point.text for point in points)
    return Figure(name, title, "Lines are 95 % confidence intervals.", f"{x_title}: {words}", height, content)


def _training(results: Results) -> Figure | None:
    """Draw the loss of each arm's trials by step, all arms on one scale."""
    curves = {arm.name: [trial.losses for trial in arm.trials if trial.losses] for arm in results.arms}
    curves = {name: arm_curves for name, arm_curves in curves.items() if arm_curves}
    top = max((loss for arm_curves in curves.values() for curve in arm_curves for _, loss in curve), default=0.0)
    if top <= 0:
        return None
    panels = []
    for name, arm_curves in curves.items():
        steps = [step for curve in arm_curves for step, _ in curve]
        ends = (f"step {min(steps)}", f"step {max(steps)}")
        colored = [("primed", curve) for curve in arm_curves]
        panels.append(curves_panel(name, colored, (0.0, top), f"loss {top:.3g}", ends))
    content, height = panel_grid(panels, CURVE_PX, columns=2, heading=legend([]))
    words = "; ".join(f"{name}: {first[0][1]:.3g} to {first[-1][1]:.3g}" for name, (first, *_) in curves.items())
    caption = "One line for each seed. All panels have the same scale, which begins at 0."
    return Figure("training", "Training loss", caption, words, height, content)


def _layers(results: Results, attention: AttentionResults) -> Figure | None:
    """Draw every statistic by layer, with a line for each arm."""
    if attention.num_layers < 2:
        return None
    colors = _arm_colors(results)
    panels = []
    for name, title in NAMES.items():
        means = {arm.name: mean_by_layer(arm.means[name]) for arm in attention.arms}
        values = np.concatenate(list(means.values()))
        values = values[np.isfinite(values)]
        if values.size:
            low, high = float(values.min()), float(values.max())
            curves = [(colors[arm], list(enumerate(mean.tolist()))) for arm, mean in means.items()]
            ends = ("layer 0", f"layer {attention.num_layers - 1}")
            panels.append(curves_panel(title, curves, (low, high), f"{low:.3g} to {high:.3g}", ends))
    if not panels:
        return None
    keys = [Key("dashed" if arm.name == BASE else "line", arm.name, colors[arm.name]) for arm in attention.arms]
    content, height = panel_grid(panels, CURVE_PX, columns=2, heading=legend(keys))
    words = f"{len(panels)} statistics over {attention.num_layers} layers for {len(attention.arms)} arms"
    caption = "Mean over the heads of a layer. The numbers above a panel are the ends of its scale."
    return Figure("attention_by_layer", "Attention statistics by layer", caption, words, height, content)


def _heads(attention: AttentionResults) -> list[Figure]:
    """Draw the difference of every head from the base student, with a figure for each statistic."""
    changed = [arm for arm in attention.arms if arm.heads]
    shape = (attention.num_layers, attention.num_heads)
    height = min(max(8 * attention.num_layers, 64), 240)
    plots = []
    for name, title in NAMES.items():
        effects = {arm.name: arm.heads[name] for arm in changed}
        values = np.array([effect.value for effect in effects.values()])
        largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
        if largest > 0:
            panels = [Panel(arm, heat_map(effect, largest, shape, height)) for arm, effect in effects.items()]
            content, total = panel_grid(panels, height, columns=3, heading=heat_scale(largest))
            words = "; ".join(f"{arm}: {num_significant(effect)}" for arm, effect in effects.items())
            caption = (
                "Difference of each head from the base student: one row per layer, layer 0 at the top, and one column "
                "per head. Pale cells are not statistically significant after correction for the number of heads."
            )
            plots.append(Figure(HEADS + name, f"{title}, by head", caption, words, total, content))
    return plots


def _arm_colors(results: Results) -> dict[str, str]:
    """Return the color class of each arm, for figures in which every arm has its own color."""
    names = [arm.name for arm in results.arms if arm.name != BASE]
    return {BASE: "base"} | {name: f"c{number % _NUM_COLORS}" for number, name in enumerate(names)}


def _color(kind: str) -> str:
    """Return the color class of a kind of arm."""
    return kind if kind in _KINDS else "other"


def _share_axis(rows: Sequence[ForestRow]) -> PlotAxis:
    return axis_over(_bounds(rows), 0, 100)


def _bounds(rows: Sequence[ForestRow]) -> list[float]:
    """Return all values that the axis must contain."""
    marks = [mark for row in rows for mark in row.marks if mark]
    return [value for mark in marks for value in (mark.low, mark.high, *mark.seeds)]


def _percents(shares: Iterable[float | None]) -> list[float]:
    return [100 * share for share in shares if share is not None]


def _mark(share: Proportion, seeds: Sequence[float] = ()) -> Mark | None:
    """Return a proportion in percent as a mark; None without a value or an interval."""
    if share.value is None or share.low is None or share.high is None:
        return None
    return Mark(100 * share.value, 100 * share.low, 100 * share.high, seeds)


def _mean_mark(mean: MeanCI) -> Mark | None:
    """Return a mean as a mark; its interval is empty where the mean has none."""
    if mean.value is None:
        return None
    low = mean.value if mean.low is None else mean.low
    high = mean.value if mean.high is None else mean.high
    return Mark(mean.value, low, high)


def _difference_mark(comparison: Comparison) -> Mark:
    return Mark(100 * comparison.difference, 100 * comparison.low, 100 * comparison.high)
