"""Finalists: which trials of a sweep are asked the test problems, chosen by the validation problems."""

from collections.abc import Sequence

from raykd.config.sections import Sweep
from raykd.training.trial import TrialSpec, filter_parallel, has_adapter, last_validation_metric, rank_by_validation


def selected_trials(jobs: Sequence[TrialSpec], sweep: Sweep | None) -> list[TrialSpec]:
    """The trials that answer the test problems: all that have an adapter, or those at each arm's best points.

    Args:
        jobs: all trials.
        sweep: how many points of an arm go so far.
    """
    complete = filter_parallel(jobs, has_adapter)
    if sweep is None or sweep.test_top_n is None:
        return complete
    by_arm: dict[str, list[TrialSpec]] = {}
    for job in complete:
        by_arm.setdefault(job.arm_name, []).append(job)
    chosen = {lesson for own in by_arm.values() for lesson in _by_score(own, sweep)[: sweep.test_top_n]}
    return [job for job in complete if job.config_id in chosen]


def _by_score(jobs: Sequence[TrialSpec], sweep: Sweep) -> list[str]:
    found: dict[str, list[float]] = {}
    for each in jobs:
        if (value := last_validation_metric(each)) is not None:
            found.setdefault(each.config_id, []).append(value)
    return rank_by_validation(found, sweep.metric)
