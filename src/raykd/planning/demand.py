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

# Problems of GSM8K (Cobbe et al., arXiv 2110.14168; `openai/gsm8k` on the hub): train and test.
GSM8K_SIZES = (7473, 1319)
# Of a cluster of which nothing is told: what `accelerator: auto` finds there.
UNKNOWN_CLUSTER = MappingProxyType({"gpu": {"CPU": 1.0, "GPU": 1.0}, "cpu": {"CPU": 1.0}})

Group = tuple[Mapping[str, float], ...]
"""The bundles of one placement group."""


@dataclass(frozen=True)
class ResourceDemand:
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


def resource_demand(experiment: Experiment, cluster: Mapping[str, float] = UNKNOWN_CLUSTER["gpu"]) -> ResourceDemand:
    """What the stages of an experiment ask a cluster's autoscaler for.

    Args:
        experiment: the experiment.
        cluster: the cluster's resources as Ray names them, of which it matters whether there are GPUs, for `auto`.
    """
    arms = [experiment.arm(name) for name in experiment.arms]
    teacher, students, read = experiment.teacher, experiment.evaluate.engine, experiment.attention
    replica = _engine_group(teacher.engine, cluster)
    engine = _engine_group(students, cluster)
    trial = max((_trial_group(arm, cluster) for arm in arms), key=len)
    at_a_time = min(num_trials(experiment), experiment.max_concurrent_trials or num_trials(experiment))
    reader = ()
    if read:
        reader = (
            resources.process_bundle(resources.resolve_accelerator(read.accelerator, cluster), read.accelerator_type),
        )
    is_served = any(arm.needs_teacher for arm in arms) and not teacher.endpoint
    return ResourceDemand(
        generation=(replica,) * teacher.replicas.max if is_served else (),
        training=(trial,) * at_a_time,
        evaluation=(engine,),
        attention=(reader,) * read.num_workers if read else (),
    )


def _engine_group(engine: Engine, cluster: Mapping[str, float]) -> Group:
    return tuple(resources.engine_bundles(engine, resources.resolve_accelerator(engine.accelerator, cluster)))


def _trial_group(arm: Arm, cluster: Mapping[str, float]) -> Group:
    return tuple(resources.trial_bundles(arm.train, resources.resolve_accelerator(arm.train.accelerator, cluster)))


def max_points(experiment: Experiment) -> int:
    """At how many points of a sweep an arm is trained at most; 1 where there is no sweep."""
    sweep = experiment.sweep
    return sweep.num_samples * math.prod(len(axis.grid) or 1 for axis in sweep.space.values()) if sweep else 1


def num_trials(experiment: Experiment) -> int:
    """How many students are trained at most."""
    return len(experiment.arms) * max_points(experiment) * len(experiment.seeds)


def num_problems(told: Dataset) -> tuple[int | None, int | None]:
    """How many training and test problems there are; None where that is not known before they are read."""
    found: tuple[int | None, int | None] = (None, None)
    if told.source == "gsm8k":
        found = GSM8K_SIZES
    elif told.source == "jsonl":
        found = _num_lines(told.train_file), _num_lines(told.test_file)
    train = found[0] - told.num_validation if found[0] else None
    train = min(train, told.num_train) if train and told.num_train else train or told.num_train
    test = min(found[1], told.num_test) if found[1] and told.num_test else found[1] or told.num_test
    return train, test


def _num_lines(file: str | None) -> int | None:
    path = Path(file or "")
    return sum(bool(line.strip()) for line in path.open("rb")) if path.is_file() else None
