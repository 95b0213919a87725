"""Tokens, hours and cost of each stage, from given or measured rates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from raykd import identity
from raykd.cluster import resources
from raykd.cluster.resources import Accelerator
from raykd.config.experiment import Arm, Experiment, affects_teacher
from raykd.config.loading import load_experiment
from raykd.config.run_record import read_run
from raykd.planning.demand import UNKNOWN_CLUSTER, max_points, num_problems
from raykd.storage import files, filesystem, hashing
from raykd.storage.paths import METRICS_FILE, ExperimentPaths
from raykd.training.trial_record import read_loss_curve


@dataclass(frozen=True)
class Rates:
    """Throughputs in tokens/s, and mean lengths in tokens; None where unknown.

    Rates that a run measured include the time to load the models.
    """

    generation: float | None = None
    """Completion tokens/s of one teacher replica."""
    training: float | None = None
    """Target tokens/s of one training worker."""
    evaluation: float | None = None
    """Generated tokens/s of the student engine."""
    completion_tokens: float | None = None
    """Mean tokens of a teacher completion."""
    answer_tokens: float | None = None
    """Mean tokens of a student's answer."""
    accelerator: str = "gpu"
    """Accelerator of these rates: `gpu` or `cpu`."""
    source: str = "command line"
    """Origin of the rates, shown in the table's title."""


def measured_rates(folder: Path) -> Rates:
    """Return the rates of an earlier run.

    Args:
        folder: the experiment's folder, with `run.json`.

    Raises:
        UserError: where it is not the folder of a run, or its files are damaged.
    """
    run = read_run(folder)
    file = ExperimentPaths(folder).config
    replicas = load_experiment(file).teacher.replicas.max if file.is_file() else 1
    # Reference solutions are scored in the same Ray Data stream, which splits its seconds equally among the sets.
    teacher_sets = [entry for entry in run.completions if entry.get("source") != "student"]
    generated_sets = [entry for entry in teacher_sets if entry.get("source") != "reference"]
    tokens, seconds = _sum_field(generated_sets, "completion_tokens"), _sum_field(teacher_sets, "seconds")
    rows = _sum_field(generated_sets, "rows") - _sum_field(generated_sets, "errors")
    curves = [
        read_loss_curve(path) for path in filesystem.find_in_subdirs(ExperimentPaths(folder).trials, METRICS_FILE)
    ]
    last_steps = [curve[-1] for curve in curves if curve]
    target_tokens = _sum_field(last_steps, "target_tokens")
    worker_seconds = sum(float(step.get("seconds") or 0) * float(step.get("num_workers") or 1) for step in last_steps)
    num_answers, answer_tokens = _count_answers(ExperimentPaths(folder).all_predictions)
    accelerators = {accelerator for seconds_by in run.processor_seconds.values() for accelerator in seconds_by}
    return Rates(
        generation=_ratio(tokens, seconds * replicas),
        training=_ratio(target_tokens, worker_seconds),
        evaluation=_ratio(answer_tokens, run.stages.get("evaluate", 0.0)),
        completion_tokens=_ratio(tokens, rows),
        answer_tokens=_ratio(answer_tokens, num_answers),
        accelerator="cpu" if accelerators == {"cpu"} else "gpu",
        source=f"measured in {folder}",
    )


def _count_answers(file: Path) -> tuple[int, float]:
    """Return the number of answers without an error, and their tokens."""
    if not file.is_file():
        return 0, 0.0
    table = files.read_table(file, ["num_tokens", "error"])
    table = table.filter(pc.equal(table["error"], ""))  # pyright: ignore[reportAttributeAccessIssue]
    return len(table), float(sum(table["num_tokens"].to_pylist()))


def _sum_field(entries: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(float(entry.get(name) or 0) for entry in entries)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if numerator and denominator else None


@dataclass(frozen=True)
class StageCost:
    """Rows and tokens of a stage, with its hours and cost where the rate is known."""

    stage: str
    """Name as the table shows it, such as `Teacher generation`."""
    rows: int | None
    tokens: float | None
    """Tokens of all rows; an upper bound where `is_bound`."""
    is_bound: bool = True
    """Whether `tokens` is an upper bound, because the mean length is unknown."""
    rate: float | None = None
    """Tokens/s of all processors of the stage together."""
    processors: int = 0
    """GPUs, or CPU cores, that the stage holds."""
    kind: str = "gpu"
    """`gpu` or `cpu`."""
    price: float | None = None
    """Price of a processor hour."""

    @property
    def hours(self) -> float | None:
        """Wall-clock hours of the stage; model loading counts only where the rate was measured."""
        return self.tokens / self.rate / 3600 if self.tokens is not None and self.rate else None

    @property
    def processor_hours(self) -> float | None:
        """GPU hours, or core hours."""
        return None if self.hours is None else self.hours * self.processors

    @property
    def cost(self) -> float | None:
        """Cost in the currency of the prices."""
        hours = self.processor_hours
        return None if hours is None or self.price is None else hours * self.price


@dataclass(frozen=True)
class _Processors:
    """Processors that a stage holds, and the price of an hour of one."""

    num: int
    kind: Accelerator
    price: float | None


@dataclass(frozen=True)
class _Workload:
    """Rows of one arm, each of at most `max_tokens` tokens; `rows` is None where the dataset's size is unknown."""

    rows: int | None
    max_tokens: int


def stage_costs(
    experiment: Experiment,
    rates: Rates,
    cluster: Mapping[str, float] = UNKNOWN_CLUSTER["gpu"],
    concurrent_trials: int = 1,
) -> list[StageCost]:
    """Return the tokens of each stage, with hours and cost where rates and prices are known.

    Args:
        experiment: the experiment.
        rates: throughputs and mean lengths.
        cluster: the cluster's resources as Ray names them.
        concurrent_trials: number of trials that train at the same time.
    """
    arms = [experiment.arm(name) for name in experiment.arms]
    engine = _engine_processors(experiment, cluster)
    stages = [
        _teacher_generation(experiment, arms, rates, cluster),
        _teacher_scoring(experiment, arms),
        _training(experiment, arms, rates, cluster, concurrent_trials),
        _student_rollouts(experiment, arms, rates, engine),
        _validation(experiment, rates),
        _test_evaluation(experiment, rates, engine),
    ]
    return [stage for stage in stages if stage]


def _teacher_generation(
    experiment: Experiment, arms: Sequence[Arm], rates: Rates, cluster: Mapping[str, float]
) -> StageCost | None:
    requests = _distinct_teacher_requests(arms, "teacher")
    if not requests:
        return None
    num_train, _ = num_problems(experiment.dataset)
    factor = _search_factor(experiment)
    workloads = [
        _Workload(_multiply(num_train, factor * arm.teacher.num_samples), arm.teacher.sampling.max_tokens)
        for arm in requests
    ]
    rate = rates.generation and rates.generation * experiment.teacher.replicas.max
    processors = _teacher_processors(experiment, cluster)
    return _stage_cost("Teacher generation", workloads, rates.completion_tokens, rate, processors)


def _teacher_scoring(experiment: Experiment, arms: Sequence[Arm]) -> StageCost | None:
    requests = _distinct_teacher_requests(arms, "reference")
    if not requests:
        return None
    num_train, _ = num_problems(experiment.dataset)
    # Scoring is one prefill a solution, which none of the rates describes.
    return StageCost("Teacher scoring", _multiply(num_train, _search_factor(experiment) * len(requests)), tokens=None)


def _training(
    experiment: Experiment, arms: Sequence[Arm], rates: Rates, cluster: Mapping[str, float], concurrent_trials: int
) -> StageCost:
    num_train, _ = num_problems(experiment.dataset)
    trials_per_arm = _trials_per_arm(experiment)
    workloads = []
    for arm in arms:
        has_samples = arm.targets.source == "teacher" and arm.targets.filter != "best"
        samples = arm.teacher.num_samples if has_samples else 1
        rows = _multiply(num_train, trials_per_arm * arm.train.epochs * samples)
        workloads.append(_Workload(rows, max_target_tokens(arm)))
    train = max(arms, key=lambda arm: arm.train.num_workers).train
    kind = resources.resolve_accelerator(train.accelerator, cluster)
    workers = train.num_workers * concurrent_trials
    rate = rates.training and rates.training * workers
    processors = _Processors(workers, kind, experiment.prices.per_hour(kind))
    return _stage_cost("Training", workloads, rates.completion_tokens, rate, processors)


def _student_rollouts(
    experiment: Experiment, arms: Sequence[Arm], rates: Rates, engine: _Processors
) -> StageCost | None:
    num_train, _ = num_problems(experiment.dataset)
    trials_per_arm = _trials_per_arm(experiment)
    workloads = [
        _Workload(_multiply(num_train, trials_per_arm * arm.train.epochs), arm.targets.rollout.max_tokens)
        for arm in arms
        if arm.targets.source == "student"
    ]
    if not workloads:
        return None
    return _stage_cost("Student rollouts", workloads, rates.answer_tokens, rates.evaluation, engine)


def _validation(experiment: Experiment, rates: Rates) -> StageCost | None:
    sweep = experiment.sweep
    if not sweep or sweep.metric != "accuracy":
        return None
    num_trials = len(experiment.arms) * _trials_per_arm(experiment)
    rows = _multiply(experiment.dataset.num_validation, num_trials * sweep.num_validations)
    workload = _Workload(rows, experiment.evaluate.sampling.max_tokens)
    # Training workers generate these answers, for which there is no rate.
    return _stage_cost("Validation", [workload], rates.answer_tokens)


def _test_evaluation(experiment: Experiment, rates: Rates, engine: _Processors) -> StageCost:
    _, num_test = num_problems(experiment.dataset)
    points = max_points(experiment)
    top_n = (experiment.sweep.test_top_n if experiment.sweep else None) or points
    # The base student is one more.
    num_students = 1 + len(experiment.arms) * min(top_n, points) * len(experiment.seeds)
    rows = _multiply(num_test, num_students * experiment.evaluate.num_samples)
    workload = _Workload(rows, experiment.evaluate.sampling.max_tokens)
    return _stage_cost("Test evaluation", [workload], rates.answer_tokens, rates.evaluation, engine)


def _teacher_processors(experiment: Experiment, cluster: Mapping[str, float]) -> _Processors:
    teacher, prices = experiment.teacher, experiment.prices
    kind, num = resources.engine_processors(teacher.engine, cluster, teacher.replicas.max)
    if teacher.endpoint:
        # An external endpoint holds no processors of this cluster.
        num = 0
    return _Processors(num, kind, prices.per_hour(kind, is_teacher=True))


def _engine_processors(experiment: Experiment, cluster: Mapping[str, float]) -> _Processors:
    kind, num = resources.engine_processors(experiment.evaluate.engine, cluster)
    return _Processors(num, kind, experiment.prices.per_hour(kind))


def _distinct_teacher_requests(arms: Sequence[Arm], source: str) -> list[Arm]:
    """Return one arm for each completion set of a source; arms that share a set generate it once."""
    distinct = {_teacher_request(arm): arm for arm in arms if arm.needs_teacher}
    return [arm for arm in distinct.values() if arm.targets.source == source]


def _teacher_request(arm: Arm) -> tuple[object, ...]:
    """Return the key of an arm's completion set, without its top-k: log-probabilities come with the answer."""
    return arm.prompt.strategy, hashing.content_key(identity.teacher_request(arm))


def _search_factor(experiment: Experiment) -> int:
    """Return the number of teacher requests per arm at most: combinations of the swept fields that affect them."""
    sweep = experiment.sweep
    axes = [axis for path, axis in sweep.space.items() if affects_teacher(path)] if sweep else []
    return math.prod(len(axis.values) or (sweep.num_samples if sweep else 1) for axis in axes)


def _trials_per_arm(experiment: Experiment) -> int:
    return max_points(experiment) * len(experiment.seeds)


def max_target_tokens(arm: Arm) -> int:
    """Return the largest number of target tokens of a row."""
    limits = {"teacher": arm.teacher.sampling.max_tokens, "student": arm.targets.rollout.max_tokens}
    return min(limits.get(arm.targets.source, arm.train.max_length), arm.train.max_length)


def _stage_cost(
    stage: str,
    workloads: Sequence[_Workload],
    mean_tokens: float | None,
    rate: float | None = None,
    processors: _Processors | None = None,
) -> StageCost:
    processors = processors or _Processors(0, "gpu", None)
    rows: int | None = 0
    tokens: float | None = 0.0
    for workload in workloads:
        if rows is None or tokens is None or workload.rows is None:
            rows = tokens = None
            break
        rows += workload.rows
        tokens += workload.rows * min(workload.max_tokens, mean_tokens or workload.max_tokens)
    return StageCost(
        stage=stage,
        rows=rows,
        tokens=tokens,
        is_bound=mean_tokens is None,
        rate=rate,
        processors=processors.num,
        kind=processors.kind,
        price=processors.price,
    )


def _multiply(number: int | None, factor: int) -> int | None:
    return None if number is None else number * factor
