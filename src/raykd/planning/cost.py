"""Tokens, hours and money of each stage, from given or measured rates."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from raykd import identity
from raykd.cluster import resources
from raykd.config.experiment import Arm, Experiment, affects_teacher
from raykd.config.loading import load_experiment
from raykd.config.run_file import read_run
from raykd.planning.demand import UNKNOWN_CLUSTER, max_points, num_problems
from raykd.storage import files, filesystem, hashing
from raykd.storage.paths import METRICS_FILE, ExperimentPaths
from raykd.training.trial import read_loss_curve


@dataclass(frozen=True)
class Rates:
    """Tokens a second, None where it is not known. Loading of models is in them where a run measured them."""

    generation: float | None = None
    """Completion tokens of one replica of the teacher."""
    training: float | None = None
    """Target tokens of one training worker."""
    evaluation: float | None = None
    """Tokens that the engine of the students writes."""
    completion_tokens: float | None = None
    """Tokens of a completion of the teacher, in the mean."""
    answer_tokens: float | None = None
    """Tokens of a student's answer, in the mean."""
    accelerator: str = "gpu"
    """What they are of: `gpu` or `cpu`."""
    source: str = "as told"


def measured_rates(folder: Path) -> Rates:
    """The rates of an earlier run.

    Args:
        folder: the experiment's, with `run.json`.

    Raises:
        UserError: where it is not the folder of a run, or what it wrote is damaged.
    """
    run = read_run(folder)
    file = ExperimentPaths(folder).config
    replicas = load_experiment(file).teacher.replicas.max if file.is_file() else 1
    # Solutions are scored in the same stream, and each set's seconds are an equal share of all.
    together = [each for each in run.completions if each.get("source") != "student"]
    made = [each for each in together if each.get("source") != "reference"]
    tokens, seconds = _sum_field(made, "completion_tokens"), _sum_field(together, "seconds")
    rows = _sum_field(made, "rows") - _sum_field(made, "errors")
    curves = [
        read_loss_curve(each) for each in filesystem.find_in_subdirs(ExperimentPaths(folder).trials, METRICS_FILE)
    ]
    ends = [curve[-1] for curve in curves if curve]
    trained = _sum_field(ends, "target_tokens")
    worked = sum(float(each.get("seconds") or 0) * float(each.get("num_workers") or 1) for each in ends)
    answers, answered = _count_answers(ExperimentPaths(folder).all_predictions)
    answering = run.stages.get("predictions", 0.0)
    held = {kind for kinds in run.processor_seconds.values() for kind in kinds}
    return Rates(
        generation=_ratio(tokens, seconds * replicas),
        training=_ratio(trained, worked),
        evaluation=_ratio(answered, answering),
        completion_tokens=_ratio(tokens, rows),
        answer_tokens=_ratio(answered, answers),
        accelerator="cpu" if held == {"cpu"} else "gpu",
        source=f"measured in {folder}",
    )


def _count_answers(file: Path) -> tuple[int, float]:
    """How many answers there are that did not fail, and their tokens."""
    if not file.is_file():
        return 0, 0.0
    table = files.read_table(file, ["num_tokens", "error"])
    table = table.filter(pc.equal(table["error"], ""))  # pyright: ignore[reportAttributeAccessIssue]
    return len(table), float(sum(table["num_tokens"].to_pylist()))


def _sum_field(entries: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(float(each.get(name) or 0) for each in entries)


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if amount and of else None


@dataclass(frozen=True)
class StageCost:
    """What a stage has to do, and what it takes where its rate is known."""

    what: str
    rows: int | None
    tokens: float | None
    """At most, where the mean length is not known."""
    is_bound: bool = True
    rate: float | None = None
    """Tokens a second of all that work at it together."""
    processors: int = 0
    kind: str = "gpu"
    price: float | None = None
    """Of a processor's hour."""

    @property
    def hours(self) -> float | None:
        """From the start of the stage to its end, without what is loaded where that was not measured."""
        return self.tokens / self.rate / 3600 if self.tokens is not None and self.rate else None

    @property
    def processor_hours(self) -> float | None:
        """GPU hours, or hours of cores."""
        return None if self.hours is None else self.hours * self.processors

    @property
    def cost(self) -> float | None:
        """In the currency of the prices."""
        hours = self.processor_hours
        return None if hours is None or self.price is None else hours * self.price


def stage_costs(
    experiment: Experiment, rates: Rates, cluster: Mapping[str, float] = UNKNOWN_CLUSTER["gpu"], at_a_time: int = 1
) -> list[StageCost]:
    """What an experiment has to do: tokens at most, or by their mean, and hours and money where rates are known.

    Args:
        experiment: the experiment.
        rates: how fast it goes.
        cluster: the cluster's resources as Ray names them.
        at_a_time: trials that are trained at the same time.
    """
    train, test = num_problems(experiment.dataset)
    arms = {name: experiment.arm(name) for name in experiment.arms}
    students = max_points(experiment) * len(experiment.seeds)
    told, prices = experiment.evaluate, experiment.prices
    kind, replica = resources.engine_processors(experiment.teacher.engine, cluster, experiment.teacher.replicas.max)
    dearer = prices.teacher_gpu_hour if kind == "gpu" and prices.teacher_gpu_hour is not None else None
    of_kind = {"gpu": prices.gpu_hour, "cpu": prices.cpu_hour}
    # Elsewhere it holds none of ours.
    replica = 0 if experiment.teacher.endpoint else replica
    teacher = (replica, kind, dearer if dearer is not None else of_kind[kind])
    found = []
    for sequence, what in (("teacher", "the teacher writes"), ("reference", "the teacher scores solutions")):
        asked = {_teacher_request(arm): arm for arm in arms.values() if arm.needs_teacher}
        lessons = [arm for arm in asked.values() if arm.targets.source == sequence]
        samples = [arm.teacher.num_samples if sequence == "teacher" else 1 for arm in lessons]
        rows = [_multiply(train, _search_factor(experiment) * number) for number in samples]
        if not lessons:
            continue
        if sequence == "reference":
            # It reads them at once, which no rate here is of.
            found.append(StageCost(what, _total(rows), None))
            continue
        limits = [arm.teacher.sampling.max_tokens for arm in lessons]
        rate = rates.generation and rates.generation * experiment.teacher.replicas.max
        found.append(_stage_cost(what, rows, limits, rates.completion_tokens, rate, *teacher))
    trained, limits, own, own_limits = [], [], [], []
    for arm in arms.values():
        samples = arm.teacher.num_samples if arm.targets.source == "teacher" and arm.targets.filter != "best" else 1
        trained.append(_multiply(train, students * arm.train.epochs * samples))
        limits.append(max_target_tokens(arm))
        if arm.targets.source == "student":
            own.append(_multiply(train, students * arm.train.epochs))
            own_limits.append(arm.targets.rollout.max_tokens)
    widest = max(arms.values(), key=lambda arm: arm.train.num_workers).train
    kind, workers = resources.resolve_accelerator(widest.accelerator, cluster), widest.num_workers * at_a_time
    rate = rates.training and rates.training * workers
    found.append(
        _stage_cost(
            "students are trained", trained, limits, rates.completion_tokens, rate, workers, kind, of_kind[kind]
        )
    )
    kind, processors = resources.engine_processors(told.engine, cluster)
    engine = (rates.answer_tokens, rates.evaluation, processors, kind, of_kind[kind])
    if own:
        found.append(_stage_cost("students answer, to learn from it", own, own_limits, *engine))
    if (sweep := experiment.sweep) and sweep.metric == "accuracy":
        rows = _multiply(experiment.dataset.num_validation, len(arms) * students * sweep.num_validations)
        found.append(_stage_cost("students are validated", [rows], [told.sampling.max_tokens], rates.answer_tokens))
    finalists = (sweep.test_top_n if sweep else None) or max_points(experiment)
    asked = 1 + len(arms) * min(finalists, max_points(experiment)) * len(experiment.seeds)
    rows = _multiply(test, asked * told.num_samples)
    found.append(_stage_cost("students answer the test", [rows], [told.sampling.max_tokens], *engine))
    return found


def _teacher_request(arm: Arm) -> tuple[object, ...]:
    """What tells a set of completions from another; log-probabilities of an answer come with it."""
    return arm.prompt.strategy, hashing.content_key(identity.teacher_request(arm))


def _search_factor(experiment: Experiment) -> int:
    """How many times as much a search may ask of the teacher."""
    sweep = experiment.sweep
    axes = [axis for path, axis in sweep.space.items() if affects_teacher(path)] if sweep else []
    return math.prod(len(axis.values) or (sweep.num_samples if sweep else 1) for axis in axes)


def max_target_tokens(arm: Arm) -> int:
    """Target tokens of a row at most."""
    limits = {"teacher": arm.teacher.sampling.max_tokens, "student": arm.targets.rollout.max_tokens}
    return min(limits.get(arm.targets.source, arm.train.max_length), arm.train.max_length)


def _stage_cost(
    what: str,
    rows: list[int | None],
    limits: list[int],
    mean: float | None,
    rate: float | None = None,
    processors: int = 0,
    kind: str = "gpu",
    price: float | None = None,
) -> StageCost:
    total = _total(rows)
    tokens = None
    if total is not None:
        each = [min(limit, mean or limit) for limit in limits]
        tokens = float(sum((number or 0) * length for number, length in zip(rows, each, strict=True)))
    return StageCost(what, total, tokens, mean is None, rate, processors, kind, price)


def _multiply(number: int | None, factor: int) -> int | None:
    return None if number is None else number * factor


def _total(numbers: list[int | None]) -> int | None:
    return None if any(each is None for each in numbers) else sum(each or 0 for each in numbers)
