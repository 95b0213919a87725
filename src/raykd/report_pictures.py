"""Report pictures: the plots of report.md as PNG files, for where a page of HTML cannot be shown."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raykd import storage
from raykd.comparison import Comparison
from raykd.config import UNTOUCHED
from raykd.measured import Mean, Share
from raykd.report_attention import NAMES, by_layer, pixels
from raykd.report_cost import teacher_share, written_by_the_teacher
from raykd.results import Results

FOLDER = "report"
_COLORS = {"primed": "#0b6b8a", "baseline": "#1a1d21"}
_OTHER = "#8b939c"
_BETWEEN = 0.18
Bounds = tuple[float, float, float]


def write_pictures(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Writes the pictures that there is something to show in.

    Args:
        results: of the experiment.
        folder: the experiment's; the pictures go into a folder of their own there.

    Returns:
        Title, and path below `folder`, of each.
    """
    made = []
    makers: list[tuple[str, str, Callable[[Results], Figure | None]]] = [
        ("Accuracy by arm", "accuracy", _accuracy),
        ("Differences", "differences", _differences),
        ("Accuracy against form and length", "form", _form),
        ("Teacher beside student", "teacher", _teacher),
        ("Training", "training", _training),
        ("What the heads look at, by layer", "attention_by_layer", _layers),
        ("What the heads look at, head by head: difference to the untouched student", "attention_by_head", _heads),
    ]
    for title, name, draw in makers:
        figure = draw(results)
        path = f"{FOLDER}/{name}.png"
        if figure is None:
            (folder / path).unlink(missing_ok=True)
            continue
        FigureCanvasAgg(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, bbox_inches="tight", facecolor="white")
        storage.write_bytes(folder / path, picture.getvalue())
        made.append((title, path))
    return made


def _accuracy(results: Results) -> Figure | None:
    arms = [arm for arm in results.arms if arm.measured.n]
    rows = [(arm.name, arm.kind, [_percent(arm.measured.strict), _percent(arm.measured.flexible)]) for arm in arms]
    return _forest(rows, "strict match (dot) and flexible extract (ring), %; 95 % intervals", ["o", "ring"])


def _differences(results: Results) -> Figure | None:
    kinds = {arm.name: arm.kind for arm in results.arms}

    def bounds(each: Comparison) -> Bounds:
        return 100 * each.difference, 100 * each.low, 100 * each.high

    pairs = zip(results.strict, results.flexible, strict=True)
    rows = [(one.arm, kinds[one.arm], [bounds(one), bounds(other)]) for one, other in pairs]
    figure = _forest(rows, "points against the arm that has no prime, strict (dot) and flexible (ring)", ["o", "ring"])
    if figure:
        figure.axes[0].axvline(0, color="#5c646d", linewidth=1)
    return figure


def _teacher(results: Results) -> Figure | None:
    rows = []
    for made in written_by_the_teacher(results):
        teacher = _percent(teacher_share(made))
        students = [arm for name in made.get("arms") or [] if (arm := results.arm(name))]
        rows += [(arm.name, arm.kind, [teacher, _percent(arm.measured.strict)]) for arm in students]
    label = "the teacher on training problems (diamond), its student on test problems (dot), strict, %"
    return _forest(rows, label, ["D", "o"])


def _forest(rows: Sequence[tuple[str, str, list[Bounds]]], label: str, shapes: Sequence[str]) -> Figure | None:
    """Values with intervals, a row an arm, from the top down."""
    if not rows:
        return None
    figure = Figure(figsize=(8, 1 + 0.42 * len(rows)))
    axes = figure.add_subplot()
    for row, (_, kind, marks) in enumerate(rows):
        color = _COLORS.get(kind, _OTHER)
        for number, ((value, low, high), shape) in enumerate(zip(marks, shapes, strict=True)):
            at = row + _BETWEEN * (2 * number - 1)
            axes.plot([low, high], [at, at], color=color, linewidth=1.6, alpha=0.7)
            fill = "white" if shape == "ring" else color
            axes.plot([value], [at], marker="o" if shape == "ring" else shape, color=color, markerfacecolor=fill)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label)
    _plain(axes)
    return figure


def _form(results: Results) -> Figure | None:
    arms = [arm for arm in results.arms if arm.measured.n]
    if not arms:
        return None
    figure = Figure(figsize=(10, 4))
    for axes, label in zip(figure.subplots(1, 2), ("answers in form, %", "tokens of an answer"), strict=True):
        for number, arm in enumerate(arms):
            across = _percent(arm.measured.answer_in_form) if "%" in label else _bounds(arm.measured.tokens, 1)
            color = _line_color(number, arm.name)
            for share, fill in ((arm.measured.flexible, "white"), (arm.measured.strict, color)):
                value, low, high = _percent(share)
                axes.plot([across[0]] * 2, [low, high], color=color, linewidth=1, alpha=0.6)
                name = arm.name if fill == color else None
                axes.plot([across[0]], [value], "o", color=color, markerfacecolor=fill, label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %: strict (dot), flexible (ring)")
        _plain(axes)
    figure.axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def _training(results: Results) -> Figure | None:
    arms = [arm for arm in results.arms if any(trial.losses for trial in arm.trials)]
    if not arms:
        return None
    columns = min(4, len(arms))
    figure = Figure(figsize=(3 * columns, 2.4 * -(-len(arms) // columns)))
    for axes, arm in zip(_grid(figure, len(arms), columns), arms, strict=True):
        for losses in [trial.losses for trial in arm.trials if trial.losses]:
            axes.plot(*zip(*losses, strict=True), color=_COLORS["primed"], linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{arm.name}: loss by step", fontsize=9)
        _plain(axes)
    figure.tight_layout()
    return figure


def _layers(results: Results) -> Figure | None:
    found = results.attention
    if not found or not found.arms or found.num_layers < 2:
        return None
    figure = Figure(figsize=(12, 5.4))
    for axes, name in zip(_grid(figure, len(NAMES), 4), NAMES, strict=True):
        for number, arm in enumerate(found.arms):
            style = "--" if arm.name == UNTOUCHED else "-"
            color = _line_color(number, arm.name)
            axes.plot(by_layer(arm.means[name]), style, color=color, linewidth=1.2, label=arm.name)
        axes.set_title(NAMES[name], fontsize=9)
        _plain(axes)
    figure.tight_layout()
    figure.axes[3].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
    return figure


def _heads(results: Results) -> Figure | None:
    found = results.attention
    changed = [arm for arm in found.arms if arm.heads] if found else []
    if not found or not changed:
        return None
    figure = Figure(figsize=(1.5 * len(changed) + 2.5, 1.7 * len(NAMES)))
    all_axes = figure.subplots(len(NAMES), len(changed), squeeze=False)
    for number, (row, name) in enumerate(zip(all_axes, NAMES, strict=True)):
        effects = [arm.heads[name] for arm in changed]
        most = max((np.nanmax(np.abs(each.value), initial=0.0) for each in effects), default=0.0)
        for axes, arm, effect in zip(row, changed, effects, strict=True):
            shape = (found.num_layers, found.num_heads)
            axes.imshow(pixels(effect, most or 1.0, shape), aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if number == 0:
                axes.set_title(arm.name, fontsize=8)
        label = f"{NAMES[name]}\nup to ±{most:.2g}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _grid(figure: Figure, count: int, columns: int) -> list:
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return list(axes[:count])


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dfe3e7", linewidth=0.7)
    axes.set_axisbelow(True)


def _line_color(number: int, name: str) -> str:
    return "#1a1d21" if name == UNTOUCHED else f"C{number % 10}"


def _percent(share: Share) -> Bounds:
    return _bounds(share, 100)


def _bounds(value: Share | Mean, unit: float) -> Bounds:
    # What is not known is not drawn.
    middle = float("nan") if value.value is None else value.value
    return (
        unit * middle,
        unit * (middle if value.low is None else value.low),
        unit * (middle if value.high is None else value.high),
    )
