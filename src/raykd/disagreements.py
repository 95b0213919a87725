"""Disagreements: the test problems that one of two students has right and the other not, with what both said."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raykd import location
from raykd.comparison import Answers, Baseline, compare_pairs
from raykd.config import UNTOUCHED
from raykd.faults import UserError
from raykd.measured import Row
from raykd.mistakes import did_you_mean
from raykd.report_text import p_value, percent, points, points_interval, test_name
from raykd.results import Arm, Results, read_results
from raykd.statistics import wilson_interval

RULE = "─" * 72
SCORES = {"strict": "strict match", "flexible": "flexible extract"}


@dataclass(frozen=True)
class Side:
    """One of the two students."""

    label: str
    asked: str
    """How, in words."""
    answers: Answers


def compare(first: str, second: str, score: str = "strict", limit: int | None = 10) -> str:
    """What two students' answers to the same problems have in common, and each problem that one alone has right.

    Args:
        first: an experiment's folder, with `:ARM` where it has several arms, and `:ARM:SEED` for another seed than the
            first that both sides have.
        second: likewise.
        score: `strict` or `flexible`.
        limit: problems that are shown; None for all.

    Returns:
        Text for a terminal.

    Raises:
        UserError: where a side names no student that answered, or the two have no problem in common.
    """
    left, right = _sides(first, second)
    column = f"is_correct_{score}"
    # Several samples of a problem are no pairs: sample by sample they are.
    pairs = [
        (left.answers[key], right.answers[key])
        for key in sorted(left.answers.keys() & right.answers.keys())
        if not left.answers[key]["error"] and not right.answers[key]["error"]
    ]
    if not pairs:
        raise UserError(f"{left.label} and {right.label} answered no problem in common: nothing to compare")
    only = [
        [pair for pair in pairs if pair[0][column] and not pair[1][column]],
        [pair for pair in pairs if pair[1][column] and not pair[0][column]],
    ]
    lines = [*_summary(left, right, pairs, column, score), ""]
    for side, found in zip((left, right), only, strict=True):
        shown = found[:limit]
        of = f"{len(shown)} of {len(found)}" if len(shown) < len(found) else f"{len(found)}"
        lines += [RULE, f"only {side.label} is right: {of}", RULE, ""]
        for pair in shown:
            lines += [*_problem(left, right, pair), ""]
    return "\n".join(lines).rstrip()


def _summary(left: Side, right: Side, pairs: list[tuple[Row, Row]], column: str, score: str) -> Iterator[str]:
    by_problem: dict[str, list[tuple[bool, bool]]] = {}
    for mine, theirs in pairs:
        by_problem.setdefault(mine["problem_id"], []).append((mine[column], theirs[column]))
    every = [pair for of_problem in by_problem.values() for pair in of_problem]
    n = len(by_problem)
    yield f"{n:,} problem{'s' if n > 1 else ''} in common, {SCORES[score]}"
    width = max(len(left.label), len(right.label))
    for number, side in enumerate((left, right)):
        share = sum(pair[number] for pair in every) / len(every)
        low, high = wilson_interval(share * n, n)
        yield f"  {side.label:<{width}}  {percent(share)} % ({percent(low)}–{percent(high)}), {side.asked}"
    if left.asked != right.asked:
        yield "  They were not asked in the same way: what differs need not be the students."
    counts = {pair: every.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))}
    yield (
        f"  both right {counts[True, True]:,}, neither {counts[False, False]:,}, only {left.label} "
        f"{counts[True, False]:,}, only {right.label} {counts[False, True]:,}"
    )
    found = compare_pairs(left.label, Baseline(right.label, prime_alone=False), by_problem)
    p = p_value(found.p)
    yield (
        f"  difference {points(found.difference)} points (95 % interval {points_interval(found)}; "
        f"{test_name(found)} p {p if p.startswith('<') else '= ' + p})"
    )


def _problem(left: Side, right: Side, pair: tuple[Row, Row]) -> Iterator[str]:
    mine = pair[0]
    sample = f", sample {mine['sample_index']}" if mine["sample_index"] else ""
    yield f"{mine['problem_id']}{sample}: {printable(mine['question']).strip()}"
    yield f"reference answer: {mine['reference_answer']}"
    for side, row in zip((left, right), pair, strict=True):
        cut = ", cut" if row["finish_reason"] == "length" else ""
        said = row["answer_strict"] if row["answer_strict"] is not None else "no answer in form"
        yield f"  ── {side.label}: {said}{cut}"
        yield from (f"  {line}" for line in printable(row["completion"]).strip().splitlines())


def printable(text: str) -> str:
    """Text from outside without what a terminal would take for commands."""
    return "".join(each if each in "\n\t" or each.isprintable() else "\ufffd" for each in text)


def _sides(first: str, second: str) -> tuple[Side, Side]:
    named = [_named(each) for each in (first, second)]
    folders = dict.fromkeys(folder for folder, _, _ in named)
    read = {folder: read_results(folder, with_attention=False) for folder in folders}
    arms = [_arm(text, read[folder], arm) for text, (folder, arm, _) in zip((first, second), named, strict=True)]
    seeds = [[trial.seed for trial in arm.trials if trial.measured.n] for arm in arms]
    told = [seed for _, _, seed in named if seed is not None]
    common = next((seed for seed in [*told, *seeds[0]] if all(seed in own for own in seeds)), None)
    sides = []
    for text, (folder, _, seed), arm, own in zip((first, second), named, arms, seeds, strict=True):
        wanted = seed if seed is not None else common if common is not None else own[0]
        trial = next((each for each in arm.trials if each.seed == wanted and each.measured.n), None)
        if trial is None:
            raise UserError(f"{text}: arm {arm.name!r} has answers of the seeds {own} only")
        # The untouched student has no seed.
        label = arm.name if arm.name == UNTOUCHED else f"{arm.name} (seed {wanted})"
        sides.append(Side(label, read[folder].asked, read[folder].answers[trial.trial_id]))
    if sides[0].label == sides[1].label:
        # Of two experiments the same arm.
        sides = [Side(text, side.asked, side.answers) for text, side in zip((first, second), sides, strict=True)]
    return sides[0], sides[1]


def _named(text: str) -> tuple[Path, str | None, int | None]:
    """Folder, arm and seed of `FOLDER[:ARM[:SEED]]`."""
    # The colon of a bucket's scheme parts nothing.
    scheme, is_uri, rest = text.rpartition("://")
    folder, *more = rest.split(":")
    arm, seed = (*more, None, None)[:2]
    if len(more) > 2 or (seed is not None and not re.fullmatch("-?[0-9]{1,18}", seed)):
        raise UserError(f"{text!r}: write FOLDER, FOLDER:ARM or FOLDER:ARM:SEED")
    return location.at(scheme + is_uri + folder) if is_uri else Path(folder), arm or None, int(seed) if seed else None


def _arm(text: str, results: Results, name: str | None) -> Arm:
    answered = [arm.name for arm in results.arms if arm.measured.n]
    if not answered:
        raise UserError(f"{text}: no student has answered a test problem yet")
    trained = [each for each in answered if each != UNTOUCHED]
    if name is None and len(trained) != 1:
        raise UserError(f"{text}: which arm? Write {text}:ARM; those that answered: {', '.join(answered)}")
    found = results.arm(name or trained[0])
    if found is None:
        hint = did_you_mean(name or "", answered)
        raise UserError(f"{text}: no arm {name!r} has answers{hint}; those that have: {', '.join(answered)}")
    return found
