"""Scores: the accuracy, format and length of a set of predictions, each with n and a confidence interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raykd.analysis.statistics import majority, mean_interval, pass_at_k, wilson_interval
from raykd.data.grading import is_correct, repeated_share

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Proportion:
    """A proportion of rows and its 95 % Wilson interval, as fractions; None without rows."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeanCI:
    """A mean over rows and its 95 % confidence interval over problems; None where there are too few rows."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of a set of predictions. Rows with an error count in `errors` only.

    The n of a confidence interval is the number of problems, because seeds and samples repeat a problem.
    """

    strict: Proportion
    flexible: Proportion
    n: int
    errors: int
    num_problems: int
    format_rate: Proportion
    """Share of predictions with an answer after `####`."""
    accuracy_given_format: Proportion
    """Strict accuracy among predictions with an answer after `####`."""
    truncated: Proportion
    """Share of predictions that reached the token limit."""
    tokens: MeanCI
    """Number of tokens of a prediction."""
    repetition: MeanCI
    """Share of a prediction's 4-grams of words that occurred in it before."""
    num_samples: int = 1
    """Number of answers of a student to each problem."""
    majority_strict: Proportion = Proportion()
    """Share of problems whose most frequent answer is correct (maj@k, k = `num_samples`)."""
    majority_flexible: Proportion = Proportion()
    pass_strict: Mapping[int, Proportion] = field(default_factory=dict)
    """pass@k by k (see `passes`): whether at least one of k samples is correct. Problems with fewer are left out."""
    pass_flexible: Mapping[int, Proportion] = field(default_factory=dict)


def compute_scores(rows: Iterable[Row]) -> Scores:
    """Return the scores of prediction rows, which may be of several seeds."""
    rows = list(rows)
    answered = [row for row in rows if not row["error"]]
    formatted = [row for row in answered if row["answer_strict"] is not None]
    by_problem: dict[tuple[str, str], list[Row]] = {}
    for row in answered:
        by_problem.setdefault((row["trial_id"], row["problem_id"]), []).append(row)
    samples = list(by_problem.values())
    return Scores(
        strict=_proportion(answered, [row["is_correct_strict"] for row in answered]),
        flexible=_proportion(answered, [row["is_correct_flexible"] for row in answered]),
        n=len(answered),
        errors=len(rows) - len(answered),
        num_problems=len({row["problem_id"] for row in answered}),
        format_rate=_proportion(answered, [row["answer_strict"] is not None for row in answered]),
        accuracy_given_format=_proportion(formatted, [row["is_correct_strict"] for row in formatted]),
        truncated=_proportion(answered, [row["finish_reason"] == "length" for row in answered]),
        tokens=_mean(answered, [row["num_tokens"] for row in answered]),
        repetition=_mean(answered, [repeated_share(row["completion"]) for row in answered]),
        num_samples=max(map(len, samples), default=1),
        majority_strict=_majority(samples, "strict"),
        majority_flexible=_majority(samples, "flexible"),
        pass_strict=_pass_at_k(samples, "strict"),
        pass_flexible=_pass_at_k(samples, "flexible"),
    )


def _majority(samples: Sequence[Sequence[Row]], score: str) -> Proportion:
    correct = [
        is_correct(majority([row[f"answer_{score}"] for row in rows]), rows[0]["reference_answer"]) for rows in samples
    ]
    return _proportion([rows[0] for rows in samples], correct)


def passes(num_samples: int) -> list[int]:
    """Return the k of pass@k: powers of two from 2, and `num_samples`; pass@1 is the mean over all samples."""
    if num_samples < 2:
        return []
    return [*(k for k in (2, 4, 8, 16, 32, 64, 128) if k < num_samples), num_samples]


def _pass_at_k(samples: Sequence[Sequence[Row]], score: str) -> dict[int, Proportion]:
    by_k = {}
    for k in passes(max(map(len, samples), default=1)):
        enough = [rows for rows in samples if len(rows) >= k]
        num_correct = [sum(row[f"is_correct_{score}"] for row in rows) for rows in enough]
        chances = [pass_at_k(len(rows), correct, k) for rows, correct in zip(enough, num_correct, strict=True)]
        by_k[k] = _proportion([rows[0] for rows in enough], chances)
    return by_k


def _proportion(rows: Sequence[Row], values: Sequence[float]) -> Proportion:
    if not rows:
        return Proportion()
    num_problems = len({row["problem_id"] for row in rows})
    value = sum(values) / len(values)
    return Proportion(value, *wilson_interval(value * num_problems, num_problems))


def _mean(rows: Sequence[Row], values: Sequence[float]) -> MeanCI:
    if not rows:
        return MeanCI()
    by_problem: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        by_problem.setdefault(row["problem_id"], []).append(value)
    means = [sum(problem_values) / len(problem_values) for problem_values in by_problem.values()]
    low, high = mean_interval(means) if len(means) > 1 else (None, None)
    # All values are counts or shares, but the normal interval reaches below 0 where nearly all of them are 0.
    return MeanCI(sum(values) / len(values), None if low is None else max(low, 0.0), high)
