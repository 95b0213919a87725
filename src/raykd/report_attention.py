"""Report attention: what the report shows of the students' attention heads: tables, heatmaps and curves by layer.

S statistics, L layers, H heads of a layer. Layers and heads are counted from 0, as models do.
"""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from raykd.attention_results import ArmAttention, AttentionResults
from raykd.effects import Effect
from raykd.report_text import NOTHING, amount, p_value
from raykd.table import Table

NAMES = {
    "entropy": "Entropy, nats",
    "entropy_without_first": "Entropy without the first token, nats",
    "first": "On the first token",
    "diagonal": "On the token itself",
    "question_numbers": "On the question's numbers",
    "previous_result": "On the previous result",
    "above_tenth": "Keys above 0.1",
    "cosine": "Likeness to the layer below",
}
"""How `raykd.heads.STATISTICS` are called."""
# Decimals of what is small.
_DECIMALS = {"above_tenth": 4}
_PALE = 0.22
_AS_IT_STANDS = "Layers and heads are counted from 0."


@dataclass(frozen=True)
class Heatmaps:
    """One statistic: of each arm the difference of every head to the untouched student, on one scale."""

    statistic: str
    most: float
    """The end of the scale, up and down."""
    panels: list[tuple[str, str, str]]
    """Arm, picture as a data URI with a pixel a head, and what a screen reader says."""


@dataclass(frozen=True)
class LayerPanel:
    """One statistic by layer, a line an arm, in the mean over the layer's heads."""

    statistic: str
    svg: Markup
    low: float
    high: float


def changes(found: AttentionResults) -> Table:
    """What each arm's heads do more than the untouched student's, in the mean over all heads."""
    rows = []
    for arm in found.arms:
        if arm.overall:
            rows.append([arm.name, *(_with_interval(arm.overall[name], 0, _DECIMALS.get(name, 3)) for name in NAMES)])
        else:
            rows.append([arm.name, *(_mean(arm.means[name], _DECIMALS.get(name, 3)) for name in NAMES)])
    return Table(
        "What the heads look at",
        ["Arm", *NAMES.values()],
        rows,
        "The untouched student's mean over all heads, and how much more or less it is in each arm, with its 95 % "
        f"bootstrap interval over {amount(found.num_problems)} problems; seeds averaged, and what training with yet "
        "another would change is not in it. All students read the same reference solutions; measured at the tokens of "
        "the solution. The previous result is the number after the last equals sign of the nearest earlier line that "
        "has one. Less entropy with more weight on the first token may be no more than heads that rest: so entropy is "
        "given without it too.",
    )


def clear_heads(found: AttentionResults) -> Table:
    """How many heads of each arm do more, and less, than chance explains."""
    rows = [[arm.name, *(_up_and_down(arm.heads[name]) for name in NAMES)] for arm in found.arms if arm.heads]
    heads = amount(found.num_layers * found.num_heads)
    return Table(
        "Heads that changed",
        ["Arm", *NAMES.values()],
        rows,
        f"Of {heads} heads those that do more (↑) and less (↓) than in the untouched student, told from chance at 5 % "
        "with all of them counted (signs drawn anew, the largest head of each draw). That there are several statistics "
        "and arms is not counted.",
    )


def being_right(found: AttentionResults) -> Table:
    """How what heads do goes with being right, from problem to problem and from arm to arm."""
    rows = []
    for name, title in NAMES.items() if found.right else ():
        cells = [title]
        for effect in (found.right[name], found.accurate[name]):
            cells += [*_strongest(effect, found), _up_and_down(effect) if np.isfinite(effect.p).any() else NOTHING]
        rows.append(cells)
    problems, students, arms = (amount(each) for each in (found.num_problems, found.num_students, found.num_arms))
    return Table(
        "Heads and being right",
        ["Statistic", "Strongest by problem", "r", "p", "Clear", "Strongest by arm", "r", "p", "Clear"],
        rows,
        "Right by flexible extract, so that form plays no part. By problem: Pearson's r of what a head does on a "
        f"problem with whether that student has it right, over {problems} problems, in the mean over {students} "
        "students, each by the variance of its being right; p by permuting the problems. By arm: r of an arm's mean "
        f"with its accuracy, over {arms} arms, the untouched student among them; p by permuting the arms, of which it "
        "takes five. In brackets 95 % intervals of the head by itself. p is corrected for the number of heads, not for "
        f"that of statistics; clear: heads with p < 0.05. {_AS_IT_STANDS} A head that goes with being right need not "
        "be why.",
        text_columns=(0, 1, 5),
    )


def heatmaps(found: AttentionResults) -> list[Heatmaps]:
    """The differences of all heads, statistic by statistic."""
    changed = [arm for arm in found.arms if arm.heads]
    groups = []
    for name in NAMES:
        values = [arm.heads[name].value for arm in changed]
        most = max((float(np.nanmax(np.abs(each))) for each in values if _is_there(each)), default=0.0)
        if most > 0:
            panels = [_panel(arm, name, most, found) for arm in changed]
            groups.append(Heatmaps(NAMES[name], most, panels))
    return groups


def pixels(effect: Effect, most: float, shape: tuple[int, int]) -> np.ndarray:
    """A head's difference as a colour, (L, H, 4): blue less, red more, pale where chance may explain it."""
    from matplotlib import colormaps

    with np.errstate(invalid="ignore"):
        colors_F4 = colormaps["RdBu_r"](0.5 + 0.5 * effect.value / most)
    colors_F4[:, 3] = np.where(effect.is_clear, 1.0, _PALE)
    colors_F4[~np.isfinite(effect.value)] = 0.0
    return colors_F4.reshape(*shape, 4)


def layer_panels(found: AttentionResults, colors: Mapping[str, str]) -> list[LayerPanel]:
    """Every statistic by layer, the line of each arm in its class of colour."""
    panels = []
    for name in NAMES if found.num_layers > 1 else ():
        curves = [by_layer(arm.means[name]) for arm in found.arms]
        known = [curve[np.isfinite(curve)] for curve in curves]
        values = np.concatenate(known) if known else np.zeros(0)
        if values.size:
            low, high = float(values.min()), float(values.max())
            label = f"{NAMES[name]} by layer, a line for each arm"
            svg = _curves(curves, [colors[arm.name] for arm in found.arms], low, high, label)
            panels.append(LayerPanel(NAMES[name], svg, low, high))
    return panels


def by_layer(means_LH: np.ndarray) -> np.ndarray:
    """The mean over the heads of each layer, (L); NaN where none is defined."""
    return np.array([np.nanmean(each_H) if _is_there(each_H) else np.nan for each_H in means_LH])


def heads_csv(found: AttentionResults) -> str:
    """Every head of every arm: what it does, and how much more than in the untouched student."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "statistic", "layer", "head", "mean", "difference", "low", "high", "p_corrected"])
    for arm in found.arms:
        for name in found.statistics:
            for layer in range(found.num_layers):
                for head in range(found.num_heads):
                    at, effect = layer * found.num_heads + head, arm.heads.get(name)
                    values = [arm.means[name][layer, head], *(_of_head(effect, at) if effect else [np.nan] * 4)]
                    writer.writerow([arm.name, name, layer, head, *map(_cell, values)])
    return text.getvalue()


def right_csv(found: AttentionResults) -> str:
    """Every head: how what it does goes with being right."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("problem", "arm")
    columns = [f"{value}_by_{kind}" for kind in kinds for value in ("r", "low", "high", "p_corrected")]
    writer.writerow(["statistic", "layer", "head", *columns])
    for name in found.right:
        for at in range(found.num_layers * found.num_heads):
            values = [*_of_head(found.right[name], at), *_of_head(found.accurate[name], at)]
            writer.writerow([name, *divmod(at, found.num_heads), *map(_cell, values)])
    return text.getvalue()


def _of_head(effect: Effect, at: int) -> list[float]:
    return [each[at] for each in (effect.value, effect.low, effect.high, effect.p)]


def _panel(arm: ArmAttention, name: str, most: float, found: AttentionResults) -> tuple[str, str, str]:
    from matplotlib.image import imsave

    effect = arm.heads[name]
    picture = io.BytesIO()
    imsave(picture, pixels(effect, most, (found.num_layers, found.num_heads)), format="png")
    uri = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    said = (
        f"{NAMES[name]} of {arm.name}: {_up_and_down(effect)} of {found.num_layers} layers by {found.num_heads} heads"
    )
    return arm.name, uri, said


def _curves(curves: Sequence[np.ndarray], classes: Sequence[str], low: float, high: float, label: str) -> Markup:
    span = (high - low) or 1.0
    lines = []
    for css, curve in zip(classes, curves, strict=True):
        width = max(len(curve) - 1, 1)
        points = [
            f"{100 * layer / width:.2f},{60 - 60 * (value - low) / span:.2f}"
            for layer, value in enumerate(curve)
            if np.isfinite(value)
        ]
        lines.append(Markup('<polyline class="{}" points="{}"/>').format(css, " ".join(points)))
    grid = Markup('<path class="grid" d="M0 0H100M0 30H100M0 60H100"/>')
    return Markup(
        '<svg class="curve" viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
    ).format(label, grid, Markup("").join(lines))


def _strongest(effect: Effect, found: AttentionResults) -> list[str]:
    """The head with the largest r, its r and interval, and p."""
    if not _is_there(effect.value):
        return [NOTHING] * 3
    at = int(np.nanargmax(np.abs(effect.value)))
    layer, head = divmod(at, found.num_heads)
    p = effect.p[at]
    return [f"layer {layer}, head {head}", _with_interval(effect, at), p_value(p) if np.isfinite(p) else NOTHING]


def _with_interval(effect: Effect, at: int, decimals: int = 3) -> str:
    value, low, high, _ = _of_head(effect, at)
    if not np.isfinite(value):
        return NOTHING
    if not np.isfinite(low):
        return _signed(value, decimals)
    return f"{_signed(value, decimals)} ({_signed(low, decimals)} to {_signed(high, decimals)})"


def _up_and_down(effect: Effect) -> str:
    up, down = int((effect.is_clear & (effect.value > 0)).sum()), int((effect.is_clear & (effect.value < 0)).sum())
    return f"{up}↑ {down}↓"


def _is_there(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _mean(values: np.ndarray, decimals: int) -> str:
    return f"{np.nanmean(values):.{decimals}f}" if _is_there(values) else NOTHING


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return f"{0:.{decimals}f}" if float(text) == 0 else text.replace("-", "−")


def _cell(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""
