"""Report sweep: the tables of a sweep: best points, comparisons at equal points, all trials."""

from collections.abc import Mapping
from typing import Any

from raykd.analysis.scores import Proportion
from raykd.analysis.statistics import wilson_interval
from raykd.config.experiment import BASE
from raykd.config.search_space import hparams_key
from raykd.report.results import Results
from raykd.report.table import Table
from raykd.report.text import NOTHING, amount, baseline_name, duration, p_value, points_and_interval, share_and_interval
from raykd.report.trials import TrialResult
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED


def best_points(results: Results) -> Table:
    """Return each arm's best point by validation, with how many points and trials it was selected from."""
    rows = []
    for arm in results.arms:
        if results.sweep is None or arm.name == BASE:
            continue
        trials = [trial for trial in results.trials if trial.arm == arm.name]
        status = [trial.status for trial in trials]
        # Trials that were stopped early were not part of the selection.
        complete = [trial for trial in arm.trials if trial.status == COMPLETE]
        rows.append(
            [
                arm.name,
                point_text(results, arm.trials[0].hparams) if COMPLETE in status else NOTHING,
                _mean_metric(results, complete),
                amount(len({hparams_key(trial.hparams) for trial in trials})),
                amount(status.count(COMPLETE)),
                amount(status.count(STOPPED)),
                amount(status.count(FAILED)),
            ]
        )
    num_rows = sum(completions.get("rows") or 0 for completions in results.run.completions)
    return Table(
        "Best point of each arm",
        ["Arm", "Hyperparameters", _metric_column(results), "Points", "Complete", "Stopped early", "Failed"],
        rows,
        "Selected by the mean validation metric over seeds, among trials that were not stopped early. The validation "
        "metric of the selected point is biased, because it is the best of several. The teacher's completions "
        f"({amount(num_rows)} rows) are shared by all {amount(len(results.trials) - 1)} trials.",
        text_columns=(0, 1),
    )


def at_equal_points(results: Results) -> Table:
    """Return the paired test of every arm against its baseline at equal values of the searched fields."""
    rows = [
        [
            comparison.arm,
            baseline_name(comparison),
            points_and_interval(comparison),
            p_value(comparison.p),
            p_value(comparison.p_holm),
            amount(comparison.num_pairs),
            amount(comparison.num_problems),
        ]
        for comparison in (results.sweep.comparisons if results.sweep else [])
    ]
    return Table(
        "Differences at equal points",
        ["Arm", "Baseline", "Strict difference, points", "p", "p (Holm)", "Pairs", "Problems"],
        rows,
        "Pairs have the same test problem, seed and values of all searched fields that affect both arms. Only trials "
        "that completed and were evaluated are paired. The interval is over problems, each with all its pairs. p is "
        "from a sign-flip test of problem means, or an exact McNemar test where each problem has one pair.",
        text_columns=(0, 1),
    )


def all_trials(results: Results) -> Table:
    """Return every trial of a sweep, the best of each arm first."""
    rows = []
    for arm in results.arms:
        if results.sweep is None or arm.name == BASE:
            continue
        trials = [trial for trial in results.trials if trial.arm == arm.name]
        for trial in sorted(trials, key=lambda trial: _order(results, trial)):
            validation = trial.validation
            rows.append(
                [
                    trial.arm,
                    str(trial.seed),
                    point_text(results, trial.hparams),
                    trial.status,
                    _mean_metric(results, [trial]),
                    f"{validation['number']}/{results.sweep.num_validations}" if validation else NOTHING,
                    share_and_interval(trial.scores.strict),
                    amount(trial.train_steps),
                    duration(trial.train_seconds),
                ]
            )
    return Table(
        "All trials",
        [
            "Arm",
            "Seed",
            "Hyperparameters",
            "Status",
            _metric_column(results),
            "Validations",
            "Test, strict %",
            "Steps",
            "Time",
        ],
        rows,
        text_columns=(0, 2, 3),
    )


def point_text(results: Results, values: Mapping[str, Any]) -> str:
    """Return a point as text, each field by the last part of its path where that is unambiguous."""
    paths = results.sweep.paths if results.sweep else list(values)
    last_parts = [path.rpartition(".")[2] for path in paths]
    texts = []
    for path, value in values.items():
        last = path.rpartition(".")[2]
        name = last if last_parts.count(last) == 1 else path
        texts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts) or NOTHING


def validation_share(trial: TrialResult) -> Proportion:
    """Return a trial's accuracy at its last validation."""
    validation = trial.validation
    if not validation or "correct" not in validation:
        return Proportion()
    return Proportion(validation["accuracy"], *wilson_interval(validation["correct"], validation["n"]))


def _metric_column(results: Results) -> str:
    return "Validation loss" if results.sweep and results.sweep.metric == "loss" else "Validation %"


def _mean_metric(results: Results, trials: list[TrialResult]) -> str:
    """Return the mean validation metric of the trials of a point; accuracy with its interval over problems."""
    validations = [trial.validation for trial in trials if trial.validation]
    if not validations or results.sweep is None:
        return NOTHING
    mean = sum(validation[results.sweep.metric] for validation in validations) / len(validations)
    if results.sweep.metric == "loss":
        return amount(mean, 3)
    n = validations[0]["n"]
    return share_and_interval(Proportion(mean, *wilson_interval(mean * n, n)))


def _order(results: Results, trial: TrialResult) -> tuple[bool, float, int]:
    metric = trial.validation[results.sweep.metric] if trial.validation and results.sweep else 0.0
    sign = 1 if results.sweep and results.sweep.metric == "loss" else -1
    return trial.status != COMPLETE, sign * metric, trial.seed
