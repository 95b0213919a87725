"""Report tables: accuracy, differences, answer format and training, and the order of all tables of the report."""

from raykd.analysis.scores import Scores, passes
from raykd.config.experiment import BASE
from raykd.report.attention import changed_heads, changes, correctness
from raykd.report.cost import answered_rows, cost, processors, stages, teacher_generated, teacher_share
from raykd.report.results import Results
from raykd.report.sweep import all_trials, at_equal_points, best_points
from raykd.report.table import Table
from raykd.report.text import (
    NOTHING,
    amount,
    baseline_name,
    duration,
    mean_and_interval,
    p_value,
    percent,
    points_and_interval,
    share_and_interval,
)
from raykd.report.trials import TrialResult, finite


def tables(results: Results) -> list[Table]:
    """Return the tables that have rows, in the report's order."""
    shown = [result(results), differences(results)]
    if results.sweep:
        shown += [best_points(results), at_equal_points(results), all_trials(results)]
    shown += [form(results), samples(results), teachers(results), trials(results), training(results)]
    shown += [cost(results), processors(results), stages(results)]
    if results.attention:
        shown += [changes(results.attention), changed_heads(results.attention), correctness(results.attention)]
    return [table for table in shown if table.rows]


def result(results: Results) -> Table:
    """Return the accuracy of every arm, its seeds pooled."""
    rows = [
        _accuracy(
            arm.name,
            ", ".join(dict.fromkeys(str(trial.seed) for trial in arm.trials)),
            arm.scores,
            _status(arm.trials),
        )
        for arm in results.arms
    ]
    note = (
        f"Answers: {results.evaluation}. Accuracy is in percent with its 95 % Wilson confidence interval. Strict "
        "match scores the number after “####” and flexible extract the last number, both as lm-evaluation-harness "
        "does for gsm8k. Predictions with errors are excluded from n."
    )
    if results.arm(BASE):
        note += f" Arm “{BASE}” is the base student without an adapter."
    if results.other_predictions:
        note += f" Predictions with other evaluation settings are stored in: {', '.join(results.other_predictions)}."
    if results.sweep:
        note += " Each arm is shown at its best point of the sweep, selected on the validation problems."
    if any(arm.scores.n > arm.scores.num_problems for arm in results.arms):
        note += " Seeds and samples are pooled; the n of an interval is the number of problems."
    return Table("Results", ["Arm", "Seed", *_ACCURACY], rows, note, text_columns=(0, 6))


def trials(results: Results) -> Table:
    """Return every trial, failed ones too, with its accuracy; no rows where each arm has one trial."""
    has_seeds = any(len(arm.trials) > 1 for arm in results.arms)
    shown = _shown(results) if has_seeds else []
    rows = [_accuracy(trial.arm, str(trial.seed), trial.scores, _status([trial])) for trial in shown]
    return Table("Results by seed", ["Arm", "Seed", *_ACCURACY], rows, text_columns=(0, 6))


def _shown(results: Results) -> list[TrialResult]:
    """Return the trials of the arms; of a sweep those at the best points, because another table has all trials."""
    return [trial for arm in results.arms for trial in arm.trials]


_ACCURACY = ("Strict %", "Flexible %", "n", "Errors", "Status")


def _accuracy(arm: str, seed: str, scores: Scores, status: str) -> list[str]:
    accuracy = [share_and_interval(scores.strict), share_and_interval(scores.flexible)]
    return [arm, seed, *accuracy, amount(scores.n), amount(scores.errors), status]


def _status(trials: list[TrialResult]) -> str:
    failed = [trial for trial in trials if trial.status == "failed"]
    if not failed:
        return trials[0].status
    count = "" if len(trials) == 1 else f"{len(failed)} of {len(trials)} "
    return f"{count}failed: {_first_line(failed[0].error)}"


def differences(results: Results) -> Table:
    """Return the paired test of every arm against its baseline."""
    rows = []
    for strict, flexible in zip(results.strict, results.flexible, strict=True):
        rows.append(
            [
                strict.arm,
                baseline_name(strict),
                points_and_interval(strict),
                amount(strict.only_arm),
                amount(strict.only_baseline),
                p_value(strict.p),
                p_value(strict.p_holm),
                points_and_interval(flexible),
                amount(strict.num_problems),
            ]
        )
    return Table(
        "Differences",
        [
            "Arm",
            "Baseline",
            "Strict difference, points",
            "Only arm correct",
            "Only baseline correct",
            "p",
            "p (Holm)",
            "Flexible difference, points",
            "Problems",
        ],
        rows,
        "The baseline is the unprimed arm that matches in all other settings; † marks a baseline that differs in "
        "more than the prompt. Pairs have the same problem, seed and sample. Confidence intervals are 95 % and from "
        "a paired bootstrap over problems. p is on strict match: exact McNemar test, or a sign-flip test of problem "
        "means where a problem has several pairs. p (Holm) is corrected for all rows of this table. Variation "
        "between training seeds is included only as far as there are several seeds.",
        text_columns=(0, 1),
    )


def form(results: Results) -> Table:
    """Return accuracy with the statistics of answer format and length that may explain it."""
    rows = []
    for arm in results.arms:
        scores = arm.scores
        shares = [scores.strict, scores.flexible, scores.format_rate, scores.accuracy_given_format, scores.truncated]
        means = [mean_and_interval(scores.tokens), mean_and_interval(scores.repetition, 100)]
        rows.append([arm.name, *(share_and_interval(share) for share in shares), *means, amount(scores.n)])
    return Table(
        "Accuracy and answer format",
        [
            "Arm",
            "Strict %",
            "Flexible %",
            "Format rate %",
            "Accuracy given format %",
            "Truncated %",
            "Mean tokens",
            "Repeated 4-grams %",
            "n",
        ],
        rows,
        "Seeds are pooled; intervals are 95 % confidence intervals. The format rate is the share of answers with a "
        "number after “####”. Accuracy given format is strict accuracy among those answers. Truncated answers "
        "reached the token limit. Repeated 4-grams are the mean share of an answer's sequences of four words that "
        "occurred in it before. If the format rate rises and neither flexible accuracy nor accuracy given format "
        "does, the arm has learned the answer format rather than better reasoning.",
        share_columns=(1, 2, 3, 4, 5),
    )


def samples(results: Results) -> Table:
    """Return majority and pass@k accuracy, where problems have several samples."""
    rows = []
    for arm in results.arms:
        scores = arm.scores
        if scores.num_samples > 1:
            shares = [scores.strict, scores.majority_strict, *scores.pass_strict.values()]
            shares += [scores.flexible, scores.majority_flexible, *scores.pass_flexible.values()]
            rows.append([arm.name, *(share_and_interval(share) for share in shares)])
    num_samples = max((arm.scores.num_samples for arm in results.arms), default=1)
    columns = [f"maj@{num_samples}", *(f"pass@{k}" for k in passes(num_samples))]
    return Table(
        "Multiple samples per problem",
        ["Arm", "Strict %", *columns, "Flexible %", *columns],
        # A row with fewer samples than the others has fewer cells and is left out.
        [row for row in rows if len(row) == 2 * len(columns) + 3],
        f"Strict and flexible are means over all samples. maj@{num_samples}: the most frequent answer of a problem's "
        f"{num_samples} samples is correct. pass@k: at least one of k samples is correct, averaged over all subsets of "
        "k.",
    )


def teachers(results: Results) -> Table:
    """Return the teacher's accuracy by strategy, with that of the students distilled from it."""
    rows = []
    for completions in teacher_generated(results):
        answered, answer_first = answered_rows(completions), finite(completions.get("answer_first"))
        teacher_cells = [
            str(completions.get("strategy", "")),
            share_and_interval(teacher_share(completions)),
            amount(answered),
            percent(answer_first / answered if answer_first is not None and answered else None),
        ]
        students = [arm for name in completions.get("arms") or [] if (arm := results.arm(name))]
        for arm in students:
            rows.append([*teacher_cells, arm.name, share_and_interval(arm.scores.strict)])
        if not students:
            rows.append([*teacher_cells, NOTHING, NOTHING])
    return Table(
        "Teacher and student accuracy",
        ["Strategy", "Teacher %", "Teacher n", "Answer first %", "Arm", "Student %"],
        rows,
        "Strict accuracy; the n of an interval is the number of problems. The teacher answers training problems with "
        "its prompt and the student answers test problems without it, so the two are not directly comparable. A prompt "
        "that contains the answer raises the teacher's accuracy by itself. Answer first: completions that state an "
        "answer before any calculation or without one, as a teacher does that copies the answer from its prompt.",
        text_columns=(0, 4),
    )


def training(results: Results) -> Table:
    """Return the size of each trial's training data, its training time and its loss."""
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
        ["Arm", "Seed", "Rows", "Excluded rows", "Steps", "Target tokens", "Time", "Loss"],
        rows,
        "Losses of arms with different targets or divergences are not comparable. Loss is that of the first and "
        "last step.",
    )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else "no reason was recorded"
