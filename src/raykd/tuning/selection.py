"""Select the trials of a sweep that answer the test problems, by their validation results."""

from collections.abc import Sequence

from raykd.config.sections import Sweep
from raykd.training.trial import TrialSpec, filter_parallel, has_adapter, last_validation_metric, rank_by_validation


def selected_trials(trials: Sequence[TrialSpec], sweep: Sweep | None) -> list[TrialSpec]:
    """Return the trials to test: those with an adapter, limited to each arm's best points by `sweep.test_top_n`.

    Args:
        trials: all trials.
        sweep: the section `sweep`; without it, or without `test_top_n`, every trial with an adapter is tested.
    """
    trained = filter_parallel(trials, has_adapter)
    if sweep is None or sweep.test_top_n is None:
        return trained
    by_arm: dict[str, list[TrialSpec]] = {}
    for trial in trained:
        by_arm.setdefault(trial.arm_name, []).append(trial)
    selected: set[str] = set()
    for arm_trials in by_arm.values():
        selected.update(_ranked_config_ids(arm_trials, sweep)[: sweep.test_top_n])
    return [trial for trial in trained if trial.config_id in selected]


def _ranked_config_ids(trials: Sequence[TrialSpec], sweep: Sweep) -> list[str]:
    metrics: dict[str, list[float]] = {}
    for trial in trials:
        if (metric := last_validation_metric(trial)) is not None:
            metrics.setdefault(trial.config_id, []).append(metric)
    return rank_by_validation(metrics, sweep.metric)
