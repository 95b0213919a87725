"""The Ray Tune searcher: known trials first, then configurations that Optuna proposes from earlier results."""

import json
import math
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raykd import identity
from raykd.config.experiment import Experiment
from raykd.config.search_space import Axis
from raykd.config.sections import Sweep
from raykd.errors import UserError
from raykd.storage import files, hashing
from raykd.storage.paths import ExperimentPaths
from raykd.storage.schemas import FAILED
from raykd.training.trial import TrialSpec, last_validation_metric, trial_status
from raykd.tuning import variants
from raykd.tuning.variants import Hparams, Variant

# Optuna draws so many points at random before it looks at what was reached; here not more than this share of all.
STARTUP, STARTUP_SHARE = 10, 1 / 3
METRIC = "reached"
# Points that do not go with an arm before the search is given up.
MAX_DRAWS = 100

MakeTrials = Callable[[str, Hparams], list[TrialSpec]]
"""From an arm's name and a point to its trials, one for each seed."""


@dataclass(frozen=True)
class PendingSearch:
    """Points of a sweep that will be chosen by what others reach."""

    make: MakeTrials
    corners: list[Variant]
    """What bounds them (`raykd.tuning.variants.boundary_configs`)."""
    num_trials: int
    """How many trials they will be, or fewer where a point is drawn twice."""


def known_points(experiment: Experiment, folder: Path) -> dict[str, list[Hparams]]:
    """Each arm's points: all of a random search; of Optuna's those that have been chosen so far.

    Args:
        experiment: the experiment.
        folder: its folder.
    """
    sweep = experiment.sweep
    if sweep is None:
        return {}
    if sweep.search == "random":
        return dict.fromkeys(experiment.arms, variants.random_points(sweep))
    return {name: _read_points(_points_file(sweep, folder, name))[: sweep.num_samples] for name in experiment.arms}


def _points_file(sweep: Sweep, folder: Path, arm: str) -> Path:
    """Where an arm's points are noted. With more of them it is the same search; any other change begins a new one."""
    return ExperimentPaths(folder).points / hashing.content_key(identity.search_settings(sweep)) / f"{arm}.json"


def _read_points(file: Path) -> list[Hparams]:
    return files.read_json(file)["points"] if file.exists() else []


class ArmSearch:
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

    def __init__(self, arm: str, sweep: Sweep, folder: Path, make: MakeTrials, pending: Container[str]) -> None:
        self.arm = arm
        self._sweep, self._make = sweep, make
        self._file = _points_file(sweep, folder, arm)
        self._points = _read_points(self._file)
        self._followed: dict[str, _PointTrials] = {}
        self._num_asked = 0
        known = [(point, make(arm, point)) for point in self._points]
        under_way = [(point, jobs) for point, jobs in known if any(job.trial_id in pending for job in jobs)]
        self._optuna = _optuna(sweep, len(self._points), [self._encoded(point) for point, _ in under_way])
        for point, jobs in known:
            followed = _PointTrials(
                reached=[value for job in jobs if (value := _final_metric(job, pending)) is not None]
            )
            if (point, jobs) not in under_way:
                self._followed[jobs[0].config_id] = followed
                self._optuna.add_evaluated_point(
                    self._encoded(point), followed.mean or 0.0, error=followed.mean is None
                )
        for _, jobs in under_way:
            # What Optuna was given to evaluate comes before all else.
            number, _ = self._ask()
            self._follow(number, [job for job in jobs if job.trial_id in pending])
            self._followed[jobs[0].config_id].reached = [
                value for job in jobs if (value := _final_metric(job, pending)) is not None
            ]

    @property
    def num_open(self) -> int:
        """Points that are still to be drawn."""
        return max(self._sweep.num_samples - len(self._points), 0)

    def draw(self) -> list[TrialSpec]:
        """The trials of the next point; none where the arm has been there."""
        refused = None
        for _ in range(MAX_DRAWS):
            number, point = self._ask()
            try:
                jobs = self._make(self.arm, point)
            except UserError as error:
                # Each value goes with the others' first ones, but not with these.
                self._optuna.on_trial_complete(number, error=True)
                refused = error
                continue
            self._points.append(point)
            files.write_json(self._file, {"points": self._points})
            return self._follow(number, jobs)
        raise UserError(f"sweep: {MAX_DRAWS} points in a row that no arm can be at, the last of them: {refused}")

    def tell(self, job: TrialSpec, value: float | None) -> None:
        """Tells what a trial reached by the validation problems; None where it failed."""
        followed = self._followed.get(job.config_id)
        if followed is None or job.trial_id not in followed.open:
            return
        followed.open.remove(job.trial_id)
        if value is not None and math.isfinite(value):
            followed.reached.append(value)
        if not followed.open:
            for number in followed.numbers:
                self._end(number, followed)

    def _ask(self) -> tuple[str, Hparams]:
        number = str(self._num_asked)
        self._num_asked += 1
        drawn = self._optuna.suggest(number)
        assert drawn, "Optuna always has a point"
        return number, {path: _decoded(self._sweep.space[path], value) for path, value in drawn.items()}

    def _follow(self, number: str, jobs: list[TrialSpec]) -> list[TrialSpec]:
        lesson = jobs[0].config_id
        if before := self._followed.get(lesson):
            # Drawn again: it is known already what it reaches, or will be.
            before.numbers.append(number)
            if not before.open:
                self._end(number, before)
            return []
        self._followed[lesson] = _PointTrials({job.trial_id for job in jobs}, [number])
        return jobs

    def _end(self, number: str, followed: "_PointTrials") -> None:
        mean = followed.mean
        self._optuna.on_trial_complete(number, None if mean is None else {METRIC: mean}, error=mean is None)

    def _encoded(self, point: Hparams) -> Hparams:
        return {path: _encoded(self._sweep.space[path], value) for path, value in point.items()}


@dataclass
class _PointTrials:
    """A point whose trials are under way, or were."""

    open: set[str] = field(default_factory=set)
    """Ids of its trials that are."""
    numbers: list[str] = field(default_factory=list)
    """What Optuna calls it: each time it was drawn."""
    reached: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        return sum(self.reached) / len(self.reached) if self.reached else None


def _optuna(sweep: Sweep, num_drawn: int, points: list[Hparams]) -> OptunaSearch:
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
    space = {path: variants.tune_domain(_categorical_axis(axis)) for path, axis in sweep.space.items()}
    return OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric=METRIC,
        mode=sweep.mode,
        sampler=sampler,
        points_to_evaluate=points or None,
    )


def _final_metric(job: TrialSpec, pending: Container[str]) -> float | None:
    value = None if job.trial_id in pending or trial_status(job) == FAILED else last_validation_metric(job)
    return value if value is not None and math.isfinite(value) else None


def _categorical_axis(axis: Axis) -> Axis:
    """Optuna's categories are strings: a list, or null, is none that it knows."""
    return Axis(choice=tuple(_encoded(axis, value) for value in axis.choice)) if axis.choice else axis


def _encoded(axis: Axis, value: Any) -> Any:
    return json.dumps(value) if axis.choice else value


def _decoded(axis: Axis, value: Any) -> Any:
    return json.loads(value) if axis.choice else value


class TrialSearcher(Searcher):
    """Hands trials to Ray Tune.

    Args:
        known: trials to begin with.
        jobs: trials by id, to which those of new points are added.
        room: how many trials there is room for at a time, as things are. It is told how many are not over, as far as
            that is known.
        studies: the searches of the arms whose points are chosen by what earlier ones reached.
    """

    def __init__(
        self,
        known: Sequence[TrialSpec],
        jobs: dict[str, TrialSpec],
        room: Callable[[float], int],
        studies: Sequence[ArmSearch] = (),
    ) -> None:
        super().__init__()
        self._jobs = jobs
        self._room = room
        self._queue = deque(known)
        self._studies = {study.arm: study for study in studies}
        self._under_way: dict[str, TrialSpec] = {}

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
        return {"trial_id": job.trial_id, "arm": job.arm_name, "seed": job.seed, **job.hparams}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the arm's study what a trial reached."""
        job = self._under_way.pop(trial_id)
        if job.arm_name in self._studies:
            self._studies[job.arm_name].tell(job, None if error else last_validation_metric(job))
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
