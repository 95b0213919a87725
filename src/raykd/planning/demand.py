"""Resources that each stage requests from the cluster, and the number of problems and trials."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from raykd.cluster import resources
from raykd.config.engine import Engine
from raykd.config.experiment import Arm, Experiment
from raykd.config.sections import Dataset
from raykd.errors import UserError

# Training and test problems of GSM8K (Cobbe et al., arXiv 2110.14168; `openai/gsm8k` on the hub).
GSM8K_SIZES = (7473, 1319)
# Resources by which `accelerator: auto` is resolved without a cluster.
UNKNOWN_CLUSTER = MappingProxyType({"gpu": {"CPU": 1.0, "GPU": 1.0}, "cpu": {"CPU": 1.0}})

Group = tuple[Mapping[str, float], ...]
"""The bundles of one placement group."""


@dataclass(frozen=True)
class ResourceDemand:
    """Placement groups that each stage requests at most. Stages run one after another."""

    generation: tuple[Group, ...] = ()
    """One group for each of `teacher.replicas.max` replicas, with a bundle for each process."""
    training: tuple[Group, ...] = ()
    """One group for each concurrent trial, with a bundle for each worker."""
    evaluation: tuple[Group, ...] = ()
    """One group, for the student engine."""
    attention: tuple[Group, ...] = ()
    """One group for each attention worker."""

    def stages(self) -> dict[str, tuple[Group, ...]]:
        """Return the groups by stage, in the order of the stages."""
        return {name: getattr(self, name) for name in ("generation", "training", "evaluation", "attention")}


def resource_demand(experiment: Experiment, cluster: Mapping[str, float] = UNKNOWN_CLUSTER["gpu"]) -> ResourceDemand:
    """Return the placement groups that an experiment's stages request.

    Args:
        experiment: the experiment.
        cluster: the cluster's resources as Ray names them; `accelerator: auto` is `gpu` where it has GPUs.
    """
    arms = [experiment.arm(name) for name in experiment.arms]
    teacher, attention = experiment.teacher, experiment.attention
    replica = _engine_group(teacher.engine, cluster)
    engine = _engine_group(experiment.evaluate.engine, cluster)
    trial = max((_trial_group(arm, cluster) for arm in arms), key=len)
    concurrent_trials = min(num_trials(experiment), experiment.max_concurrent_trials or num_trials(experiment))
    attention_groups: tuple[Group, ...] = ()
    if attention:
        kind = resources.resolve_accelerator(attention.accelerator, cluster)
        worker = (resources.process_bundle(kind, attention.accelerator_type),)
        attention_groups = (worker,) * attention.num_workers
    is_served = any(arm.needs_teacher for arm in arms) and not teacher.endpoint
    return ResourceDemand(
        generation=(replica,) * teacher.replicas.max if is_served else (),
        training=(trial,) * concurrent_trials,
        evaluation=(engine,),
        attention=attention_groups,
    )


def _engine_group(engine: Engine, cluster: Mapping[str, float]) -> Group:
    return tuple(resources.engine_bundles(engine, resources.resolve_accelerator(engine.accelerator, cluster)))


def _trial_group(arm: Arm, cluster: Mapping[str, float]) -> Group:
    return tuple(resources.trial_bundles(arm.train, resources.resolve_accelerator(arm.train.accelerator, cluster)))


def max_points(experiment: Experiment) -> int:
    """Return the largest number of sweep points of an arm; 1 without a sweep."""
    sweep = experiment.sweep
    if sweep is None:
        return 1
    return sweep.num_samples * math.prod(len(axis.grid) or 1 for axis in sweep.space.values())


def num_trials(experiment: Experiment) -> int:
    """Return the largest number of trials."""
    return len(experiment.arms) * max_points(experiment) * len(experiment.seeds)


def num_problems(dataset: Dataset) -> tuple[int | None, int | None]:
    """Return the numbers of training and test problems; None where unknown before the dataset is read."""
    train: int | None = None
    test: int | None = None
    if dataset.source == "gsm8k":
        train, test = GSM8K_SIZES
    elif dataset.source == "jsonl":
        train, test = _num_lines(dataset.train_file), _num_lines(dataset.test_file)
    if train:
        train -= dataset.num_validation
    return _limited(train, dataset.num_train), _limited(test, dataset.num_test)


def _limited(available: int | None, limit: int | None) -> int | None:
    """Return the smaller of two numbers; the other one where one is unknown or zero."""
    if available and limit:
        return min(available, limit)
    return available or limit


def _num_lines(file: str | None) -> int | None:
    """Return the number of non-empty lines; None where the file is missing."""
    path = Path(file or "")
    return sum(bool(line.strip()) for line in path.open("rb")) if path.is_file() else None


def max_adapters(experiment: Experiment) -> tuple[int, int]:
    """Return the number of adapters that the student engine loads at a time, and their largest rank."""
    ranks = [arm.student.lora.r for arm in arms_at_bounds(experiment)]
    return min(experiment.evaluate.max_loras, num_trials(experiment)), max(ranks)


def arms_at_bounds(experiment: Experiment) -> list[Arm]:
    """Return each arm, and each with one swept field at either bound."""
    space = experiment.sweep.space if experiment.sweep else {}
    bounds = [{path: value} for path, axis in space.items() for value in axis.extremes]
    arms = []
    for name in experiment.arms:
        arms.append(experiment.arm(name))
        for point in bounds:
            try:
                arms.append(experiment.arm(name, point))
            except UserError:
                # The value may be valid together with other values of the arm's swept fields.
                continue
    return arms
