"""Study: one arm's search by Optuna, whose next point depends on what earlier ones reached."""

import json
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from raykd import identity, storage, variants
from raykd.config import Experiment
from raykd.faults import UserError
from raykd.job import Job, outcome, reached
from raykd.records import FAILED
from raykd.sections import Sweep
from raykd.space import Axis
from raykd.variants import Point, Variant

# Optuna draws so many points at random before it looks at what was reached; here not more than this share of all.
STARTUP, STARTUP_SHARE = 10, 1 / 3
REACHED = "reached"
# Points that do not go with an arm before the search is given up.
ATTEMPTS = 100

Make = Callable[[str, Point], list[Job]]
"""From an arm's name and a point to its trials, one for each seed."""


@dataclass(frozen=True)
class Undrawn:
    """Points of a sweep that will be chosen by what others reach."""

    make: Make
    corners: list[Variant]
    """What bounds them (`raykd.variants.corners`)."""
    num_trials: int
    """How many trials they will be, or fewer where a point is drawn twice."""


def drawn(experiment: Experiment, folder: Path) -> dict[str, list[Point]]:
    """Each arm's points: all of a random search; of Optuna's those that have been chosen so far.

    Args:
        experiment: the experiment.
        folder: its folder.
    """
    sweep = experiment.sweep
    if sweep is None:
        return {}
    if sweep.search == "random":
        return dict.fromkeys(experiment.arms, variants.points(sweep))
    return {name: _read(_file(sweep, folder, name))[: sweep.num_samples] for name in experiment.arms}


def _file(sweep: Sweep, folder: Path, arm: str) -> Path:
    """Where an arm's points are noted. With more of them it is the same search; any other change begins a new one."""
    return folder / "points" / storage.content_key(identity.search(sweep)) / f"{arm}.json"


def _read(file: Path) -> list[Point]:
    return storage.read_json(file)["points"] if file.exists() else []


class Study:
    """An arm's search by the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), as Ray Tune wraps it.

    A point is drawn once for all seeds, and told the mean of what they reached. It is noted before it is trained, so
    that the search goes on after whatever ended it.

    Args:
        arm: the arm's name.
        sweep: what is searched.
        folder: the experiment's folder.
        make: the trials of a point.
        pending: ids of the trials that have not come to their end.
    """

    def __init__(self, arm: str, sweep: Sweep, folder: Path, make: Make, pending: Container[str]) -> None:
        self.arm = arm
        self._sweep, self._make = sweep, make
        self._file = _file(sweep, folder, arm)
        self._points = _read(self._file)
        self._followed: dict[str, _Followed] = {}
        self._num_asked = 0
        known = [(point, make(arm, point)) for point in self._points]
        under_way = [(point, jobs) for point, jobs in known if any(job.trial_id in pending for job in jobs)]
        self._optuna = _optuna(sweep, len(self._points), [self._encoded(point) for point, _ in under_way])
        for point, jobs in known:
            followed = _Followed(reached=[value for job in jobs if (value := _final(job, pending)) is not None])
            if (point, jobs) not in under_way:
                self._followed[jobs[0].lesson] = followed
                self._optuna.add_evaluated_point(
                    self._encoded(point), followed.mean or 0.0, error=followed.mean is None
                )
        for _, jobs in under_way:
            # What Optuna was given to evaluate comes before all else.
            number, _ = self._ask()
            self._follow(number, [job for job in jobs if job.trial_id in pending])
            self._followed[jobs[0].lesson].reached = [
                value for job in jobs if (value := _final(job, pending)) is not None
            ]

    @property
    def num_open(self) -> int:
        """Points that are still to be drawn."""
        return max(self._sweep.num_samples - len(self._points), 0)

    def draw(self) -> list[Job]:
        """The trials of the next point; none where the arm has been there."""
        refused = None
        for _ in range(ATTEMPTS):
            number, point = self._ask()
            try:
                jobs = self._make(self.arm, point)
            except UserError as error:
                # Each value goes with the others' first ones, but not with these.
                self._optuna.on_trial_complete(number, error=True)
                refused = error
                continue
            self._points.append(point)
            storage.write_json(self._file, {"points": self._points})
            return self._follow(number, jobs)
        raise UserError(f"sweep: {ATTEMPTS} points in a row that no arm can be at, the last of them: {refused}")

    def tell(self, job: Job, value: float | None) -> None:
        """Tells what a trial reached by the validation problems; None where it failed."""
        followed = self._followed.get(job.lesson)
        if followed is None or job.trial_id not in followed.open:
            return
        followed.open.remove(job.trial_id)
        if value is not None and math.isfinite(value):
            followed.reached.append(value)
        if not followed.open:
            for number in followed.numbers:
                self._end(number, followed)

    def _ask(self) -> tuple[str, Point]:
        number = str(self._num_asked)
        self._num_asked += 1
        drawn = self._optuna.suggest(number)
        assert drawn, "Optuna always has a point"
        return number, {path: _decoded(self._sweep.space[path], value) for path, value in drawn.items()}

    def _follow(self, number: str, jobs: list[Job]) -> list[Job]:
        lesson = jobs[0].lesson
        if before := self._followed.get(lesson):
            # Drawn again: it is known already what it reaches, or will be.
            before.numbers.append(number)
            if not before.open:
                self._end(number, before)
            return []
        self._followed[lesson] = _Followed({job.trial_id for job in jobs}, [number])
        return jobs

    def _end(self, number: str, followed: "_Followed") -> None:
        mean = followed.mean
        self._optuna.on_trial_complete(number, None if mean is None else {REACHED: mean}, error=mean is None)

    def _encoded(self, point: Point) -> Point:
        return {path: _encoded(self._sweep.space[path], value) for path, value in point.items()}


@dataclass
class _Followed:
    """A point whose trials are under way, or were."""

    open: set[str] = field(default_factory=set)
    """Ids of its trials that are."""
    numbers: list[str] = field(default_factory=list)
    """What Optuna calls it: each time it was drawn."""
    reached: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        return sum(self.reached) / len(self.reached) if self.reached else None


def _optuna(sweep: Sweep, num_drawn: int, points: list[Point]) -> OptunaSearch:
    """Optuna, as Ray Tune wraps it, with points that it gives first."""
    # What it has to say of each point is in the result table.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        # The same numbers again would be the same points again.
        seed=sweep.seed + num_drawn,
        n_startup_trials=min(STARTUP, math.ceil(STARTUP_SHARE * sweep.num_samples)),
        # Points that are under way are kept away from.
        constant_liar=True,
    )
    space = {path: variants.domain(_told(axis)) for path, axis in sweep.space.items()}
    return OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric=REACHED,
        mode=sweep.mode,
        sampler=sampler,
        points_to_evaluate=points or None,
    )


def _final(job: Job, pending: Container[str]) -> float | None:
    value = None if job.trial_id in pending or outcome(job) == FAILED else reached(job)
    return value if value is not None and math.isfinite(value) else None


def _told(axis: Axis) -> Axis:
    """Optuna's categories are strings: a list, or null, is none that it knows."""
    return Axis(choice=tuple(_encoded(axis, value) for value in axis.choice)) if axis.choice else axis


def _encoded(axis: Axis, value: Any) -> Any:
    return json.dumps(value) if axis.choice else value


def _decoded(axis: Axis, value: Any) -> Any:
    return json.loads(value) if axis.choice else value
