"""Compare runs: the paired comparison of two students, and the problems that only one answers correctly."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raykd.analysis.comparison import Answers, Baseline, compare_pairs
from raykd.analysis.scores import Row
from raykd.analysis.statistics import wilson_interval
from raykd.config.errors import did_you_mean
from raykd.config.experiment import BASE
from raykd.errors import UserError
from raykd.report.results import ArmResult, Results, read_results
from raykd.report.text import p_with_relation, percent, points, points_interval, test_name
from raykd.storage import filesystem

RULE = "─" * 72
SCORES = {"strict": "strict match", "flexible": "flexible extract"}


@dataclass(frozen=True)
class Side:
    """One of the two students."""

    label: str
    evaluation: str
    """The evaluation settings, in words."""
    answers: Answers


def compare(first: str, second: str, score: str = "strict", limit: int | None = 10) -> str:
    """Compare two students' answers to the same problems, and list each problem that only one answers correctly.

    Args:
        first: an experiment's folder, with `:ARM` where it has several arms, and `:ARM:SEED` to choose the seed; by
            default the first seed that both sides have.
        second: the same.
        score: `strict` or `flexible`.
        limit: number of problems to list for each student; None for all.

    Returns:
        Text for a terminal.

    Raises:
        UserError: a side names no student with predictions, or the two have no problem in common.
    """
    left, right = _sides(first, second)
    column = f"is_correct_{score}"
    # Samples of a problem are paired by their number.
    pairs = [
        (left.answers[key], right.answers[key])
        for key in sorted(left.answers.keys() & right.answers.keys())
        if not left.answers[key]["error"] and not right.answers[key]["error"]
    ]
    if not pairs:
        raise UserError(f"{left.label} and {right.label} have no answered problem in common: nothing to compare")
    only_left = [pair for pair in pairs if pair[0][column] and not pair[1][column]]
    only_right = [pair for pair in pairs if pair[1][column] and not pair[0][column]]
    lines = [*_summary(left, right, pairs, column, score), ""]
    for side, only in ((left, only_left), (right, only_right)):
        shown = only[:limit]
        count = f"{len(shown)} of {len(only)}" if len(shown) < len(only) else f"{len(only)}"
        lines += [RULE, f"only {side.label} is correct: {count}", RULE, ""]
        for pair in shown:
            lines += [*_problem(left, right, pair), ""]
    return "\n".join(lines).rstrip()


def _summary(left: Side, right: Side, pairs: list[tuple[Row, Row]], column: str, score: str) -> Iterator[str]:
    by_problem: dict[str, list[tuple[bool, bool]]] = {}
    for left_row, right_row in pairs:
        by_problem.setdefault(left_row["problem_id"], []).append((left_row[column], right_row[column]))
    outcomes = [pair for problem_pairs in by_problem.values() for pair in problem_pairs]
    n = len(by_problem)
    yield f"{n:,} problem{'s' if n > 1 else ''} in common, {SCORES[score]}"
    width = max(len(left.label), len(right.label))
    for number, side in enumerate((left, right)):
        accuracy = sum(pair[number] for pair in outcomes) / len(outcomes)
        low, high = wilson_interval(accuracy * n, n)
        yield f"  {side.label:<{width}}  {percent(accuracy)} % ({percent(low)}–{percent(high)}), {side.evaluation}"
    if left.evaluation != right.evaluation:
        yield "  The evaluation settings differ, so the difference may not come from the students."
    counts = {pair: outcomes.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))}
    yield (
        f"  both correct {counts[True, True]:,}, neither {counts[False, False]:,}, only {left.label} "
        f"{counts[True, False]:,}, only {right.label} {counts[False, True]:,}"
    )
    comparison = compare_pairs(left.label, Baseline(right.label, only_prompt_differs=False), by_problem)
    yield (
        f"  difference {points(comparison.difference)} points (95 % confidence interval {points_interval(comparison)}; "
        f"{test_name(comparison)} {p_with_relation(comparison.p)})"
    )


def _problem(left: Side, right: Side, pair: tuple[Row, Row]) -> Iterator[str]:
    first = pair[0]
    sample = f", sample {first['sample_index']}" if first["sample_index"] else ""
    yield f"{first['problem_id']}{sample}: {first['question'].strip()}"
    yield f"reference answer: {first['reference_answer']}"
    for side, row in zip((left, right), pair, strict=True):
        truncated = ", truncated" if row["finish_reason"] == "length" else ""
        answer = row["answer_strict"] if row["answer_strict"] is not None else "no formatted answer"
        yield f"  ── {side.label}: {answer}{truncated}"
        yield from (f"  {line}" for line in row["completion"].strip().splitlines())


def _sides(first: str, second: str) -> tuple[Side, Side]:
    texts = (first, second)
    parsed = [parse_student(text) for text in texts]
    folders = dict.fromkeys(folder for folder, _, _ in parsed)
    results = {folder: read_results(folder, with_attention=False) for folder in folders}
    arms = [_arm(text, results[folder], arm) for text, (folder, arm, _) in zip(texts, parsed, strict=True)]
    seeds = [[trial.seed for trial in arm.trials if trial.scores.n] for arm in arms]
    given_seeds = [seed for _, _, seed in parsed if seed is not None]
    common = [seed for seed in [*given_seeds, *seeds[0]] if all(seed in arm_seeds for arm_seeds in seeds)]
    sides = []
    for text, (folder, _, seed), arm, arm_seeds in zip(texts, parsed, arms, seeds, strict=True):
        if seed is None:
            seed = common[0] if common else arm_seeds[0]
        trial = next((trial for trial in arm.trials if trial.seed == seed and trial.scores.n), None)
        if trial is None:
            raise UserError(f"{text}: arm {arm.name!r} has predictions for the seeds {arm_seeds} only")
        # The base student has no seed.
        label = arm.name if arm.name == BASE else f"{arm.name} (seed {seed})"
        sides.append(Side(label, results[folder].evaluation, results[folder].answers[trial.trial_id]))
    if sides[0].label == sides[1].label:
        # Arms of the same name in two experiments.
        sides = [Side(text, side.evaluation, side.answers) for text, side in zip(texts, sides, strict=True)]
    return sides[0], sides[1]


def parse_student(text: str) -> tuple[Path, str | None, int | None]:
    """Return the folder, arm and seed of `FOLDER[:ARM[:SEED]]`.

    Raises:
        UserError: the text has more parts, or a seed that is no integer.
    """
    # The colon of a URI's scheme is no separator.
    scheme, separator, rest = text.rpartition("://")
    folder, *more = rest.split(":")
    arm = more[0] if more else ""
    seed = more[1] if len(more) > 1 else None
    if len(more) > 2 or (seed is not None and not re.fullmatch("-?[0-9]{1,18}", seed)):
        raise UserError(f"{text!r}: write FOLDER, FOLDER:ARM or FOLDER:ARM:SEED")
    path = filesystem.resolve(scheme + separator + folder) if separator else Path(folder)
    return path, arm or None, int(seed) if seed else None


def _arm(text: str, results: Results, name: str | None) -> ArmResult:
    answered = [arm.name for arm in results.arms if arm.scores.n]
    if not answered:
        raise UserError(f"{text}: no arm has predictions yet")
    trained = [arm for arm in answered if arm != BASE]
    if name is None and len(trained) != 1:
        raise UserError(f"{text} has several arms: write {text}:ARM; arms with predictions: {', '.join(answered)}")
    arm = results.arm(name or trained[0])
    if arm is None:
        hint = did_you_mean(name or "", answered)
        raise UserError(f"{text}: arm {name!r} has no predictions{hint}; arms with predictions: {', '.join(answered)}")
    return arm
