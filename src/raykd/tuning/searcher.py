"""The Ray Tune searcher: known trials first, then configurations that Optuna proposes from earlier results."""

import json
import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
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
from raykd.tuning.trials import TrialRegistry
from raykd.tuning.variants import Hparams, Variant

# Optuna draws its first points at random: `STARTUP` of them, but at most this share of all points.
STARTUP, STARTUP_SHARE = 10, 1 / 3
METRIC = "objective"
# Consecutive points that are invalid for an arm, after which the search fails.
MAX_DRAWS = 100

MakeTrials = Callable[[str, Hparams], list[TrialSpec]]
"""Returns the trials of an arm, by name, at a point: one for each seed."""


@dataclass(frozen=True)
class PendingSearch:
    """The points of a sweep that depend on the results of earlier ones."""

    make_trials: MakeTrials
    boundary_configs: list[Variant]
    """The bounds of the search space (`raykd.tuning.variants.boundary_configs`)."""
    num_trials: int
    """The number of trials to come; fewer if Optuna draws a point twice."""


def known_points(experiment: Experiment, folder: Path) -> dict[str, list[Hparams]]:
    """Return each arm's points: all points of a random search, the points so far of a search by Optuna.

    Args:
        experiment: the experiment.
        folder: the experiment's folder.
    """
    sweep = experiment.sweep
    if sweep is None:
        return {}
    if sweep.search == "random":
        return dict.fromkeys(experiment.arms, variants.random_points(sweep))
    return {name: _read_points(_points_file(sweep, folder, name))[: sweep.num_samples] for name in experiment.arms}


def _points_file(sweep: Sweep, folder: Path, arm: str) -> Path:
    """Return the file of an arm's points. Only `num_samples` may change in the same search."""
    return ExperimentPaths(folder).points_file(hashing.content_key(identity.search_settings(sweep)), arm)


def _read_points(file: Path) -> list[Hparams]:
    return files.read_json(file)["points"] if file.exists() else []


class ArmSearch:
    """The search of one arm by the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) in Optuna.

    Each point is drawn once for all seeds, and Optuna receives the mean of their metrics. A point is written to a file
    before its trials start, so that an interrupted search resumes.

    Args:
        arm: the arm's name.
        sweep: the section `sweep`.
        folder: the experiment's folder.
        make_trials: returns the trials of a point.
        pending: ids of the trials that are not finished.
    """

    def __init__(self, arm: str, sweep: Sweep, folder: Path, make_trials: MakeTrials, pending: Container[str]) -> None:
        self.arm = arm
        self._sweep, self._make_trials = sweep, make_trials
        self._file = _points_file(sweep, folder, arm)
        self._points = _read_points(self._file)
        self._point_trials: dict[str, _PointTrials] = {}
        """By config id."""
        self._num_drawn = 0
        finished: list[tuple[Hparams, list[TrialSpec]]] = []
        running: list[tuple[Hparams, list[TrialSpec]]] = []
        for point in self._points:
            trials = make_trials(arm, point)
            is_running = any(trial.trial_id in pending for trial in trials)
            (running if is_running else finished).append((point, trials))
        self._optuna = _optuna_search(sweep, len(self._points), [self._encoded(point) for point, _ in running])
        for point, trials in finished:
            self._add_finished(point, trials, pending)
        for _, trials in running:
            self._resume(trials, pending)

    def _add_finished(self, point: Hparams, trials: list[TrialSpec], pending: Container[str]) -> None:
        """Give Optuna the result of a point from an earlier run."""
        point_trials = _PointTrials(metrics=_final_metrics(trials, pending))
        self._point_trials[trials[0].config_id] = point_trials
        mean = point_trials.mean
        self._optuna.add_evaluated_point(self._encoded(point), mean or 0.0, error=mean is None)

    def _resume(self, trials: list[TrialSpec], pending: Container[str]) -> None:
        """Draw the next point that was running when an earlier run ended."""
        # Optuna draws its `points_to_evaluate` before any other point, in their order.
        optuna_id, _ = self._draw_point()
        self._start_point(optuna_id, [trial for trial in trials if trial.trial_id in pending])
        self._point_trials[trials[0].config_id].metrics = _final_metrics(trials, pending)

    @property
    def num_open(self) -> int:
        """The number of points that remain to be drawn."""
        return max(self._sweep.num_samples - len(self._points), 0)

    def draw(self) -> list[TrialSpec]:
        """Draw a point and return its new trials: none if the arm already had the same point.

        Raises:
            UserError: if no valid point was found in `MAX_DRAWS` draws.
        """
        last_error: UserError | None = None
        for _ in range(MAX_DRAWS):
            optuna_id, point = self._draw_point()
            try:
                trials = self._make_trials(self.arm, point)
            except UserError as error:
                # Each value was checked with the first values of the other fields, but not with these.
                self._optuna.on_trial_complete(optuna_id, error=True)
                last_error = error
                continue
            self._points.append(point)
            files.write_json(self._file, {"points": self._points})
            return self._start_point(optuna_id, trials)
        raise UserError(
            f"sweep.space: arm {self.arm!r}: no valid configuration in {MAX_DRAWS} consecutive draws; remove values "
            f"that conflict; last error: {last_error}"
        )

    def record(self, trial: TrialSpec, metric: float | None) -> None:
        """Record the final metric of a trial; after the last seed Optuna receives the mean.

        Args:
            trial: the trial that ended.
            metric: its last validation metric; None if it failed.
        """
        point_trials = self._point_trials.get(trial.config_id)
        if point_trials is None or trial.trial_id not in point_trials.running:
            return
        point_trials.running.remove(trial.trial_id)
        if metric is not None:
            point_trials.metrics.append(metric)
        if not point_trials.running:
            for optuna_id in point_trials.optuna_ids:
                self._complete_point(optuna_id, point_trials)

    def _draw_point(self) -> tuple[str, Hparams]:
        optuna_id = str(self._num_drawn)
        self._num_drawn += 1
        encoded = self._optuna.suggest(optuna_id)
        assert encoded, "Optuna has no limit of points"
        return optuna_id, {path: _decode(self._sweep.space[path], value) for path, value in encoded.items()}

    def _start_point(self, optuna_id: str, trials: list[TrialSpec]) -> list[TrialSpec]:
        config_id = trials[0].config_id
        if earlier := self._point_trials.get(config_id):
            # A repeated point has the result of the first one.
            earlier.optuna_ids.append(optuna_id)
            if not earlier.running:
                self._complete_point(optuna_id, earlier)
            return []
        self._point_trials[config_id] = _PointTrials({trial.trial_id for trial in trials}, [optuna_id])
        return trials

    def _complete_point(self, optuna_id: str, point_trials: "_PointTrials") -> None:
        mean = point_trials.mean
        if mean is None:
            self._optuna.on_trial_complete(optuna_id, None, error=True)
        else:
            self._optuna.on_trial_complete(optuna_id, {METRIC: mean})

    def _encoded(self, point: Hparams) -> Hparams:
        return {path: _encode(self._sweep.space[path], value) for path, value in point.items()}


@dataclass
class _PointTrials:
    """The trials of one point of an arm."""

    running: set[str] = field(default_factory=set)
    """Ids of the trials that are not finished."""
    optuna_ids: list[str] = field(default_factory=list)
    """Optuna's ids of the point, one for each time that it was drawn."""
    metrics: list[float] = field(default_factory=list)
    """The final metrics of the finished trials."""

    @property
    def mean(self) -> float | None:
        return sum(self.metrics) / len(self.metrics) if self.metrics else None


def _optuna_search(sweep: Sweep, num_drawn: int, first_points: list[Hparams]) -> OptunaSearch:
    """Return Ray Tune's wrapper of Optuna, which draws some given points first."""
    # Optuna logs each point at level INFO; the result table shows the same.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        # With the seed of the first run, a resumed search would draw the first points again.
        seed=sweep.seed + num_drawn,
        n_startup_trials=min(STARTUP, math.ceil(STARTUP_SHARE * sweep.num_samples)),
        # Avoids points near those that are running.
        constant_liar=True,
    )
    space = {path: variants.tune_domain(_categorical_axis(axis)) for path, axis in sweep.space.items()}
    return OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric=METRIC,
        mode=sweep.mode,
        sampler=sampler,
        points_to_evaluate=first_points or None,
    )


def _final_metrics(trials: Sequence[TrialSpec], pending: Container[str]) -> list[float]:
    """Return the finite metrics of the trials that finished without failing."""
    metrics = []
    for trial in trials:
        if trial.trial_id in pending or trial_status(trial) == FAILED:
            continue
        metric = last_validation_metric(trial)
        if metric is not None and math.isfinite(metric):
            metrics.append(metric)
    return metrics


def _categorical_axis(axis: Axis) -> Axis:
    """Return a choice with its values as JSON: Optuna's categories cannot be lists or None."""
    return Axis(choice=tuple(_encode(axis, value) for value in axis.choice)) if axis.choice else axis


def _encode(axis: Axis, value: Any) -> Any:
    return json.dumps(value) if axis.choice else value


def _decode(axis: Axis, value: Any) -> Any:
    return json.loads(value) if axis.choice else value


class TrialSearcher(Searcher):
    """Hands trials to Ray Tune: known trials first, then those of new points.

    Args:
        queue: the trials to begin with.
        registry: the trials of the run, to which those of new points are added.
        update_slots: returns how many trials fit now, given how many are unfinished (`TrialSlots.update`).
        searches: the searches of the arms whose points depend on earlier results.
    """

    def __init__(
        self,
        queue: Iterable[TrialSpec],
        registry: TrialRegistry,
        update_slots: Callable[[float], int],
        searches: Sequence[ArmSearch] = (),
    ) -> None:
        super().__init__()
        self._queue = deque(queue)
        self._registry = registry
        self._update_slots = update_slots
        self._searches = {search.arm: search for search in searches}
        self._running: dict[str, TrialSpec] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return Tune's configuration of the next trial; None to wait, or `Searcher.FINISHED`.

        Args:
            trial_id: Tune's id of the trial.
        """
        # Before the slots: after a loss of nodes there may be none, and a finished run must not wait for them.
        if not self._queue and not self._can_draw():
            return Searcher.FINISHED
        if len(self._running) >= self._update_slots(self._num_unfinished()):
            return None
        while not self._queue:
            # The arm with the most open points is next, so that all arms progress alike.
            search = max(self._searches.values(), key=lambda each: each.num_open)
            if not search.num_open:
                return Searcher.FINISHED
            for trial in search.draw():
                self._registry.add(trial)
                self._queue.append(trial)
        trial = self._running[trial_id] = self._queue.popleft()
        return {"trial_id": trial.trial_id, "arm": trial.arm_name, "seed": trial.seed, **trial.hparams}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the trial's metric in its arm's search, and lower the request for nodes.

        Args:
            trial_id: Tune's id of the trial.
            result: its last result.
            error: whether it failed.
        """
        trial = self._running.pop(trial_id)
        if trial.arm_name in self._searches:
            self._searches[trial.arm_name].record(trial, None if error else last_validation_metric(trial))
        if num_unfinished := self._num_unfinished():
            # Tune does not call `suggest` any more after FINISHED, but the last trials need fewer nodes too.
            self._update_slots(num_unfinished)

    def _can_draw(self) -> bool:
        return any(search.num_open for search in self._searches.values())

    def _num_unfinished(self) -> float:
        return math.inf if self._can_draw() else len(self._queue) + len(self._running)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the experiment's folder holds the points and the results."""
