"""Placement bundles and resources of engines, trials and attention workers, checked against a cluster."""

from collections.abc import Iterable, Mapping
from typing import Literal

from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.engine import Engine
from raykd.config.experiment import Experiment
from raykd.config.sections import Attention, Teacher
from raykd.config.training import Train
from raykd.errors import UserError

Accelerator = Literal["cpu", "gpu"]
PIPELINE = {"CPU": 1}
"""Resources of Ray Data's tasks, beside the engines or workers that they feed."""


def resolve_accelerator(wanted: Literal["auto", "cpu", "gpu"], cluster: Mapping[str, float]) -> Accelerator:
    """Return the accelerator of a stage; `auto` is `gpu` where the cluster has GPUs.

    Args:
        wanted: value of the configuration.
        cluster: the cluster's resources as Ray names them.
    """
    if wanted == "auto":
        return "gpu" if cluster.get("GPU", 0) > 0 else "cpu"
    return wanted


def process_bundle(kind: Accelerator, accelerator_type: str | None) -> dict[str, float]:
    """Return the placement bundle of one process: a shard of an engine, or a training worker."""
    if kind == "cpu":
        return {"CPU": 1}
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1}
    if accelerator_type:
        # Every node with such GPUs has 1.0 of this resource; a little of it ties a process to such a node.
        bundle[ACCELERATOR_TYPE_PREFIX + accelerator_type] = 0.001
    return bundle


def required_resources(kind: Accelerator, accelerator_type: str | None, processes: int = 1) -> dict[str, float]:
    """Return the resources of a number of processes, named as in `capacity.current_resources`."""
    if kind == "cpu":
        return {"CPU": processes}
    names = ["CPU", "GPU"]
    if accelerator_type:
        names.append(f"GPU:{accelerator_type}")
    return dict.fromkeys(names, processes)


def engine_bundles(engine: Engine, kind: Accelerator) -> list[dict[str, float]]:
    """Return the placement bundles of one replica, one for each process (tensor x pipeline parallel)."""
    return [process_bundle(kind, engine.accelerator_type)] * (
        engine.tensor_parallel_size * engine.pipeline_parallel_size
    )


def trial_bundles(train: Train, kind: Accelerator) -> list[dict[str, float]]:
    """Return the placement bundles of a trial, one for each worker."""
    return [process_bundle(kind, train.accelerator_type)] * train.num_workers


def max_concurrent_trials(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """Return how many trials the cluster holds at a time; 1 also where only `min_workers` fit."""
    workers = int(max(0, min(cluster.get(name, 0) for name in required_resources(kind, train.accelerator_type))))
    return workers // train.num_workers or int(workers >= (train.min_workers or train.num_workers))


def check_trial(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> None:
    """Check that the cluster holds one trial.

    Raises:
        UserError: where it does not, with the missing resource.
    """
    for name, amount in required_resources(
        kind, train.accelerator_type, train.min_workers or train.num_workers
    ).items():
        if cluster.get(name, 0) < amount:
            raise UserError(
                f"train: a trial needs {amount:g} {name} (num_workers={train.num_workers}, "
                f"min_workers={train.min_workers}, {kind}), the cluster has {cluster.get(name, 0):g}"
                f"{_available_gpus(name, cluster)}; lower train.num_workers or train.min_workers, or add nodes"
            )


def attention_workers(attention: Attention, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """Return how many attention workers run at a time: `attention.num_workers`, or as many as the cluster holds.

    Raises:
        UserError: where the cluster holds none.
    """
    needed = required_resources(kind, attention.accelerator_type)
    # The pipeline that feeds the workers takes one core.
    num_fitting = int(min(cluster.get(name, 0) - PIPELINE.get(name, 0) for name in needed))
    if num_fitting < 1:
        raise UserError(
            f"attention: a worker needs {', '.join(f'{amount:g} {name}' for name, amount in needed.items())} and the "
            f"pipeline 1 CPU, the cluster has {cluster.get('CPU', 0):g} CPU and {cluster.get('GPU', 0):g} GPU"
            f"{_available_gpus([*needed][-1], cluster)}; set attention.accelerator, add nodes, or skip it with "
            "attention=null"
        )
    return min(num_fitting, attention.num_workers)


def engine_resources(engine: Engine, kind: Accelerator, replicas: int = 1) -> dict[str, float]:
    """Return the resources of an engine's replicas."""
    return required_resources(kind, engine.accelerator_type, replicas * len(engine_bundles(engine, kind)))


def engine_processors(engine: Engine, cluster: Mapping[str, float], replicas: int = 1) -> tuple[Accelerator, int]:
    """Return the kind and number of processors that an engine's replicas hold."""
    kind = resolve_accelerator(engine.accelerator, cluster)
    return kind, replicas * len(engine_bundles(engine, kind))


def teacher_processors(teacher: Teacher, cluster: Mapping[str, float]) -> tuple[Accelerator, int]:
    """Return the kind and largest number of processors of the teacher; 0 for an external endpoint."""
    if teacher.endpoint:
        return "cpu", 0
    return engine_processors(teacher.engine, cluster, teacher.replicas.max)


def fits_alongside_teacher(experiment: Experiment, trains: Iterable[Train], cluster: Mapping[str, float]) -> bool:
    """Return whether the cluster holds the teacher and, beside it, either the student engine or a trial.

    Args:
        experiment: the experiment.
        trains: training configurations of its trials.
        cluster: the cluster's resources as Ray names them.
    """
    free = resources_beside_teacher(experiment.teacher, cluster)
    students = experiment.evaluate.engine
    needs = [engine_resources(students, resolve_accelerator(students.accelerator, cluster))]
    for train in trains:
        needs.append(
            required_resources(
                resolve_accelerator(train.accelerator, cluster), train.accelerator_type, train.num_workers
            )
        )
    # The pipeline that feeds the engines takes one core.
    return all(free.get(name, 0) - PIPELINE.get(name, 0) >= amount for need in needs for name, amount in need.items())


def resources_beside_teacher(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """Return the resources that the served teacher leaves free."""
    used = teacher_resources(teacher, cluster)
    return {name: amount - used.get(name, 0) for name, amount in cluster.items()}


def teacher_placement_groups(teacher: Teacher, cluster: Mapping[str, float]) -> list[list[dict[str, float]]]:
    """Return the placement groups of all teacher replicas; empty for an external endpoint."""
    if teacher.endpoint:
        return []
    return [
        engine_bundles(teacher.engine, resolve_accelerator(teacher.engine.accelerator, cluster))
    ] * teacher.replicas.max


def teacher_resources(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """Return the resources of all teacher replicas; empty for an external endpoint."""
    if teacher.endpoint:
        return {}
    kind = resolve_accelerator(teacher.engine.accelerator, cluster)
    return engine_resources(teacher.engine, kind, teacher.replicas.max)


def check_engine(
    section: str, engine: Engine, kind: Accelerator, cluster: Mapping[str, float], replicas: int = 1
) -> None:
    """Check that the cluster holds an engine and the pipeline that feeds it.

    Args:
        section: configuration path of the engine, for the message.
        engine: the engine's configuration.
        kind: accelerator that the engine runs on.
        cluster: the cluster's resources as Ray names them.
        replicas: least number of replicas.

    Raises:
        UserError: where the cluster does not hold them, with the missing resource.
    """
    for name, amount in engine_resources(engine, kind, max(1, replicas)).items():
        # Without a core of its own, the pipeline would never start.
        required = amount + PIPELINE.get(name, 0)
        if cluster.get(name, 0) < required:
            raise UserError(
                f"{section}: {max(1, replicas)} x {engine.tensor_parallel_size} x {engine.pipeline_parallel_size} "
                f"processes (replicas x tensor x pipeline) need {required:g} {name} (1 CPU for the pipeline), the "
                f"cluster has {cluster.get(name, 0):g}{_available_gpus(name, cluster)}; lower one of them or add nodes"
            )


def _available_gpus(name: str, cluster: Mapping[str, float]) -> str:
    """Return the cluster's GPUs by type, for a message about a missing type of GPU; empty for other resources."""
    if not name.startswith("GPU:"):
        return ""
    gpus = ", ".join(f"{amount:g} {resource}" for resource, amount in cluster.items() if resource.startswith("GPU:"))
    return f" ({gpus or 'no GPU of a known type'})"
