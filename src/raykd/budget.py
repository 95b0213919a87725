"""Budget: what the stages of an experiment ask a cluster for, and what they write, take and cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from raykd import config, identity, placement, storage
from raykd.config import Arm, Experiment
from raykd.rates import Rates
from raykd.sections import Problems

# Problems of GSM8K (Cobbe et al., arXiv 2110.14168; `openai/gsm8k` on the hub): train and test.
GSM8K = (7473, 1319)
# Of a cluster of which nothing is told: what `accelerator: auto` finds there.
ANY = MappingProxyType({"gpu": {"CPU": 1.0, "GPU": 1.0}, "cpu": {"CPU": 1.0}})

Group = tuple[Mapping[str, float], ...]
"""The bundles of one placement group."""


@dataclass(frozen=True)
class Demand:
    """The placement groups that each stage asks for when it is at its largest; the stages follow one another."""

    generation: tuple[Group, ...] = ()
    """One for each replica of the teacher, up to `teacher.replicas.max`; a bundle for each of its processes."""
    training: tuple[Group, ...] = ()
    """One for each trial at a time; a bundle for each of its workers."""
    evaluation: tuple[Group, ...] = ()
    """The engine of the students."""
    attention: tuple[Group, ...] = ()
    """One for each worker that reads with a student."""

    def stages(self) -> dict[str, tuple[Group, ...]]:
        """By name, in the order in which they run."""
        return {name: getattr(self, name) for name in ("generation", "training", "evaluation", "attention")}


def demand(experiment: Experiment, cluster: Mapping[str, float] = ANY["gpu"]) -> Demand:
    """What the stages of an experiment ask a cluster's autoscaler for.

    Args:
        experiment: the experiment.
        cluster: the cluster's resources as Ray names them, of which it matters whether there are GPUs, for `auto`.
    """
    arms = [experiment.arm(name) for name in experiment.arms]
    teacher, students, read = experiment.teacher, experiment.evaluate.engine, experiment.attention
    replica = _engine(teacher.engine, cluster)
    engine = _engine(students, cluster)
    trial = max((_trial(arm, cluster) for arm in arms), key=len)
    at_a_time = min(trials(experiment), experiment.max_concurrent_trials or trials(experiment))
    reader = ()
    if read:
        reader = (placement.processor(placement.accelerator(read.accelerator, cluster), read.accelerator_type),)
    is_served = any(arm.needs_teacher for arm in arms) and not teacher.endpoint
    return Demand(
        generation=(replica,) * teacher.replicas.max if is_served else (),
        training=(trial,) * at_a_time,
        evaluation=(engine,),
        attention=(reader,) * read.num_workers if read else (),
    )


def _engine(engine: placement.Engine, cluster: Mapping[str, float]) -> Group:
    return tuple(placement.engine_bundles(engine, placement.accelerator(engine.accelerator, cluster)))


def _trial(arm: Arm, cluster: Mapping[str, float]) -> Group:
    return tuple(placement.trial_bundles(arm.train, placement.accelerator(arm.train.accelerator, cluster)))


def points(experiment: Experiment) -> int:
    """At how many points of a sweep an arm is trained at most; 1 where there is no sweep."""
    sweep = experiment.sweep
    return sweep.num_samples * math.prod(len(axis.grid) or 1 for axis in sweep.space.values()) if sweep else 1


def trials(experiment: Experiment) -> int:
    """How many students are trained at most."""
    return len(experiment.arms) * points(experiment) * len(experiment.seeds)


def num_problems(told: Problems) -> tuple[int | None, int | None]:
    """How many training and test problems there are; None where that is not known before they are read."""
    found: tuple[int | None, int | None] = (None, None)
    if told.source == "gsm8k":
        found = GSM8K
    elif told.source == "jsonl":
        found = _lines(told.train_file), _lines(told.test_file)
    train = found[0] - told.num_validation if found[0] else None
    train = min(train, told.num_train) if train and told.num_train else train or told.num_train
    test = min(found[1], told.num_test) if found[1] and told.num_test else found[1] or told.num_test
    return train, test


def _lines(file: str | None) -> int | None:
    path = Path(file or "")
    return sum(bool(line.strip()) for line in path.open("rb")) if path.is_file() else None


@dataclass(frozen=True)
class Work:
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


def work(
    experiment: Experiment, rates: Rates, cluster: Mapping[str, float] = ANY["gpu"], at_a_time: int = 1
) -> list[Work]:
    """What an experiment has to do: tokens at most, or by their mean, and hours and money where rates are known.

    Args:
        experiment: the experiment.
        rates: how fast it goes.
        cluster: the cluster's resources as Ray names them.
        at_a_time: trials that are trained at the same time.
    """
    train, test = num_problems(experiment.problems)
    arms = {name: experiment.arm(name) for name in experiment.arms}
    students = points(experiment) * len(experiment.seeds)
    told, prices = experiment.evaluate, experiment.prices
    kind, replica = placement.engine_processors(experiment.teacher.engine, cluster, experiment.teacher.replicas.max)
    dearer = prices.teacher_gpu_hour if kind == "gpu" and prices.teacher_gpu_hour is not None else None
    of_kind = {"gpu": prices.gpu_hour, "cpu": prices.cpu_hour}
    # Elsewhere it holds none of ours.
    replica = 0 if experiment.teacher.endpoint else replica
    teacher = (replica, kind, dearer if dearer is not None else of_kind[kind])
    found = []
    for sequence, what in (("teacher", "the teacher writes"), ("reference", "the teacher scores solutions")):
        asked = {_question(arm): arm for arm in arms.values() if arm.needs_teacher}
        lessons = [arm for arm in asked.values() if arm.targets.sequence == sequence]
        samples = [arm.teacher.samples if sequence == "teacher" else 1 for arm in lessons]
        rows = [_times(train, _searched(experiment) * number) for number in samples]
        if not lessons:
            continue
        if sequence == "reference":
            # It reads them at once, which no rate here is of.
            found.append(Work(what, _sum(rows), None))
            continue
        limits = [arm.teacher.sampling.max_tokens for arm in lessons]
        rate = rates.generation and rates.generation * experiment.teacher.replicas.max
        found.append(_work(what, rows, limits, rates.completion_tokens, rate, *teacher))
    trained, limits, own, own_limits = [], [], [], []
    for arm in arms.values():
        samples = arm.teacher.samples if arm.targets.sequence == "teacher" and arm.targets.keep != "best" else 1
        trained.append(_times(train, students * arm.train.epochs * samples))
        limits.append(longest(arm))
        if arm.targets.sequence == "student":
            own.append(_times(train, students * arm.train.epochs))
            own_limits.append(arm.targets.rollout.max_tokens)
    widest = max(arms.values(), key=lambda arm: arm.train.num_workers).train
    kind, workers = placement.accelerator(widest.accelerator, cluster), widest.num_workers * at_a_time
    rate = rates.training and rates.training * workers
    found.append(
        _work("students are trained", trained, limits, rates.completion_tokens, rate, workers, kind, of_kind[kind])
    )
    kind, processors = placement.engine_processors(told.engine, cluster)
    engine = (rates.answer_tokens, rates.answering, processors, kind, of_kind[kind])
    if own:
        found.append(_work("students answer, to learn from it", own, own_limits, *engine))
    if (sweep := experiment.sweep) and sweep.metric == "accuracy":
        rows = _times(experiment.problems.num_validation, len(arms) * students * sweep.validations)
        found.append(_work("students are validated", [rows], [told.sampling.max_tokens], rates.answer_tokens))
    finalists = (sweep.finalists if sweep else None) or points(experiment)
    asked = 1 + len(arms) * min(finalists, points(experiment)) * len(experiment.seeds)
    rows = _times(test, asked * told.samples)
    found.append(_work("students answer the test", [rows], [told.sampling.max_tokens], *engine))
    return found


def _question(arm: Arm) -> tuple[object, ...]:
    """What tells a set of completions from another; log-probabilities of an answer come with it."""
    return arm.prompt.strategy, storage.content_key(identity.question(arm))


def _searched(experiment: Experiment) -> int:
    """How many times as much a search may ask of the teacher."""
    sweep = experiment.sweep
    axes = [axis for path, axis in sweep.space.items() if config.bears_on_the_teacher(path)] if sweep else []
    return math.prod(len(axis.values) or (sweep.num_samples if sweep else 1) for axis in axes)


def longest(arm: Arm) -> int:
    """Target tokens of a row at most."""
    limits = {"teacher": arm.teacher.sampling.max_tokens, "student": arm.targets.rollout.max_tokens}
    return min(limits.get(arm.targets.sequence, arm.train.max_length), arm.train.max_length)


def _work(
    what: str,
    rows: list[int | None],
    limits: list[int],
    mean: float | None,
    rate: float | None = None,
    processors: int = 0,
    kind: str = "gpu",
    price: float | None = None,
) -> Work:
    total = _sum(rows)
    tokens = None
    if total is not None:
        each = [min(limit, mean or limit) for limit in limits]
        tokens = float(sum((number or 0) * length for number, length in zip(rows, each, strict=True)))
    return Work(what, total, tokens, mean is None, rate, processors, kind, price)


def _times(number: int | None, factor: int) -> int | None:
    return None if number is None else number * factor


def _sum(numbers: list[int | None]) -> int | None:
    return None if any(each is None for each in numbers) else sum(each or 0 for each in numbers)
