"""Metrics: the counters and gauges of a run in Ray's metrics. Without Ray nothing is recorded."""

import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raykd.storage.schemas import COMPLETE, FAILED, STOPPED

WAITING, TRAINING = "waiting", "training"
STATES = (WAITING, TRAINING, COMPLETE, STOPPED, FAILED)
# Ray exports every 10 s the gauges that were set since its last export, and drops a gauge after 20 s without a value.
REPUBLISH_INTERVAL_S = 5


@dataclass(frozen=True)
class Metric:
    """A metric of Ray: kind, name, description and tag keys."""

    kind: Literal["counter", "gauge"]
    name: str
    description: str
    tags: tuple[str, ...]

    @property
    def exported(self) -> str:
        """The metric's name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


# `ray_job` is the id of the Ray job, as Ray's dashboard shows it.
_RUN_TAGS = ("experiment", "ray_job")
# `source` is `targets.source`: the teacher writes its own completions, and scores reference solutions and students'.
_STRATEGY_TAGS = (*_RUN_TAGS, "strategy", "source")
_TRIAL_TAGS = (*_RUN_TAGS, "trial")

COMPLETIONS = Metric(
    "counter",
    "raykd_completions",
    "Completions that the teacher wrote or scored (outcome done), and completions with an error (outcome failed).",
    (*_STRATEGY_TAGS, "outcome"),
)
TOKENS = Metric("counter", "raykd_completion_tokens", "Tokens of successful completions.", _STRATEGY_TAGS)
CORRECT = Metric("counter", "raykd_correct_completions", "Completions with the correct strict answer.", _STRATEGY_TAGS)
SHARE = Metric(
    "gauge",
    "raykd_correct_share",
    "Share of this run's successful completions so far with the correct strict answer, 0 to 1.",
    _STRATEGY_TAGS,
)
LOSS = Metric("gauge", "raykd_training_loss", "Mean loss per target token since the last report, nats.", _TRIAL_TAGS)
SPEED = Metric("gauge", "raykd_training_tokens_per_second", "Target tokens per second of a trial.", _TRIAL_TAGS)
WORKER_SPEED = Metric(
    "gauge",
    "raykd_training_worker_tokens_per_second",
    "Target tokens per second of one of a trial's workers.",
    (*_TRIAL_TAGS, "rank"),
)
TRIALS = Metric("gauge", "raykd_trials", f"Trials by state: {', '.join(STATES)}.", (*_RUN_TAGS, "state"))
METRICS = (COMPLETIONS, TOKENS, CORRECT, SHARE, LOSS, SPEED, WORKER_SPEED, TRIALS)

# State of this process: Ray's metric objects, values of gauges, numbers of successful and correct completions by tags,
# and the state of each trial by experiment.
_created: dict[Metric, Any] = {}
_gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}
_answers: dict[tuple[str, ...], tuple[int, int]] = {}
_states: dict[str, dict[str, str]] = {}
_lock = threading.Lock()
_publisher: threading.Thread | None = None


@dataclass(frozen=True)
class CompletionCounts:
    """Numbers of completions, and of the tokens of successful completions."""

    done: int
    failed: int
    tokens: int
    correct: int


def count_rows(rows: Iterable[Mapping[str, Any]]) -> CompletionCounts:
    """Return the counts of some completions.

    Args:
        rows: rows of `schemas.COMPLETION`.
    """
    rows = list(rows)
    done = [row for row in rows if not row["error"]]
    tokens = sum(len(row["completion_token_ids"]) for row in done)
    return CompletionCounts(len(done), len(rows) - len(done), tokens, sum(bool(row["is_correct"]) for row in done))


def count_completions(experiment: str, strategy: str, source: str, counts: CompletionCounts) -> None:
    """Add completions to the counters.

    Args:
        experiment: the experiment's name.
        strategy: the name of the teacher's strategy.
        source: the value of `targets.source`.
        counts: the numbers to add.
    """
    if not _is_connected():
        return
    tags = (experiment, _ray_job(), strategy, source)
    _add(COMPLETIONS, (*tags, "done"), counts.done)
    _add(COMPLETIONS, (*tags, "failed"), counts.failed)
    _add(TOKENS, tags, counts.tokens)
    _add(CORRECT, tags, counts.correct)
    done, correct = _answers.get(tags, (0, 0))
    _answers[tags] = done, correct = done + counts.done, correct + counts.correct
    if done:
        _set(SHARE, tags, correct / done)


def show_training(
    experiment: str,
    trial_id: str,
    worker: int,
    loss: float | None,
    tokens_per_second: float,
    own_tokens_per_second: float,
) -> None:
    """Set the gauges of a trial's training.

    Args:
        experiment: the experiment's name.
        trial_id: the trial's id.
        worker: the rank of this worker.
        loss: the mean loss per target token over all workers, in nats; None if there were no tokens.
        tokens_per_second: target tokens per second of all workers.
        own_tokens_per_second: target tokens per second of this worker.
    """
    if not _is_connected():
        return
    tags = (experiment, _ray_job(), trial_id)
    if worker == 0:
        _set(SPEED, tags, tokens_per_second)
        if loss is not None:
            _set(LOSS, tags, loss)
    _set(WORKER_SPEED, (*tags, str(worker)), own_tokens_per_second)


def show_trials(experiment: str, states: Mapping[str, str]) -> None:
    """Set the numbers of an experiment's trials by state.

    Args:
        experiment: the experiment's name.
        states: a value of `STATES` by trial id; empty for a waiting trial. Other trials keep their last state.
    """
    if not _is_connected():
        return
    known = _states.setdefault(experiment, {})
    known.update({trial: state or WAITING for trial, state in states.items()})
    current = list(known.values())
    for state in STATES:
        _set(TRIALS, (experiment, _ray_job(), state), current.count(state))


def reset() -> None:
    """Clear all values of this process when it disconnects from a cluster."""
    with _lock:
        _gauges.clear()
    _answers.clear()
    _states.clear()


def _is_connected() -> bool:
    # Ray is not imported here, because the training loop also runs without Ray and should not wait for its import.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _ray_job() -> str:
    import ray

    return ray.get_runtime_context().get_job_id()


def _add(metric: Metric, tags: tuple[str, ...], amount: int) -> None:
    # Ray's counters refuse an increment of 0.
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
    """Publish all gauges at an interval, so that Ray does not drop those that are rarely set."""
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
    """Return Ray's object for a metric; each process creates its own."""
    if metric not in _created:
        from ray.util.metrics import Counter, Gauge

        metric_class = Counter if metric.kind == "counter" else Gauge
        _created[metric] = metric_class(metric.name, metric.description, metric.tags)
    return _created[metric]
