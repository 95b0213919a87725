"""Closest configuration that fits: other shardings of an engine, and other ways to train a student."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raykd import compat
from raykd.cluster import nodes, resources
from raykd.cluster.gpus import GPUS, Gpu
from raykd.cluster.nodes import ClusterSpec
from raykd.config.engine import Engine
from raykd.config.experiment import Arm
from raykd.config.training import Train
from raykd.models.architecture import Quantization, Shape
from raykd.planning import memory
from raykd.planning.cost import max_target_tokens

# Weights of changes; the suggestion is the feasible configuration with the smallest sum.
# Engines: a factor of 2 in tensor or pipeline parallel size; a tensor parallel group over the (slow) network.
_RESHARDING, _TENSOR_PARALLEL_OVER_NODES = 1.0, 0.9
# Engines and training: a factor of 2 in the longest sequence, which changes the results.
_SHORTER_SEQUENCES = 8.0
# Training: checkpointing repeats the forward pass; a factor of 2 in the micro-batch; ZeRO stage 3 sends the weights
# over the network.
_CHECKPOINTING, _SMALLER_MICRO_BATCH, _ZERO3 = 1.5, 1.0, 3.0
# Shortest sequence that is suggested, in tokens.
MIN_LENGTH = 128
# Largest number of GPUs of an engine without a cluster.
MAX_GPUS = 64


def sharding_error(shape: Shape, engine: Engine) -> str:
    """Return why vLLM rejects the sharding or length of a model; empty where it accepts them."""
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    if shape.heads % tensor:
        return f"{shape.heads} attention heads cannot be divided by tensor_parallel_size={tensor}"
    if shape.kv_heads % tensor and tensor % shape.kv_heads:
        return f"{shape.kv_heads} KV heads and tensor_parallel_size={tensor}: neither divides the other"
    if shape.intermediate % tensor:
        return f"intermediate_size={shape.intermediate} cannot be divided by tensor_parallel_size={tensor}"
    quantization: Quantization = shape.quantization
    group = quantization.group_size
    if group and any((shape.heads * shape.head_dim // tensor % group, shape.intermediate // tensor % group)):
        return (
            f"quantization groups of {group} weights do not divide a width of {shape.intermediate} or "
            f"{shape.heads * shape.head_dim} over tensor_parallel_size={tensor}"
        )
    if shape.layers < pipeline:
        return f"{shape.layers} layers cannot be divided by pipeline_parallel_size={pipeline}"
    if (length := memory.model_length(shape, engine)) > shape.positions:
        return f"engine_kwargs.max_model_len={length} is above the model's maximum of {shape.positions} tokens"
    return ""


def gpus_for_engine(
    shape: Shape, engine: Engine, adapters: tuple[int, int], served: bool, gpus: Mapping[str, Gpu] = GPUS
) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of an engine's fullest process on each type of GPU, and the types that hold it.

    Args:
        shape: the model's shape.
        engine: the engine's configuration.
        adapters: number of LoRA adapters, and their largest rank.
        served: whether Ray Serve runs the engine, rather than Ray Data.
        gpus: candidates by name.
    """
    needs = {name: memory.engine_memory(shape, engine, gpu, adapters, served) for name, gpu in gpus.items()}
    feasible = [name for name, gpu in gpus.items() if memory.holds_engine(gpu, shape, engine, needs[name])]
    return {name: engine_memory.min_gpu_bytes for name, engine_memory in needs.items()}, feasible


@dataclass(frozen=True)
class _EngineOption:
    """Another layout of an engine."""

    penalty: float
    overrides: str
    engine: Engine

    @property
    def preference(self) -> tuple[float, int]:
        """Sort key: the smaller change, then the fewer pipeline stages, which wait for each other."""
        return self.penalty, self.engine.pipeline_parallel_size


@dataclass(frozen=True)
class _TrainingOption:
    """Another way to train."""

    penalty: float
    overrides: str
    train: Train


def suggest_engine(
    stage: str,
    shape: Shape,
    engine: Engine,
    bundle: Mapping[str, float],
    replicas: int,
    cluster: ClusterSpec | None,
    adapters: tuple[int, int],
) -> str:
    """Return the overrides of an engine's closest layout that fits; empty where none fits.

    Args:
        stage: section of the engine, `teacher` or `evaluate`.
        shape: the model's shape.
        engine: the engine's configuration.
        bundle: placement bundle of one process.
        replicas: least number of replicas.
        cluster: nodes of the cluster; None for any number of any GPU.
        adapters: number of LoRA adapters, and their largest rank.
    """
    gpus = _gpus_of(cluster)
    best, least_penalty = "", math.inf
    options = _engine_options(stage, shape, engine, cluster, replicas)
    for option in sorted(options, key=lambda option: option.preference):
        penalty, overrides = option.penalty, option.overrides
        if penalty >= least_penalty:
            break
        if sharding_error(shape, option.engine):
            continue
        _, feasible = gpus_for_engine(shape, option.engine, adapters, stage == "teacher", gpus)
        if cluster:
            tensor = option.engine.tensor_parallel_size
            groups = [(bundle,) * (tensor * option.engine.pipeline_parallel_size)] * replicas
            placements = nodes.place(groups, cluster, feasible)
            if len(placements) < replicas:
                continue
            if any(placement.splits(tensor) for placement in placements):
                penalty += _TENSOR_PARALLEL_OVER_NODES
            gpu_override = accelerator_type_override(f"{stage}.engine", groups, cluster, feasible)
            if gpu_override is None or not has_pipeline_core(groups, cluster):
                continue
            overrides = " ".join([overrides, *gpu_override]).strip()
        if feasible and penalty < least_penalty:
            best, least_penalty = overrides, penalty
    return best


def _gpus_of(cluster: ClusterSpec | None) -> Mapping[str, Gpu]:
    """Return the types of GPU of a cluster; all known ones without a cluster."""
    if cluster is None:
        return GPUS
    return {gpu.kind: gpu for group in cluster.nodes if (gpu := group.gpu)}


def _engine_options(
    stage: str, shape: Shape, engine: Engine, cluster: ClusterSpec | None, replicas: int
) -> Iterator[_EngineOption]:
    num_gpus = int(cluster.resources.get("GPU", 0)) if cluster else MAX_GPUS
    max_processes = num_gpus // replicas
    length = memory.model_length(shape, engine)
    tensor_sizes = [size for size in range(1, max_processes + 1) if shape.heads % size == 0]
    pipeline_sizes = range(1, min(max_processes, shape.layers) + 1)
    section = f"{stage}.engine"
    for tensor, pipeline, halvings in itertools.product(tensor_sizes, pipeline_sizes, range(8)):
        shorter = min(length, shape.positions) >> halvings
        if tensor * pipeline > max_processes or shorter < MIN_LENGTH:
            continue
        sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        overrides = [f"{section}.{name}={size}" for name, size in sizes.items() if size != getattr(engine, name)]
        engine_kwargs = dict(engine.engine_kwargs)
        if shorter != length:
            engine_kwargs["max_model_len"] = shorter
            overrides.append(f"{section}.engine_kwargs.max_model_len={shorter}")
        factors = (tensor / engine.tensor_parallel_size, pipeline / engine.pipeline_parallel_size)
        penalty = _RESHARDING * sum(abs(math.log2(factor)) for factor in factors) + _SHORTER_SEQUENCES * halvings
        changed = engine.model_copy(update={**sizes, "engine_kwargs": engine_kwargs})
        yield _EngineOption(penalty, " ".join(overrides), changed)


def worker_bytes(student: Shape, arm: Arm, on_gpu: bool) -> int:
    """Return the peak memory of a training worker of an arm, in bytes."""
    return memory.worker_memory(student, arm.student.lora, arm.train, max_target_tokens(arm), on_gpu).total


def accelerator_type_override(
    section: str, groups: Sequence[Sequence[nodes.Bundle]], cluster: ClusterSpec, feasible: Sequence[str]
) -> list[str] | None:
    """Return the override that restricts a stage to GPUs that hold it, where Ray could place it on others.

    Ray chooses the nodes, and its autoscaler adds cheap ones first.

    Args:
        section: configuration path of the stage.
        groups: its placement groups.
        cluster: nodes of the cluster.
        feasible: types of GPU that hold a process.

    Returns:
        An empty list where no override is needed; None where one is needed, and no single type has enough GPUs.
    """
    bundle = groups[0][0]
    candidates = [gpu.kind for group in nodes.feasible_nodes(cluster, bundle).nodes if (gpu := group.gpu)]
    suitable = [gpu for gpu in candidates if gpu in feasible]
    has_type = any(name.startswith(compat.ACCELERATOR_TYPE_PREFIX) for name in bundle)
    if has_type or len(suitable) == len(candidates):
        return []
    for gpu in dict.fromkeys(suitable):
        typed_bundle = {**bundle, **resources.process_bundle("gpu", gpu)}
        typed_groups = [[typed_bundle] * len(group) for group in groups]
        if len(nodes.place(typed_groups, cluster)) == len(groups):
            return [f"{section}.accelerator_type={gpu}"]
    return None


def has_pipeline_core(groups: Sequence[Sequence[nodes.Bundle]], cluster: ClusterSpec) -> bool:
    """Return whether a CPU core is left beside an engine, for the Ray Data pipeline that feeds it."""
    return len(nodes.place([*groups, ({"CPU": 1.0},)], cluster)) > len(groups)


def suggest_training(student: Shape, arm: Arm, cluster: ClusterSpec | None) -> str:
    """Return the overrides of the closest way to train that fits; empty where none fits, or no change is needed.

    Args:
        student: the student's shape.
        arm: the arm.
        cluster: nodes of the cluster; None for any GPU.
    """
    gpus = _gpus_of(cluster)
    group = resources.trial_bundles(arm.train, "gpu")[: arm.train.min_workers or arm.train.num_workers]
    best, least_penalty = "", math.inf
    for option in _training_options(arm.train):
        if option.penalty >= least_penalty:
            continue
        required_bytes = worker_bytes(student, arm.model_copy(update={"train": option.train}), on_gpu=True)
        feasible = [name for name, gpu in gpus.items() if memory.holds_worker(gpu, required_bytes, option.train)]
        if not feasible or (cluster and not nodes.place([group], cluster, feasible)):
            continue
        gpu_override = accelerator_type_override("train", [group], cluster, feasible) if cluster else []
        if gpu_override is not None:
            best, least_penalty = " ".join([option.overrides, *gpu_override]).strip(), option.penalty
    return best


def suggest_num_workers(student: Shape, arm: Arm, cluster: ClusterSpec) -> str:
    """Return overrides with the most workers that fit and divide the batch; empty where none fits."""
    train = arm.train
    for num_workers in range(train.num_workers - 1, 0, -1):
        fewer = train.model_copy(update={"num_workers": num_workers, "min_workers": None})
        group = resources.trial_bundles(fewer, "gpu")
        if train.batch_size % num_workers or not nodes.place([group], cluster):
            continue
        changed_arm = arm.model_copy(update={"train": fewer})
        overrides = [f"train.num_workers={num_workers}"]
        if train.min_workers is not None:
            overrides.append("train.min_workers=null")
        if further := suggest_training(student, changed_arm, cluster):
            return " ".join([*overrides, further])
        required_bytes = worker_bytes(student, changed_arm, on_gpu=True)
        gpus = _gpus_of(cluster).values()
        feasible = [gpu.kind for gpu in gpus if memory.holds_worker(gpu, required_bytes, fewer)]
        if nodes.place([group], cluster, feasible):
            return " ".join(overrides)
    return ""


def _training_options(train: Train) -> Iterator[_TrainingOption]:
    rows = math.ceil(train.batch_size / train.num_workers)
    largest = min(train.micro_batch_size, rows)
    micro_batches = [size for power in range(8) if (size := largest >> power) and not rows % size]
    lengths = [train.max_length >> power for power in range(8) if train.max_length >> power >= MIN_LENGTH]
    stages = [train.zero_stage]
    if train.num_workers > 1 and train.zero_stage < 3 and not train.min_workers:
        stages.append(3)
    checkpointing = [train.gradient_checkpointing]
    if not train.gradient_checkpointing:
        checkpointing.append(True)
    for stage, is_checkpointing, micro_batch, length in itertools.product(
        stages, checkpointing, micro_batches, lengths or [train.max_length]
    ):
        values: dict[str, Any] = {
            "gradient_checkpointing": is_checkpointing,
            "micro_batch_size": micro_batch,
            "zero_stage": stage,
            "max_length": length,
        }
        changes = {name: value for name, value in values.items() if value != getattr(train, name)}
        penalty = _SMALLER_MICRO_BATCH * math.log2(micro_batches[0] / micro_batch)
        penalty += _SHORTER_SEQUENCES * math.log2(train.max_length / length)
        if "gradient_checkpointing" in changes:
            penalty += _CHECKPOINTING
        if "zero_stage" in changes:
            penalty += _ZERO3
        overrides = " ".join(f"train.{name}={str(value).lower()}" for name, value in changes.items())
        yield _TrainingOption(penalty, overrides, train.model_copy(update=changes))
