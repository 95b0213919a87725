"""Report attention: the tables and CSV files on the students' attention heads.

S statistics, L layers, H heads of a layer. Layers and heads are counted from 0, as models do.
"""

import csv
import io

import numpy as np

from raykd.analysis.attention_results import AttentionResults
from raykd.analysis.head_effects import Effect
from raykd.report.table import Table
from raykd.report.text import NOTHING, amount, p_value

NAMES = {
    "entropy": "Entropy, nats",
    "entropy_without_first": "Entropy without the first token, nats",
    "first": "Weight on the first token",
    "diagonal": "Weight on the current token",
    "question_numbers": "Weight on numbers in the question",
    "previous_result": "Weight on the previous result",
    "above_tenth": "Share of keys with weight above 0.1",
    "cosine": "Cosine similarity to the previous layer",
}
"""The title of each of `raykd.evaluation.attention_heads.STATISTICS`."""
_DECIMALS = {"above_tenth": 4}
"""Decimals of a statistic with small values; 3 for the others."""


def changes(attention: AttentionResults) -> Table:
    """Return each arm's mean difference from the base student over all heads."""
    rows = []
    for arm in attention.arms:
        cells = []
        for name in NAMES:
            decimals = _DECIMALS.get(name, 3)
            if arm.overall:
                cells.append(_with_interval(arm.overall[name], 0, decimals))
            else:
                cells.append(_mean(arm.means[name], decimals))
        rows.append([arm.name, *cells])
    return Table(
        "Attention statistics",
        ["Arm", *NAMES.values()],
        rows,
        "The first row is the base student's mean over all heads. The other rows are differences from it, with 95 % "
        f"bootstrap intervals over {amount(attention.num_problems)} problems. Seeds are averaged; variation between "
        "training seeds is not in the interval. All students read the same reference solutions, and the statistics are "
        "measured at the tokens of the solution. The previous result is the number after the last equals sign on the "
        "nearest earlier line that has one. Lower entropy with more weight on the first token may only mean that heads "
        "are inactive, so entropy is also given without the first token.",
    )


def changed_heads(attention: AttentionResults) -> Table:
    """Return how many heads of each arm differ significantly from the base student's."""
    rows = [[arm.name, *(num_significant(arm.heads[name]) for name in NAMES)] for arm in attention.arms if arm.heads]
    num_heads = amount(attention.num_layers * attention.num_heads)
    return Table(
        "Significantly changed heads",
        ["Arm", *NAMES.values()],
        rows,
        f"Number of heads, of {num_heads}, whose statistic is significantly higher (↑) or lower (↓) than in the base "
        "student at the 5 % level. The sign-flip test with the maximum statistic corrects for the number of heads. It "
        "does not correct for the number of statistics and arms.",
    )


def correctness(attention: AttentionResults) -> Table:
    """Return the correlation of heads' statistics with correct answers, across problems and across arms."""
    rows = []
    for name, title in NAMES.items():
        if name not in attention.correctness_by_problem:
            continue
        cells = [title]
        for effect in (attention.correctness_by_problem[name], attention.accuracy_by_arm[name]):
            cells += _strongest(effect, attention)
            cells.append(num_significant(effect) if np.isfinite(effect.p).any() else NOTHING)
        rows.append(cells)
    num_problems, num_students = amount(attention.num_problems), amount(attention.num_students)
    return Table(
        "Attention and correctness",
        [
            "Statistic",
            "Strongest head by problem",
            "r",
            "p",
            "Significant heads",
            "Strongest head by arm",
            "r",
            "p",
            "Significant heads",
        ],
        rows,
        "Answers are scored by flexible extract, so that the answer format plays no part. By problem: Pearson's r of "
        f"a head's statistic with the correctness of the student's answer, over {num_problems} problems. It is "
        f"averaged over {num_students} students, weighted by the variance of each student's correctness; p is from a "
        "permutation test over problems. By arm: r of an arm's mean statistic with its accuracy, over "
        f"{amount(attention.num_arms)} arms, including the base student; p is from a permutation test over arms, "
        "which needs at least five arms. Brackets are 95 % confidence intervals of the single head. p is corrected "
        "for the number of heads, but not for the number of statistics. Significant heads have p < 0.05. Layers and "
        "heads are counted from 0. A correlation is no evidence that a head causes correct answers.",
        text_columns=(0, 1, 5),
    )


def mean_by_layer(means_LH: np.ndarray) -> np.ndarray:
    """Return the mean over the heads of each layer, (L); NaN where none is defined."""
    return np.array([np.nanmean(layer_H) if _any_defined(layer_H) else np.nan for layer_H in means_LH])


def heads_csv(attention: AttentionResults) -> str:
    """Return attention.csv: every head's statistics in every arm, and their difference from the base student's."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "statistic", "layer", "head", "mean", "difference", "low", "high", "p_corrected"])
    for arm in attention.arms:
        for name in attention.statistics:
            for layer in range(attention.num_layers):
                for head in range(attention.num_heads):
                    index, effect = layer * attention.num_heads + head, arm.heads.get(name)
                    head_effect = _of_head(effect, index) if effect else (np.nan, np.nan, np.nan, np.nan)
                    values = [arm.means[name][layer, head], *head_effect]
                    writer.writerow([arm.name, name, layer, head, *map(_cell, values)])
    return text.getvalue()


def correctness_csv(attention: AttentionResults) -> str:
    """Return attention_correctness.csv: the correlation of every head's statistics with correct answers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kinds = ("problem", "arm")
    columns = [f"{value}_by_{kind}" for kind in kinds for value in ("r", "low", "high", "p_corrected")]
    writer.writerow(["statistic", "layer", "head", *columns])
    for name in attention.correctness_by_problem:
        by_problem, by_arm = attention.correctness_by_problem[name], attention.accuracy_by_arm[name]
        for index in range(attention.num_layers * attention.num_heads):
            values = [*_of_head(by_problem, index), *_of_head(by_arm, index)]
            writer.writerow([name, *divmod(index, attention.num_heads), *map(_cell, values)])
    return text.getvalue()


def _of_head(effect: Effect, index: int) -> tuple[float, float, float, float]:
    """Return the value, interval and p of one head."""
    return effect.value[index], effect.low[index], effect.high[index], effect.p[index]


def _strongest(effect: Effect, attention: AttentionResults) -> list[str]:
    """Return the head with the largest absolute r, its r and interval, and p."""
    if not _any_defined(effect.value):
        return [NOTHING] * 3
    index = int(np.nanargmax(np.abs(effect.value)))
    layer, head = divmod(index, attention.num_heads)
    p = effect.p[index]
    return [f"layer {layer}, head {head}", _with_interval(effect, index), p_value(p) if np.isfinite(p) else NOTHING]


def _with_interval(effect: Effect, index: int, decimals: int = 3) -> str:
    value, low, high, _ = _of_head(effect, index)
    if not np.isfinite(value):
        return NOTHING
    if not np.isfinite(low):
        return _signed(value, decimals)
    return f"{_signed(value, decimals)} ({_signed(low, decimals)} to {_signed(high, decimals)})"


def num_significant(effect: Effect) -> str:
    """Return how many heads have a significant positive and negative effect: `3↑ 1↓`."""
    up = (effect.is_significant & (effect.value > 0)).sum()
    down = (effect.is_significant & (effect.value < 0)).sum()
    return f"{up}↑ {down}↓"


def _any_defined(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _mean(values: np.ndarray, decimals: int) -> str:
    return f"{np.nanmean(values):.{decimals}f}" if _any_defined(values) else NOTHING


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return f"{0:.{decimals}f}" if float(text) == 0 else text.replace("-", "−")


def _cell(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""
