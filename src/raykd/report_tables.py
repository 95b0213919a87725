"""Report tables: the report's tables as text cells, the same for Markdown, HTML and the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raykd.comparison import BASELINE
from raykd.report_text import (
    NOTHING,
    amount,
    duration,
    p_value,
    percent,
    points,
    points_interval,
    share_and_interval,
)
from raykd.results import Results, Share, finite
from raykd.statistics import wilson_interval


@dataclass(frozen=True)
class Table:
    """A table of text cells. Numbers are set to the right, the columns of `text_columns` to the left."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)
    share_columns: tuple[int, ...] = ()
    """Columns of percentages, which the page underlines with a bar."""


def tables(results: Results) -> list[Table]:
    """All tables that have rows, in the report's order."""
    makers = (result, differences, form, teachers, training, cost, stages)
    return [table for table in (make(results) for make in makers) if table.rows]


def result(results: Results) -> Table:
    """Every trial, failed ones too, with its accuracy."""
    rows = []
    for trial in results.trials:
        m = trial.measured
        status = trial.status if trial.status != "failed" else f"failed: {_first_line(trial.error)}"
        rows.append(
            [
                trial.arm,
                str(trial.seed),
                share_and_interval(m.strict),
                share_and_interval(m.flexible),
                amount(m.n),
                amount(m.errors),
                status,
            ]
        )
    return Table(
        "Results",
        ["Arm", "Seed", "Strict %", "Flexible %", "n", "Errors", "Status"],
        rows,
        "Accuracy in percent with its 95 % Wilson interval. Strict: the number after “####”. Flexible: the "
        "last number. Both as lm-evaluation-harness scores gsm8k. Problems that got no completion (errors) "
        "are not in n.",
        text_columns=(0, 6),
    )


def differences(results: Results) -> Table:
    """Every arm against the baseline, by paired tests."""
    rows = []
    for strict, flexible in zip(results.strict, results.flexible, strict=True):
        rows.append(
            [
                strict.arm,
                f"{points(strict.difference)} ({points_interval(strict)})",
                amount(strict.only_arm),
                amount(strict.only_baseline),
                p_value(strict.p),
                p_value(strict.p_holm),
                f"{points(flexible.difference)} ({points_interval(flexible)})",
                amount(strict.num_problems),
            ]
        )
    return Table(
        f"Differences to arm “{BASELINE}”",
        [
            "Arm",
            "Strict, points",
            "Only arm right",
            f"Only “{BASELINE}” right",
            "p",
            "p, corrected",
            "Flexible, points",
            "Problems",
        ],
        rows,
        "Pairs are the same problem with the same seed. Intervals: 95 %, paired bootstrap over problems. p: "
        "exact McNemar test on strict match, by itself and by Holm's correction for all rows of this table.",
    )


def form(results: Results) -> Table:
    """Accuracy beside what a change of form alone would do to it."""
    rows = []
    for arm in results.arms:
        m = arm.measured
        shares = [m.strict.value, m.flexible.value, m.answer_in_form, m.right_in_form, m.truncated]
        rows.append([arm.name, *(percent(share) for share in shares), amount(m.mean_tokens, 1), amount(m.n)])
    return Table(
        "Accuracy and form",
        [
            "Arm",
            "Strict %",
            "Flexible %",
            "Answer in form %",
            "Right if in form %",
            "Cut %",
            "Mean tokens",
            "n",
        ],
        rows,
        "Seeds pooled. Answer in form: an answer after “####”. Cut: at the token limit. If strict accuracy "
        "rises with the share of answers in form, while flexible accuracy and accuracy among answers in form "
        "do not, the arm learned to state answers rather than to find them.",
        share_columns=(1, 2, 3, 4, 5),
    )


def teachers(results: Results) -> Table:
    """The teacher's own accuracy by strategy, beside that of the students it taught."""
    rows = []
    for made in written_by_the_teacher(results):
        teacher, first = teacher_share(made), finite(made.get("answer_first"))
        answered = _answered(made)
        students = [arm for name in made.get("arms") or [] if (arm := results.arm(name))]
        for arm in students or [None]:
            rows.append(
                [
                    str(made.get("strategy", "")),
                    share_and_interval(teacher),
                    amount(answered),
                    percent(first / answered if first is not None and answered else None),
                    arm.name if arm else NOTHING,
                    share_and_interval(arm.measured.strict) if arm else NOTHING,
                ]
            )
    return Table(
        "Teacher beside student",
        ["Strategy", "Teacher %", "Teacher n", "Answer first %", "Arm", "Student %"],
        rows,
        "Strict accuracy. The teacher answered training problems, primed; the student test problems, "
        "unprimed: not one scale. A teacher that was told the answer is right more often for that alone. Answer "
        "first: completions that state an answer before any calculation, or without one, as a teacher does that "
        "repeats what it was told.",
        text_columns=(0, 4),
    )


def training(results: Results) -> Table:
    """What each trial was trained on, and how its loss went."""
    rows = []
    for trial in results.trials:
        if trial.train_steps is None and trial.train_rows is None:
            continue
        dropped = ", ".join(f"{count} {reason}" for reason, count in trial.dropped.items() if count)
        losses = f"{amount(trial.loss_first, 3)} → {amount(trial.loss_last, 3)}"
        rows.append(
            [
                trial.arm,
                str(trial.seed),
                amount(trial.train_rows),
                dropped or "0",
                amount(trial.train_steps),
                amount(trial.target_tokens),
                duration(trial.train_seconds),
                losses,
            ]
        )
    return Table(
        "Training",
        ["Arm", "Seed", "Rows", "Left out", "Steps", "Target tokens", "Time", "Loss"],
        rows,
        "Losses of arms with different targets or divergences are not on one scale.",
    )


def cost(results: Results) -> Table:
    """What the teacher's completions cost."""
    rows = []
    for made in results.run.get("completions") or []:
        tokens, seconds = finite(made.get("completion_tokens")), finite(made.get("seconds"))
        answered, cut = _answered(made), finite(made.get("truncated"))
        rows.append(
            [
                str(made.get("strategy", "")),
                str(made.get("teacher", "")),
                amount(made.get("rows")),
                amount(made.get("errors")),
                percent(cut / answered if cut is not None and answered else None),
                amount(tokens),
                amount(tokens / answered if tokens is not None and answered else None, 1),
                duration(seconds),
                amount(tokens / seconds if tokens is not None and seconds else None),
            ]
        )
    return Table(
        "Cost of the teacher",
        ["Strategy", "Teacher", "Rows", "Errors", "Cut %", "Tokens", "Tokens a row", "Time", "Tokens a second"],
        rows,
        "Completions are kept by content: a strategy that an earlier run asked costs nothing again.",
        text_columns=(0, 1),
    )


def stages(results: Results) -> Table:
    """Where the time went."""
    stages = results.run.get("stages") or {}
    return Table("Time by stage", ["Stage", "Time"], [[str(k), duration(finite(v))] for k, v in stages.items()])


def written_by_the_teacher(results: Results) -> list[Mapping[str, Any]]:
    """The sets of completions that the teacher wrote, without those that it scored only."""
    made = results.run.get("completions") or []
    return [each for each in made if each.get("sequence", "teacher") == "teacher"]


def teacher_share(made: Mapping[str, Any]) -> Share:
    """The teacher's own strict accuracy over the completions of one content key, errors left out."""
    answered, correct = _answered(made), made.get("correct")
    if not answered or correct is None:
        return Share()
    return Share(correct / answered, *wilson_interval(correct, answered))


def _answered(made: Mapping[str, Any]) -> int:
    return (made.get("rows") or 0) - (made.get("errors") or 0)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else "no reason was recorded"
