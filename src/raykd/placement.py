"""Placement: what an experiment needs against what a cluster has."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from raykd.compat import ACCELERATOR_TYPE_PREFIX, ENGINE_START_TIMEOUT_ENV
from raykd.config import Experiment
from raykd.engine import Engine
from raykd.faults import UserError
from raykd.sections import Attention, Teacher, Train

Accelerator = Literal["cpu", "gpu"]
# Of an engine for which nothing else is said.
START_TIMEOUT_S = 3600


def accelerator(wanted: Literal["auto", "cpu", "gpu"], cluster: Mapping[str, float]) -> Accelerator:
    """The accelerator that `auto` stands for: GPUs where the cluster has any.

    Args:
        wanted: the configuration's word.
        cluster: the cluster's resources as Ray names them.
    """
    if wanted == "auto":
        return "gpu" if cluster.get("GPU", 0) > 0 else "cpu"
    return wanted


def processor(kind: Accelerator, accelerator_type: str | None) -> dict[str, float]:
    """What Ray is asked to give one process: a shard of an engine, or a worker."""
    if kind == "cpu":
        return {"CPU": 1}
    # A node has one of its kind, of which whoever wants to be there takes a little.
    return {"CPU": 1, "GPU": 1} | ({ACCELERATOR_TYPE_PREFIX + accelerator_type: 0.001} if accelerator_type else {})


def need(kind: Accelerator, accelerator_type: str | None, processes: int = 1) -> dict[str, float]:
    """What so many processes take of a cluster's resources (`raykd.cluster.live`), GPUs of a kind counted apart."""
    if kind == "cpu":
        return {"CPU": processes}
    names = ["CPU", "GPU"] + ([f"GPU:{accelerator_type}"] if accelerator_type else [])
    return dict.fromkeys(names, processes)


def engine_bundles(engine: Engine, kind: Accelerator) -> list[dict[str, float]]:
    """One placement bundle for each process of a sharded engine (tensor x pipeline parallel)."""
    return [processor(kind, engine.accelerator_type)] * (engine.tensor_parallel_size * engine.pipeline_parallel_size)


def engine_settings(
    engine: Engine, kind: Accelerator, start_timeout_s: float = START_TIMEOUT_S
) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's arguments and environment for an engine, with what a CPU needs added where it is not set.

    Args:
        engine: its configuration.
        kind: what it runs on.
        start_timeout_s: seconds that it may take to load.

    Returns:
        Engine arguments and environment variables.
    """
    kwargs = {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        # Sampling is what the experiment says; by default vLLM takes what it leaves open (top_k, a repetition penalty)
        # from the model's generation_config.json. The tokens that end an answer are read from there all the same.
        "generation_config": "vllm",
        # Never by pickle, which can hold code; by default vLLM takes that where there is nothing else.
        "load_format": "safetensors",
        # Nobody waits for the single answer: twice the sequences and tokens in a step that vLLM would take as a server.
        "performance_mode": "throughput",
    }
    timeout = str(math.ceil(start_timeout_s))
    env = {
        "VLLM_LOGGING_LEVEL": "INFO",
        # vLLM gives up after ten minutes by itself, in which hundreds of gigabytes are not always read.
        "VLLM_ENGINE_READY_TIMEOUT_S": timeout,
        ENGINE_START_TIMEOUT_ENV: timeout,
    }
    if kind == "cpu":
        kwargs["enforce_eager"] = True
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return kwargs | engine.engine_kwargs, env | engine.env


def worker_env(kind: Accelerator) -> dict[str, str]:
    """Environment of a training worker.

    For each shape of a matrix product, PyTorch and oneDNN keep what they prepared on a CPU, of the last 1,024 shapes
    each. Batches seldom have the same length twice, so that would grow to gigabytes and save nothing; a step has some
    thirty shapes.
    """
    if kind == "gpu":
        return {}
    return {"DS_ACCELERATOR": "cpu", "LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def trial_bundles(train: Train, kind: Accelerator) -> list[dict[str, float]]:
    """One placement bundle for each worker of a trial."""
    return [processor(kind, train.accelerator_type)] * train.num_workers


def room(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """How many trials the cluster holds at a time; one, too, where it holds the least of its workers only."""
    workers = int(max(0, min(cluster.get(name, 0) for name in need(kind, train.accelerator_type))))
    return workers // train.num_workers or int(workers >= (train.min_workers or train.num_workers))


def check_trial(train: Train, kind: Accelerator, cluster: Mapping[str, float]) -> None:
    """Raises UserError where the cluster does not hold one trial, with what is missing."""
    for name, amount in need(kind, train.accelerator_type, train.min_workers or train.num_workers).items():
        if cluster.get(name, 0) < amount:
            raise UserError(
                f"a trial needs {amount:g} {name} (train.num_workers={train.num_workers}, "
                f"min_workers={train.min_workers}, {kind}), the cluster has {cluster.get(name, 0):g}"
                f"{_other_kinds(name, cluster)}; lower one of them or add nodes"
            )


def attention_workers(attention: Attention, kind: Accelerator, cluster: Mapping[str, float]) -> int:
    """How many students are read with at a time: as many as are asked for and the cluster holds.

    Raises:
        UserError: where it holds none.
    """
    needed = need(kind, attention.accelerator_type)
    # One core stays for the pipeline.
    fit = int(min(cluster.get(name, 0) - (name == "CPU") for name in needed))
    if fit < 1:
        raise UserError(
            f"attention: a worker needs {', '.join(f'{amount:g} {name}' for name, amount in needed.items())} and the "
            f"pipeline one CPU, the cluster has {cluster.get('CPU', 0):g} CPU and {cluster.get('GPU', 0):g} GPU"
            f"{_other_kinds([*needed][-1], cluster)}; set attention.accelerator, add nodes, or leave it out by "
            "attention=null"
        )
    return min(fit, attention.num_workers)


def engine_resources(engine: Engine, kind: Accelerator, replicas: int = 1) -> dict[str, float]:
    """What so many replicas of an engine take."""
    return need(kind, engine.accelerator_type, replicas * len(engine_bundles(engine, kind)))


def engine_processors(engine: Engine, cluster: Mapping[str, float], replicas: int = 1) -> tuple[Accelerator, int]:
    """What kind of processors so many replicas of an engine hold, and how many."""
    kind = accelerator(engine.accelerator, cluster)
    return kind, replicas * len(engine_bundles(engine, kind))


def teacher_processors(teacher: Teacher, cluster: Mapping[str, float]) -> tuple[Accelerator, int]:
    """What kind of processors the teacher holds, and how many at most; none where it is elsewhere."""
    if teacher.endpoint:
        return "cpu", 0
    return engine_processors(teacher.engine, cluster, teacher.replicas.max)


def hold_together(experiment: Experiment, trains: Iterable[Train], cluster: Mapping[str, float]) -> bool:
    """Whether the teacher can stay up while students answer and train beside it.

    Args:
        experiment: the experiment.
        trains: how its students are trained.
        cluster: the cluster's resources as Ray names them.
    """
    free = beside_the_teacher(experiment.teacher, cluster)
    students = experiment.evaluate.engine
    needs = [engine_resources(students, accelerator(students.accelerator, cluster))]
    for train in trains:
        needs.append(need(accelerator(train.accelerator, cluster), train.accelerator_type, train.num_workers))
    # One core stays for the pipeline that feeds the engines.
    return all(free.get(name, 0) - (name == "CPU") >= amount for need in needs for name, amount in need.items())


def beside_the_teacher(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """What a cluster has left while the teacher is served."""
    taken = taken_by_the_teacher(teacher, cluster)
    return {name: amount - taken.get(name, 0) for name, amount in cluster.items()}


def teacher_groups(teacher: Teacher, cluster: Mapping[str, float]) -> list[list[dict[str, float]]]:
    """The placement groups of all replicas of the teacher; none where it is elsewhere."""
    if teacher.endpoint:
        return []
    return [engine_bundles(teacher.engine, accelerator(teacher.engine.accelerator, cluster))] * teacher.replicas.max


def taken_by_the_teacher(teacher: Teacher, cluster: Mapping[str, float]) -> dict[str, float]:
    """What all replicas of the teacher take of a cluster; nothing where it is elsewhere."""
    if teacher.endpoint:
        return {}
    kind = accelerator(teacher.engine.accelerator, cluster)
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
                f"cluster has {cluster.get(name, 0):g}{_other_kinds(name, cluster)}; lower one of them, or add nodes"
            )


def _other_kinds(name: str, cluster: Mapping[str, float]) -> str:
    """Which kinds of GPU there are, where one of them is missing, for a message."""
    kinds = ", ".join(f"{amount:g} {each}" for each, amount in cluster.items() if each.startswith("GPU:"))
    return f" ({kinds or 'no GPU whose kind is known'})" if name.startswith("GPU:") else ""
