"""Search: which trial of a sweep is next: first those that are known, then points that depend on what they reached."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from raykd.job import Job, reached
from raykd.study import Study


class Search(Searcher):
    """Hands trials to Ray Tune.

    Args:
        known: trials to begin with.
        jobs: trials by id, to which those of new points are added.
        room: how many trials there is room for at a time, as things are. It is told how many are not over, as far as
            that is known.
        studies: the searches of the arms whose points are chosen by what earlier ones reached.
    """

    def __init__(
        self, known: Sequence[Job], jobs: dict[str, Job], room: Callable[[float], int], studies: Sequence[Study] = ()
    ) -> None:
        super().__init__()
        self._jobs = jobs
        self._room = room
        self._queue = deque(known)
        self._studies = {study.arm: study for study in studies}
        self._under_way: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial, as what Tune calls its configuration; None for not yet, or `Searcher.FINISHED`."""
        # First of all: where nodes were lost there may be no room any more, for which nothing needs to wait.
        if not self._queue and not self._may_draw():
            return Searcher.FINISHED
        if len(self._under_way) >= self._room(self._num_left()):
            return None
        while not self._queue:
            # In turns, so that the arms get on alike.
            study = max(self._studies.values(), key=lambda each: each.num_open)
            if not study.num_open:
                return Searcher.FINISHED
            for job in study.draw():
                self._jobs[job.trial_id] = job
                self._queue.append(job)
        job = self._under_way[trial_id] = self._queue.popleft()
        return {"trial_id": job.trial_id, "arm": job.arm_name, "seed": job.seed, **job.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the arm's study what a trial reached."""
        job = self._under_way.pop(trial_id)
        if job.arm_name in self._studies:
            self._studies[job.arm_name].tell(job, None if error else reached(job))
        if left := self._num_left():
            # What is asked of the autoscaler falls with it, when there is nothing more to hand on, too.
            self._room(left)

    def _may_draw(self) -> bool:
        return any(study.num_open for study in self._studies.values())

    def _num_left(self) -> float:
        return math.inf if self._may_draw() else len(self._queue) + len(self._under_way)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the points, and what the trials came to, are in the experiment's folder."""
