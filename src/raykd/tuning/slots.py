"""Trial slots: how many trials fit the cluster at a time, and the autoscaler's request for more nodes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raykd.cluster import resources
from raykd.cluster.capacity import current_resources, num_placeable
from raykd.cluster.nodes import Bundle
from raykd.config.training import Train

REQUEST_INTERVAL_S = 60


class WorkerGroup(NamedTuple):
    """The workers of a trial, and the accelerator that they run on."""

    train: Train
    accelerator: resources.Accelerator


def num_trial_slots(groups: Sequence[WorkerGroup], reserved: Mapping[str, float], limit: int | None) -> int:
    """Return how many trials fit the nodes that the cluster has now.

    Args:
        groups: the worker groups of all trials; the slots hold the largest of them.
        reserved: resources that other processes hold, by Ray's names.
        limit: the most trials at a time; None for as many as fit.
    """
    free = {name: amount - reserved.get(name, 0) for name, amount in current_resources().items()}
    num_slots = min(resources.max_concurrent_trials(group.train, group.accelerator, free) for group in groups)
    return num_slots if limit is None else min(num_slots, limit)


class AutoscalerRequester:
    """Requests nodes for trials from the cluster's autoscaler.

    Ray's autoscaler adds no node at all if it cannot satisfy the whole request. The request is therefore limited to
    what the cluster may grow to. Where that is unknown, it asks for one trial more than fits now.

    Args:
        request: sends bundles to the autoscaler, in place of the previous request (`cluster.autoscaler.node_requests`).
        trial_bundles: the placement bundles of one trial.
        min_workers: the fewest workers, and so bundles, that a trial can run with.
        other_groups: placement groups that exist beside the trials, such as the teacher's.
        max_trials: the most trials at a time.
    """

    def __init__(
        self,
        request: Callable[[Sequence[Bundle]], None],
        *,
        trial_bundles: Sequence[Bundle],
        min_workers: int,
        other_groups: Sequence[Sequence[Bundle]] = (),
        max_trials: int,
    ) -> None:
        self._request = request
        self._other_bundles = [bundle for group in other_groups for bundle in group]
        self._max_trials = max_trials
        self._trial_bundles = list(trial_bundles)
        num_groups = num_placeable([*other_groups, *[trial_bundles] * max_trials])
        self._max_placeable = None if num_groups is None else num_groups - len(other_groups)
        if self._max_placeable is not None and self._max_placeable <= 0:
            self._trial_bundles = self._largest_placeable(other_groups, min_workers)
        self._last_num_trials = 0
        self._last_request_s = 0.0

    def update(self, num_slots: int, num_unfinished: float) -> None:
        """Send a request if it changed, or if the last one is older than `REQUEST_INTERVAL_S`.

        A cluster has one request: that of another experiment, and its withdrawal, replaces this one.

        Args:
            num_slots: how many trials fit now.
            num_unfinished: how many trials are queued or running; infinite while the search can add more.
        """
        possible = max(1, num_slots + 1 if self._max_placeable is None else self._max_placeable)
        num_trials = int(min(self._max_trials, num_unfinished, possible))
        if num_trials != self._last_num_trials or time.monotonic() > self._last_request_s + REQUEST_INTERVAL_S:
            self._request([*self._other_bundles, *self._trial_bundles * num_trials])
            self._last_num_trials, self._last_request_s = num_trials, time.monotonic()

    def _largest_placeable(self, other_groups: Sequence[Sequence[Bundle]], min_workers: int) -> list[Bundle]:
        """Return the bundles of the largest elastic trial that the cluster may hold; all of them if none fits."""
        for num_workers in range(len(self._trial_bundles) - 1, min_workers - 1, -1):
            bundles = self._trial_bundles[:num_workers]
            if (num_placeable([*other_groups, bundles]) or 0) > len(other_groups):
                return bundles
        return self._trial_bundles


@dataclass(frozen=True)
class TrialSlots:
    """The trial slots of a Tune run, which grow and shrink with the cluster."""

    groups: Sequence[WorkerGroup]
    reserved: Mapping[str, float]
    """Resources that the teacher holds beside the trials, by Ray's names."""
    limit: int | None
    """`max_concurrent_trials` of the experiment."""
    requester: AutoscalerRequester

    def update(self, num_unfinished: float) -> int:
        """Request nodes for the unfinished trials, and return how many trials fit now."""
        num_slots = num_trial_slots(self.groups, self.reserved, self.limit)
        self.requester.update(num_slots, num_unfinished)
        return num_slots
