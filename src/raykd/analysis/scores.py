"""Measured: what a set of predictions says: accuracy, form and length, each with n and an interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raykd.analysis.statistics import majority, mean_interval, pass_at_k, wilson_interval
from raykd.data.grading import is_correct, repeated_share

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Proportion:
    """A share of rows and its 95 % Wilson interval, as fractions; None where nothing was counted."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeanCI:
    """A mean over rows and its 95 % interval over problems; None where too little was counted."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scores:
    """What a set of predictions says. Rows with an error are in `errors` and nowhere else.

    An interval's n is the number of problems, which seeds and samples only repeat.
    """

    strict: Proportion
    flexible: Proportion
    n: int
    errors: int
    num_problems: int
    answer_in_form: Proportion
    """With an answer after `####`."""
    right_in_form: Proportion
    """Right (strict) among those with an answer after `####`."""
    truncated: Proportion
    """Cut at the token limit."""
    tokens: MeanCI
    """Tokens of an answer."""
    repetition: MeanCI
    """Share of an answer's runs of four words that occurred in it before."""
    num_samples: int = 1
    """Answers of a student to each problem."""
    majority_strict: Proportion = Proportion()
    """Whether the answer that most samples of a problem give is right (maj@k, k all samples)."""
    majority_flexible: Proportion = Proportion()
    pass_strict: Mapping[int, Proportion] = field(default_factory=dict)
    """Whether one of k samples of a problem is right (pass@k), by `passes`; problems with fewer are left out."""
    pass_flexible: Mapping[int, Proportion] = field(default_factory=dict)


def compute_scores(rows: Iterable[Row]) -> Scores:
    """What prediction rows say. Rows of several seeds may be passed together."""
    rows = list(rows)
    answered = [row for row in rows if not row["error"]]
    in_form = [row for row in answered if row["answer_strict"] is not None]
    of_problem: dict[tuple[str, str], list[Row]] = {}
    for row in answered:
        of_problem.setdefault((row["trial_id"], row["problem_id"]), []).append(row)
    sampled = list(of_problem.values())
    return Scores(
        strict=_share(answered, [row["is_correct_strict"] for row in answered]),
        flexible=_share(answered, [row["is_correct_flexible"] for row in answered]),
        n=len(answered),
        errors=len(rows) - len(answered),
        num_problems=len({row["problem_id"] for row in answered}),
        answer_in_form=_share(answered, [row["answer_strict"] is not None for row in answered]),
        right_in_form=_share(in_form, [row["is_correct_strict"] for row in in_form]),
        truncated=_share(answered, [row["finish_reason"] == "length" for row in answered]),
        tokens=_mean(answered, [row["num_tokens"] for row in answered]),
        repetition=_mean(answered, [repeated_share(row["completion"]) for row in answered]),
        num_samples=max(map(len, sampled), default=1),
        majority_strict=_majority(sampled, "strict"),
        majority_flexible=_majority(sampled, "flexible"),
        pass_strict=_passed(sampled, "strict"),
        pass_flexible=_passed(sampled, "flexible"),
    )


def _majority(sampled: Sequence[Sequence[Row]], score: str) -> Proportion:
    right = [
        is_correct(majority([row[f"answer_{score}"] for row in rows]), rows[0]["reference_answer"]) for rows in sampled
    ]
    return _share([rows[0] for rows in sampled], right)


def passes(samples: int) -> list[int]:
    """The k of pass@k: powers of two, and all samples; one is the mean over all."""
    return sorted({*(k for k in (2, 4, 8, 16, 32, 64, 128) if k < samples), *([samples] if samples > 1 else [])})


def _passed(sampled: Sequence[Sequence[Row]], score: str) -> dict[int, Proportion]:
    found = {}
    for k in passes(max(map(len, sampled), default=1)):
        enough = [rows for rows in sampled if len(rows) >= k]
        right = [sum(row[f"is_correct_{score}"] for row in rows) for rows in enough]
        chances = [pass_at_k(len(rows), correct, k) for rows, correct in zip(enough, right, strict=True)]
        found[k] = _share([rows[0] for rows in enough], chances)
    return found


def _share(rows: Sequence[Row], values: Sequence[float]) -> Proportion:
    if not rows:
        return Proportion()
    problems = len({row["problem_id"] for row in rows})
    value = sum(values) / len(values)
    return Proportion(value, *wilson_interval(value * problems, problems))


def _mean(rows: Sequence[Row], values: Sequence[float]) -> MeanCI:
    if not rows:
        return MeanCI()
    by_problem: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        by_problem.setdefault(row["problem_id"], []).append(value)
    means = [sum(each) / len(each) for each in by_problem.values()]
    low, high = mean_interval(means) if len(means) > 1 else (None, None)
    # Counts and shares: the normal interval reaches below zero where nearly all are zero.
    return MeanCI(sum(values) / len(values), None if low is None else max(low, 0.0), high)
