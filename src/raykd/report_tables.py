"""Report tables: the report's tables as text cells, the same for Markdown, HTML and the terminal."""

from raykd.measured import Measured, passes
from raykd.report_attention import being_right, changes, clear_heads
from raykd.report_cost import answered_rows, cost, processors, stages, teacher_share, written_by_the_teacher
from raykd.report_sweep import all_trials, at_equal_points, best_points
from raykd.report_text import (
    NOTHING,
    amount,
    duration,
    mean_and_interval,
    p_value,
    percent,
    points,
    points_interval,
    share_and_interval,
)
from raykd.results import Results
from raykd.table import Table
from raykd.trial import Trial, finite


def tables(results: Results) -> list[Table]:
    """All tables that have rows, in the report's order."""
    of_sweep = (best_points, at_equal_points, all_trials) if results.sweep else ()
    makers = (result, differences, *of_sweep, form, samples, teachers, trials, training, cost, processors, stages)
    found = [make(results) for make in makers]
    if results.attention:
        found += [make(results.attention) for make in (changes, clear_heads, being_right)]
    return [table for table in found if table.rows]


def result(results: Results) -> Table:
    """Every arm with its accuracy, its seeds pooled."""
    rows = [
        _accuracy(
            arm.name,
            ", ".join(dict.fromkeys(str(trial.seed) for trial in arm.trials)),
            arm.measured,
            _status(arm.trials),
        )
        for arm in results.arms
    ]
    note = (
        f"Students {results.asked}. Accuracy in percent with its 95 % Wilson interval. Strict: the number after "
        "“####”. Flexible: the last number. Both as lm-evaluation-harness scores gsm8k. Problems that got no "
        "completion (errors) are not in n."
    )
    if results.also_asked:
        note += f" Their answers in other ways are kept: {', '.join(results.also_asked)}."
    if results.sweep:
        note += " Each arm is at its best point of the sweep, chosen by validation problems."
    if any(arm.measured.n > arm.measured.num_problems for arm in results.arms):
        note += " Seeds are pooled; an interval's n is the number of problems, which seeds only repeat."
    return Table("Results", ["Arm", "Seed", *_ACCURACY], rows, note, text_columns=(0, 6))


def trials(results: Results) -> Table:
    """Every trial, failed ones too, with its accuracy, where arms have several."""
    rows = [
        _accuracy(trial.arm, str(trial.seed), trial.measured, _status([trial]))
        for trial in _shown(results)
        if is_repeated(results)
    ]
    return Table("Seed by seed", ["Arm", "Seed", *_ACCURACY], rows, text_columns=(0, 6))


def _shown(results: Results) -> list[Trial]:
    """The trials of the arms as they are shown: of a sweep those at the best points, for all have their own table."""
    return [trial for arm in results.arms for trial in arm.trials]


def is_repeated(results: Results) -> bool:
    """Whether an arm has several seeds."""
    return any(len(arm.trials) > 1 for arm in results.arms)


_ACCURACY = ("Strict %", "Flexible %", "n", "Errors", "Status")


def _accuracy(arm: str, seed: str, measured: Measured, status: str) -> list[str]:
    scores = [share_and_interval(measured.strict), share_and_interval(measured.flexible)]
    return [arm, seed, *scores, amount(measured.n), amount(measured.errors), status]


def _status(trials: list[Trial]) -> str:
    failed = [trial for trial in trials if trial.status == "failed"]
    if not failed:
        return trials[0].status
    of = "" if len(trials) == 1 else f"{len(failed)} of {len(trials)} "
    return f"{of}failed: {_first_line(failed[0].error)}"


_MORE = " †"


def differences(results: Results) -> Table:
    """Every arm against its baseline, by paired tests."""
    rows = []
    for strict, flexible in zip(results.strict, results.flexible, strict=True):
        rows.append(
            [
                strict.arm,
                strict.baseline.arm + ("" if strict.baseline.prime_alone else _MORE),
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
        "Differences",
        [
            "Arm",
            "Against",
            "Strict, points",
            "Only arm right",
            "Only other right",
            "p",
            "p, corrected",
            "Flexible, points",
            "Problems",
        ],
        rows,
        f"Against: the arm that differs from it in the prime alone, and has none;{_MORE} where there is none, one that "
        "differs in more. "
        "Pairs are the same problem with the same seed and sample. Intervals: 95 %, paired bootstrap over problems. p: "
        "on strict match, exact McNemar test, or where a problem has several pairs the sign-flip test of problems' "
        "means; by itself and by Holm's correction for all rows of this table. What training with another seed would "
        "change is in neither but as far as there are several.",
        text_columns=(0, 1),
    )


def form(results: Results) -> Table:
    """Accuracy beside what a change of form alone would do to it."""
    rows = []
    for arm in results.arms:
        m = arm.measured
        shares = [m.strict, m.flexible, m.answer_in_form, m.right_in_form, m.truncated]
        means = [mean_and_interval(m.tokens), mean_and_interval(m.repetition, 100)]
        rows.append([arm.name, *(share_and_interval(share) for share in shares), *means, amount(m.n)])
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
            "Repeated %",
            "n",
        ],
        rows,
        "Seeds pooled; 95 % intervals. Answer in form: an answer after “####”. Cut: at the token limit. Repeated: of "
        "an answer's runs of four words those that occurred in it before, in the mean. If strict accuracy "
        "rises with the share of answers in form, while flexible accuracy and accuracy among answers in form "
        "do not, the arm learned to state answers rather than to find them.",
        share_columns=(1, 2, 3, 4, 5),
    )


def samples(results: Results) -> Table:
    """What several answers to each problem are worth, where they were asked for."""
    rows = []
    for arm in results.arms:
        m = arm.measured
        if m.samples > 1:
            shares = [m.strict, m.majority_strict, *m.pass_strict.values()]
            shares += [m.flexible, m.majority_flexible, *m.pass_flexible.values()]
            rows.append([arm.name, *(share_and_interval(each) for each in shares)])
    most = max((arm.measured.samples for arm in results.arms), default=1)
    scores = [f"maj@{most}", *(f"pass@{k}" for k in passes(most))]
    return Table(
        "Several answers to each problem",
        ["Arm", "Strict %", *scores, "Flexible %", *scores],
        [row for row in rows if len(row) == 2 * len(scores) + 3],
        f"Strict and flexible: the mean over all answers. maj@{most}: the answer that most of a problem's {most} give "
        "is right. pass@k: one of k is right, in the mean over all choices of k.",
    )


def teachers(results: Results) -> Table:
    """The teacher's own accuracy by strategy, beside that of the students it taught."""
    rows = []
    for made in written_by_the_teacher(results):
        teacher, first = teacher_share(made), finite(made.get("answer_first"))
        answered = answered_rows(made)
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
        "Strict accuracy; an interval's n is the number of problems. The teacher answered training problems, primed; "
        "the student test problems, unprimed: not one scale. A teacher that was told the answer is right more often "
        "for that alone. Answer "
        "first: completions that state an answer before any calculation, or without one, as a teacher does that "
        "repeats what it was told.",
        text_columns=(0, 4),
    )


def training(results: Results) -> Table:
    """What each trial was trained on, and how its loss went."""
    rows = []
    for trial in _shown(results):
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


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else "no reason was recorded"
