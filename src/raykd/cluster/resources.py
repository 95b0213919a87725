"""Placement bundles and resources of engines, trials and attention workers, checked against a cluster."""

from collections.abc import Iterable, Mapping
from typing import Literal

from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.engine import Engine
from raykd.config.experiment import Experiment
from raykd.config.sections import Attention, Teacher, Train
from raykd.errors import UserError

Accelerator = Literal["cpu", "gpu"]


def resolve_accelerator(wanted: Literal["auto", "cpu", "gpu"], cluster: Mapping[str, float]) -> Accelerator:
    """The accelerator that `auto` stands for: GPUs where the cluster has any.

    Args:
        wanted: the configuration's word.
        cluster: the cluster's resources as Ray names them.
    """
    if wanted == "auto":
        return "gpu" if cluster.get("GPU", 0) > 0 else "cpu"
    return wanted


def process_bundle(kind: Accelerator, accelerator_type: str | None) -> dict[str, float]:
    """What Ray is asked to give one process: a shard of an engine, or a worker."""
    if kind == "cpu":
        return {"CPU": 1}
    # A node has one of its kind, of which whoever wants to be there takes a little.
    return {"CPU": 1, "GPU": 1} | ({ACCELERATOR_TYPE_PREFIX + accelerator_type: 0.001} if accelerator_type else {})


def required_resources(kind: Accelerator, accelerator_type: str | None, processes: int = 1) -> dict[str, float]:
    """Return the resources of so many processes by the names of `capacity.current_resources`."""
    if kind == "cpu":
        return {"CPU": processes}
    names = ["CPU", "GPU"] + ([f"GPU:{accelerator_type}"] if accelerator_type else [])
    return dict.fromkeys(names, processes)


def engine_bundles(engine: Engine, kind: Accelerator) -> list[dict[str, float]]:
    """One placement bundle for each process of a sharded engine (tensor x pipeline parallel)."""
    return [process_bundle(kind, engine.accelerator_type)] * (
        engine.tensor_parallel_size * engine.pipeline_parallel_size
    )


def trial_bundles(train: Train, kind: Accelerator) -> list[dict[str, float]]:
    """One placement bundle for each worker of a trial."""
    return [process_bundle(kind, train.accelerator_type)] * train.num_workers


def max_concurrent_trials(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """How many trials the cluster holds at a time; one, too, where it holds the least of its workers only."""
    workers = int(max(0, min(cluster.get(name, 0) for name in required_resources(kind, train.accelerator_type))))
    return workers // train.num_workers or int(workers >= (train.min_workers or train.num_workers))


def check_trial(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> None:
    """Raises UserError where the cluster does not hold one trial, with what is missing."""
    for name, amount in required_resources(
        kind, train.accelerator_type, train.min_workers or train.num_workers
    ).items():
        if cluster.get(name, 0) < amount:
            raise UserError(
                f"a trial needs {amount:g} {name} (train.num_workers={train.num_workers}, "
                f"min_workers={train.min_workers}, {kind}), the cluster has {cluster.get(name, 0):g}"
                f"{_available_gpus(name, cluster)}; lower one of them or add nodes"
            )


def attention_workers(attention: Attention, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """How many students are read with at a time: as many as are asked for and the cluster holds.

    Raises:
        UserError: where it holds none.
    """
    needed = required_resources(kind, attention.accelerator_type)
    # One core stays for the pipeline.
    fit = int(min(cluster.get(name, 0) - (name == "CPU") for name in needed))
    if fit < 1:
        raise UserError(
            f"attention: a worker needs {', '.join(f'{amount:g} {name}' for name, amount in needed.items())} and the "
            f"pipeline one CPU, the cluster has {cluster.get('CPU', 0):g} CPU and {cluster.get('GPU', 0):g} GPU"
            f"{_available_gpus([*needed][-1], cluster)}; set attention.accelerator, add nodes, or leave it out by "
            "attention=null"
        )
    return min(fit, attention.num_workers)


def engine_resources(engine: Engine, kind: Accelerator, replicas: int = 1) -> dict[str, float]:
    """What so many replicas of an engine take."""
    return required_resources(kind, engine.accelerator_type, replicas * len(engine_bundles(engine, kind)))


def engine_processors(engine: Engine, cluster: Mapping[str, float], replicas: int = 1) -> tuple[Accelerator, int]:
    """What kind of processors so many replicas of an engine hold, and how many."""
    kind = resolve_accelerator(engine.accelerator, cluster)
    return kind, replicas * len(engine_bundles(engine, kind))


def teacher_processors(teacher: Teacher, cluster: Mapping[str, float]) -> tuple[Accelerator, int]:
    """What kind of processors the teacher holds, and how many at most; none where it is elsewhere."""
    if teacher.endpoint:
        return "cpu", 0
    return engine_processors(teacher.engine, cluster, teacher.replicas.max)


def fits_alongside_teacher(experiment: Experiment, trains: Iterable[Train], cluster: Mapping[str, float]) -> bool:
    """Whether the teacher can stay up while students answer and train beside it.

    Args:
        experiment: the experiment.
        trains: how its students are trained.
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
    # One core stays for the pipeline that feeds the engines.
    return all(free.get(name, 0) - (name == "CPU") >= amount for need in needs for name, amount in need.items())


def resources_beside_teacher(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """What a cluster has left while the teacher is served."""
    taken = teacher_resources(teacher, cluster)
    return {name: amount - taken.get(name, 0) for name, amount in cluster.items()}


def teacher_placement_groups(teacher: Teacher, cluster: Mapping[str, float]) -> list[list[dict[str, float]]]:
    """The placement groups of all replicas of the teacher; none where it is elsewhere."""
    if teacher.endpoint:
        return []
    return [
        engine_bundles(teacher.engine, resolve_accelerator(teacher.engine.accelerator, cluster))
    ] * teacher.replicas.max


def teacher_resources(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """What all replicas of the teacher take of a cluster; nothing where it is elsewhere."""
    if teacher.endpoint:
        return {}
    kind = resolve_accelerator(teacher.engine.accelerator, cluster)
    return engine_resources(teacher.engine, kind, teacher.replicas.max)


def check_engine(
    where: str, engine: Engine, kind: Accelerator, cluster: Mapping[str, float], replicas: int = 1
) -> None:
    """Raises UserError where the cluster cannot hold an engine and the pipeline that feeds it.

    Args:
        where: the section that the engine belongs to, for the message.
        engine: its configuration.
        kind: the accelerator it runs on.
        cluster: the cluster's resources as Ray names them.
        replicas: how many of it there are at least.
    """
    for name, amount in engine_resources(engine, kind, max(1, replicas)).items():
        # The pipeline that feeds it would wait for a core for ever.
        wanted = amount + (name == "CPU")
        if cluster.get(name, 0) < wanted:
            raise UserError(
                f"{where}: {max(1, replicas)} x {engine.tensor_parallel_size} x {engine.pipeline_parallel_size} shards "
                f"(replicas x tensor x pipeline parallel) need {wanted:g} {name} (one CPU is the pipeline's), the "
                f"cluster has {cluster.get(name, 0):g}{_available_gpus(name, cluster)}; lower one of them, or add nodes"
            )


def _available_gpus(name: str, cluster: Mapping[str, float]) -> str:
    """Which kinds of GPU there are, where one of them is missing, for a message."""
    kinds = ", ".join(f"{amount:g} {each}" for each, amount in cluster.items() if each.startswith("GPU:"))
    return f" ({kinds or 'no GPU whose kind is known'})" if name.startswith("GPU:") else ""
