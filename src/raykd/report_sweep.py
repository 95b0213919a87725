"""Report sweep: the report's tables of what a search found: each arm's best point, arms at equal points, all trials."""

from collections.abc import Mapping
from typing import Any

from raykd.config import UNTOUCHED
from raykd.job import COMPLETE, FAILED, STOPPED
from raykd.measured import Share
from raykd.report_text import (
    NOTHING,
    amount,
    duration,
    interval,
    p_value,
    percent,
    points,
    points_interval,
    share_and_interval,
)
from raykd.results import Results
from raykd.space import point_key
from raykd.statistics import wilson_interval
from raykd.table import Table
from raykd.trial import Trial


def best_points(results: Results) -> Table:
    """Where each arm was at its best by the validation problems, and of how many points that is the best."""
    rows = []
    for arm in results.arms:
        own = [trial for trial in results.trials if trial.arm == arm.name]
        if results.sweep is None or arm.name == UNTOUCHED:
            continue
        status = [trial.status for trial in own]
        rows.append(
            [
                arm.name,
                at(results, arm.trials[0].values) if COMPLETE in status else NOTHING,
                # Those that were stopped there are no part of what it was chosen by.
                _reached(results, [trial for trial in arm.trials if trial.status == COMPLETE]),
                amount(len({point_key(trial.values) for trial in own})),
                *(amount(status.count(each)) for each in (COMPLETE, STOPPED, FAILED)),
            ]
        )
    asked = sum(made.get("rows") or 0 for made in results.run.completions)
    return Table(
        "Best point of each arm",
        ["Arm", "Best at", _measure(results), "Points", "Complete", "Stopped early", "Failed"],
        rows,
        "By validation problems, in the mean over seeds; a trial that was stopped early is not the best. The best of "
        f"several looks better by validation than it is. The teacher was asked {amount(asked)} times for all "
        f"{amount(len(results.trials) - 1)} trials together: what it said is shared.",
        text_columns=(0, 1),
    )


def at_equal_points(results: Results) -> Table:
    """Every arm against its baseline at equal values of all that was searched."""
    rows = [
        [
            each.arm,
            each.baseline.arm + ("" if each.baseline.prime_alone else " †"),
            f"{points(each.difference)} ({points_interval(each)})",
            p_value(each.p),
            p_value(each.p_holm),
            amount(each.num_pairs),
            amount(each.num_problems),
        ]
        for each in (results.sweep.equal if results.sweep else [])
    ]
    return Table(
        "Differences at equal points",
        ["Arm", "Against", "Strict, points", "p", "p, corrected", "Pairs", "Problems"],
        rows,
        "Pairs are the same test problem with the same seed and equal values of all searched fields that bear on both "
        "arms, wherever both were trained to the end and asked. The interval is over problems, each with all "
        "its pairs, and so is p: sign-flip test of problems' means, or exact McNemar test where each has one pair.",
        text_columns=(0, 1),
    )


def all_trials(results: Results) -> Table:
    """Every trial of a sweep, the best of each arm first."""
    rows = []
    for arm in results.arms if results.sweep else []:
        own = [trial for trial in results.trials if trial.arm == arm.name and arm.name != UNTOUCHED]
        for trial in sorted(own, key=lambda trial: _order(results, trial)):
            measured = trial.validation
            rows.append(
                [
                    trial.arm,
                    str(trial.seed),
                    at(results, trial.values),
                    trial.status,
                    _reached(results, [trial]),
                    f"{measured['number']}/{results.sweep.validations}" if measured and results.sweep else NOTHING,
                    share_and_interval(trial.measured.strict),
                    amount(trial.train_steps),
                    duration(trial.train_seconds),
                ]
            )
    return Table(
        "All trials",
        ["Arm", "Seed", "At", "Status", _measure(results), "Measured", "Test, strict %", "Steps", "Time"],
        rows,
        text_columns=(0, 2, 3),
    )


def at(results: Results, values: Mapping[str, Any]) -> str:
    """A point, by the last word of each field's path where that is enough."""
    paths = results.sweep.paths if results.sweep else list(values)
    last = [path.rpartition(".")[2] for path in paths]
    named = {path: word if last.count(word) == 1 else path for path, word in zip(paths, last, strict=True)}
    shown = [
        f"{named[p]} {value:.3g}" if isinstance(value, float) else f"{named[p]} {value}" for p, value in values.items()
    ]
    return ", ".join(shown) or NOTHING


def validation_share(trial: Trial) -> Share:
    """The share of validation problems that a trial had right when it was last measured."""
    measured = trial.validation
    if not measured or "correct" not in measured:
        return Share()
    return Share(measured["accuracy"], *wilson_interval(measured["correct"], measured["n"]))


def _measure(results: Results) -> str:
    return "Validation loss" if results.sweep and results.sweep.metric == "loss" else "Validation %"


def _reached(results: Results, trials: list[Trial]) -> str:
    """What trials of one point reached, in the mean; with an interval over problems where that is accuracy."""
    measured = [trial.validation for trial in trials if trial.validation]
    if not measured or results.sweep is None:
        return NOTHING
    mean = sum(each[results.sweep.metric] for each in measured) / len(measured)
    if results.sweep.metric == "loss":
        return amount(mean, 3)
    n = measured[0]["n"]
    return f"{percent(mean)} ({interval(Share(mean, *wilson_interval(mean * n, n)))})"


def _order(results: Results, trial: Trial) -> tuple[bool, float, int]:
    reached = trial.validation[results.sweep.metric] if trial.validation and results.sweep else 0.0
    sign = 1 if results.sweep and results.sweep.metric == "loss" else -1
    return trial.status != COMPLETE, sign * reached, trial.seed
