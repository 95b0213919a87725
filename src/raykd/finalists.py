"""Finalists: which trials of a sweep are asked the test problems, chosen by the validation problems."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raykd.job import Job, is_complete, reached, those
from raykd.sections import Sweep


def of(jobs: Sequence[Job], sweep: Sweep | None) -> list[Job]:
    """The trials that answer the test problems: all that have an adapter, or those at each arm's best points.

    Args:
        jobs: all trials.
        sweep: how many points of an arm go so far.
    """
    complete = those(jobs, is_complete)
    if sweep is None or sweep.finalists is None:
        return complete
    by_arm: dict[str, list[Job]] = {}
    for job in complete:
        by_arm.setdefault(job.arm_name, []).append(job)
    chosen = {lesson for own in by_arm.values() for lesson in _best_first(own, sweep)[: sweep.finalists]}
    return [job for job in complete if job.lesson in chosen]


def _best_first(jobs: Sequence[Job], sweep: Sweep) -> list[str]:
    found: dict[str, list[float]] = {}
    for each in jobs:
        if (value := reached(each)) is not None:
            found.setdefault(each.lesson, []).append(value)
    return ranked(found, sweep.metric)


def ranked(found: Mapping[str, Iterable[float]], metric: str) -> list[str]:
    """Points by what their seeds reached in the mean, the best first; those of more seeds before those of fewer.

    A point that lost a seed on the way was stopped there for being worse.

    Args:
        found: what each seed reached when it was last measured.
        metric: `accuracy` or `loss`.
    """
    sign = -1 if metric == "accuracy" else 1

    def key(point: str) -> tuple[Any, ...]:
        values = list(found[point])
        mean = sum(values) / len(values)
        return -len(values), math.inf if math.isnan(mean) else sign * mean, point

    return sorted(found, key=key)
