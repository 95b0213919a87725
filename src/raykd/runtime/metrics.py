"""Metrics: what is counted of a run for Ray's metrics, and under which names; without Ray nothing is counted."""

import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raykd.storage.schemas import COMPLETE, FAILED, STOPPED

WAITING, TRAINING = "waiting", "training"
STATES = (WAITING, TRAINING, COMPLETE, STOPPED, FAILED)
# Ray sends on what was set since it last did, every 10 s, and forgets what it was not told of for 20.
REPUBLISH_INTERVAL_S = 5


@dataclass(frozen=True)
class Metric:
    """A metric's name in Ray, what it is of, and by what its series are told apart."""

    kind: Literal["counter", "gauge"]
    name: str
    description: str
    tags: tuple[str, ...]

    @property
    def exported(self) -> str:
        """What Prometheus calls it."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


# The experiment's name, and the id of the job that works on it, as Ray's dashboard shows it.
_RUN_TAGS = ("experiment", "ray_job")
# `source` is whose text it is: the `teacher`'s, or the `reference` solutions' or a `student`'s, which it scored.
_STRATEGY_TAGS = (*_RUN_TAGS, "strategy", "source")
_TRIAL_TAGS = (*_RUN_TAGS, "trial")

COMPLETIONS = Metric(
    "counter",
    "raykd_completions",
    "Completions that the teacher wrote or scored (outcome done), and those that carry an error (outcome failed).",
    (*_STRATEGY_TAGS, "outcome"),
)
TOKENS = Metric("counter", "raykd_completion_tokens", "Tokens of completions that are done.", _STRATEGY_TAGS)
CORRECT = Metric(
    "counter", "raykd_correct_completions", "Completions whose strict answer is the right one.", _STRATEGY_TAGS
)
SHARE = Metric(
    "gauge",
    "raykd_correct_share",
    "Share of the completions done in this run so far whose strict answer is the right one, 0 to 1.",
    _STRATEGY_TAGS,
)
LOSS = Metric("gauge", "raykd_training_loss", "Mean loss of a target token since the last look, nats.", _TRIAL_TAGS)
SPEED = Metric("gauge", "raykd_training_tokens_per_second", "Target tokens per second of a trial.", _TRIAL_TAGS)
WORKER_SPEED = Metric(
    "gauge",
    "raykd_training_worker_tokens_per_second",
    "Target tokens per second of one of a trial's workers.",
    (*_TRIAL_TAGS, "rank"),
)
TRIALS = Metric("gauge", "raykd_trials", f"Trials by state: {', '.join(STATES)}.", (*_RUN_TAGS, "state"))
METRICS = (COMPLETIONS, TOKENS, CORRECT, SHARE, LOSS, SPEED, WORKER_SPEED, TRIALS)

# Of this process: Ray's own objects, what gauges stand at, completions done and correct, and the state of each trial.
_created: dict[Metric, Any] = {}
_gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}
_answers: dict[tuple[str, ...], tuple[int, int]] = {}
_states: dict[str, dict[str, str]] = {}
_lock = threading.Lock()
_publisher: threading.Thread | None = None


@dataclass(frozen=True)
class CompletionCounts:
    """What completions came to."""

    done: int
    failed: int
    tokens: int
    correct: int


def count_rows(rows: Iterable[Mapping[str, Any]]) -> CompletionCounts:
    """Counts rows of `schemas.COMPLETION`."""
    rows = list(rows)
    done = [row for row in rows if not row["error"]]
    tokens = sum(len(row["completion_token_ids"]) for row in done)
    return CompletionCounts(len(done), len(rows) - len(done), tokens, sum(bool(row["is_correct"]) for row in done))


def count_completions(experiment: str, strategy: str, source: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Counts completions that were written.

    Args:
        experiment: the experiment's name.
        strategy: how the teacher was primed.
        source: what it answered or scored, as `targets.source` has it.
        rows: of `schemas.COMPLETION`.
    """
    if not _is_connected():
        return
    found, of = count_rows(rows), (experiment, _ray_job(), strategy, source)
    _add(COMPLETIONS, (*of, "done"), found.done)
    _add(COMPLETIONS, (*of, "failed"), found.failed)
    _add(TOKENS, of, found.tokens)
    _add(CORRECT, of, found.correct)
    done, correct = _answers.get(of, (0, 0))
    _answers[of] = done, correct = done + found.done, correct + found.correct
    if done:
        _set(SHARE, of, correct / done)


def show_training(
    experiment: str,
    trial_id: str,
    worker: int,
    loss: float | None,
    tokens_per_second: float,
    own_tokens_per_second: float,
) -> None:
    """Shows how a trial's training goes.

    Args:
        experiment: the experiment's name.
        trial_id: the trial.
        worker: the rank of the worker that this process is.
        loss: of all workers' tokens, nats; None where there were none.
        tokens_per_second: of all workers.
        own_tokens_per_second: of this one.
    """
    if not _is_connected():
        return
    of = (experiment, _ray_job(), trial_id)
    if worker == 0:
        _set(SPEED, of, tokens_per_second)
        if loss is not None:
            _set(LOSS, of, loss)
    _set(WORKER_SPEED, (*of, str(worker)), own_tokens_per_second)


def show_trials(experiment: str, states: Mapping[str, str]) -> None:
    """Shows how many of an experiment's trials are in each state.

    Args:
        experiment: the experiment's name.
        states: by trial, those of `STATES` that are known now; empty for one that waits. What was said of other trials
            of the experiment stands.
    """
    if not _is_connected():
        return
    known = _states.setdefault(experiment, {})
    known.update({trial: state or WAITING for trial, state in states.items()})
    found = list(known.values())
    for state in STATES:
        _set(TRIALS, (experiment, _ray_job(), state), found.count(state))


def reset() -> None:
    """Forgets what this process has shown, when it leaves a cluster."""
    with _lock:
        _gauges.clear()
    _answers.clear()
    _states.clear()


def _is_connected() -> bool:
    # The training loop runs without Ray, too, and then should not wait for it to load.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _ray_job() -> str:
    import ray

    return ray.get_runtime_context().get_job_id()


def _add(metric: Metric, tags: tuple[str, ...], amount: int) -> None:
    # Ray's counters do not take a zero.
    if amount:
        _ray_metric(metric).inc(amount, tags=dict(zip(metric.tags, tags, strict=True)))


def _set(metric: Metric, tags: tuple[str, ...], value: float) -> None:
    global _publisher
    with _lock:
        _gauges[metric, tags] = value
        _publish(metric, tags, value)
        if _publisher is None:
            _publisher = threading.Thread(target=_republish, name="raykd-metrics", daemon=True)
            _publisher.start()


def _republish() -> None:
    """Keeps gauges where they stand, however seldom they are set."""
    global _publisher
    while True:
        time.sleep(REPUBLISH_INTERVAL_S)
        with _lock:
            if not _is_connected() or not _gauges:
                _publisher = None
                return
            for (metric, tags), value in _gauges.items():
                _publish(metric, tags, value)


def _publish(metric: Metric, tags: tuple[str, ...], value: float) -> None:
    _ray_metric(metric).set(value, tags=dict(zip(metric.tags, tags, strict=True)))


def _ray_metric(metric: Metric) -> Any:
    """Ray's own object, made in the process that counts."""
    if metric not in _created:
        from ray.util.metrics import Counter, Gauge

        made = Counter if metric.kind == "counter" else Gauge
        _created[metric] = made(metric.name, metric.description, metric.tags)
    return _created[metric]
