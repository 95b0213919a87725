"""Nearest: how else an engine may be sharded or a student trained, and the smallest change that fits."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from raykd import compat
from raykd.cluster import nodes, resources
from raykd.cluster.gpus import GPUS, Gpu
from raykd.cluster.nodes import ClusterSpec
from raykd.config.engine import Engine
from raykd.config.experiment import Arm
from raykd.config.sections import Train
from raykd.models.architecture import Quantization, Shape
from raykd.planning import memory
from raykd.planning.cost import max_target_tokens

# What a change counts. Of an engine: a factor of 2 in its tensor or pipeline parallel processes; such a group over the
# network, which is slow. Of either: a factor of 2 in the longest sequence, which changes what is done.
_SHARDS, _OVER_NODES, _LENGTH = 1.0, 0.9, 8.0
# Of training: checkpointing, which makes a forward pass anew; a factor of 2 in completions of a pass; and ZeRO stage 3,
# which sends the weights around.
_CHECKPOINTING, _MICRO_BATCH, _STAGE = 1.5, 1.0, 3.0
# Tokens below which no length is proposed.
MIN_LENGTH = 128
# GPUs of an engine, where nothing is said of a cluster.
MAX_GPUS = 64


def sharding_error(shape: Shape, engine: Engine) -> str:
    """Why vLLM refuses to split a model so; empty where it does not."""
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    if shape.heads % tensor:
        return f"{shape.heads} attention heads cannot be divided by tensor_parallel_size={tensor}"
    if shape.kv_heads % tensor and tensor % shape.kv_heads:
        return f"{shape.kv_heads} heads of keys and values and tensor_parallel_size={tensor}: neither divides the other"
    if shape.intermediate % tensor:
        return f"a feed-forward width of {shape.intermediate} cannot be divided by tensor_parallel_size={tensor}"
    quantization: Quantization = shape.quantization
    group = quantization.group_size
    if group and any((shape.heads * shape.head_dim // tensor % group, shape.intermediate // tensor % group)):
        return (
            f"groups of {group} weights that share a scale do not divide a width of {shape.intermediate} or "
            f"{shape.heads * shape.head_dim} over tensor_parallel_size={tensor}"
        )
    if shape.layers < pipeline:
        return f"{shape.layers} layers cannot be divided by pipeline_parallel_size={pipeline}"
    if (length := memory.model_length(shape, engine)) > shape.positions:
        return f"engine_kwargs.max_model_len={length} is above the {shape.positions} tokens that the model was made for"
    return ""


def gpus_for_engine(
    shape: Shape, told: Engine, loras: tuple[int, int], served: bool, gpus: Mapping[str, Gpu] = GPUS
) -> tuple[dict[str, int], list[str]]:
    """For each kind of GPU what the fullest process of an engine needs of it, and the kinds that hold it."""
    needs = {kind: memory.engine_memory(shape, told, gpu, loras, served) for kind, gpu in gpus.items()}
    holding = [kind for kind, gpu in gpus.items() if memory.holds_engine(gpu, shape, told, needs[kind])]
    return {kind: each.least for kind, each in needs.items()}, holding


def suggest_engine(
    stage: str,
    shape: Shape,
    told: Engine,
    bundle: Mapping[str, float],
    replicas: int,
    cluster: ClusterSpec | None,
    loras: tuple[int, int],
) -> str:
    """The overrides of the nearest layout of an engine that fits; empty where none does.

    Args:
        stage: whose engine it is, `teacher` or `evaluate`.
        shape: the model's.
        told: the engine's section.
        bundle: what each of its processes asks for.
        replicas: how many of it there are at least.
        cluster: what there is; None for any number of any GPU.
        loras: how many adapters it holds, and the largest rank.
    """
    gpus = {gpu.kind: gpu for each in cluster.nodes if (gpu := each.gpu)} if cluster else GPUS
    best, cost = "", math.inf
    for change, overrides, changed in sorted(_layouts(stage, shape, told, cluster, replicas), key=_preference):
        if change >= cost:
            break
        if sharding_error(shape, changed):
            continue
        _, holding = gpus_for_engine(shape, changed, loras, stage == "teacher", gpus)
        if cluster:
            group = (bundle,) * (changed.tensor_parallel_size * changed.pipeline_parallel_size)
            placed = nodes.place([group] * replicas, cluster, holding)
            if len(placed) < replicas:
                continue
            change += _OVER_NODES * any(each.splits(changed.tensor_parallel_size) for each in placed)
            named = accelerator_type_override(f"{stage}.engine", [group] * replicas, cluster, holding)
            if named is None or not has_pipeline_core([group] * replicas, cluster):
                continue
            overrides = " ".join([overrides, *named]).strip()
        if holding and change < cost:
            best, cost = overrides, change
    return best


def _preference(way: tuple[float, str, Engine]) -> tuple[float, int]:
    """The smaller change comes first, and of two that are alike the one with fewer stages that wait for each other."""
    return way[0], way[2].pipeline_parallel_size


def _layouts(
    stage: str, shape: Shape, told: Engine, cluster: ClusterSpec | None, replicas: int
) -> Iterator[tuple[float, str, Engine]]:
    """Other layouts of an engine: what each counts, its overrides, and the section."""
    most = (int(cluster.resources.get("GPU", 0)) if cluster else MAX_GPUS) // replicas
    own = (told.tensor_parallel_size, told.pipeline_parallel_size)
    length = memory.model_length(shape, told)
    tensors = [size for size in range(1, most + 1) if shape.heads % size == 0]
    pipelines, prefix = range(1, min(most, shape.layers) + 1), f"{stage}.engine"
    for tensor, pipeline, halved in itertools.product(tensors, pipelines, range(8)):
        shorter = min(length, shape.positions) >> halved
        if tensor * pipeline > most or shorter < MIN_LENGTH:
            continue
        kwargs = told.engine_kwargs | ({"max_model_len": shorter} if shorter != length else {})
        values = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        changed = [f"{prefix}.{name}={value}" for name, value in values.items() if value != getattr(told, name)]
        changed += [f"{prefix}.engine_kwargs.max_model_len={shorter}"] * (shorter != length)
        change = _SHARDS * (abs(math.log2(tensor / own[0])) + abs(math.log2(pipeline / own[1]))) + _LENGTH * halved
        yield change, " ".join(changed), told.model_copy(update={**values, "engine_kwargs": kwargs})


def worker_bytes(student: Shape, arm: Arm, on_gpu: bool) -> int:
    """Bytes that a training worker of an arm needs at its peak."""
    return memory.worker_memory(student, arm.student.lora, arm.train, max_target_tokens(arm), on_gpu).total


def accelerator_type_override(
    section: str, groups: Sequence[Sequence[nodes.Bundle]], cluster: ClusterSpec, holding: Sequence[str]
) -> list[str] | None:
    """The override by which a stage keeps to GPUs that hold it, where it names no kind and others would take it too.

    Which of them it comes to lie on is Ray's choice, and an autoscaler brings the cheaper ones first.

    Returns:
        none where it need not name one; None where it has to, and there is not room for it on any one kind.
    """
    bundle = groups[0][0]
    there = [gpu.kind for each in nodes.feasible_nodes(cluster, bundle).nodes if (gpu := each.gpu)]
    good = [kind for kind in there if kind in holding]
    if len(good) == len(there) or any(name.startswith(compat.ACCELERATOR_TYPE_PREFIX) for name in bundle):
        return []
    for kind in dict.fromkeys(good):
        told = {**bundle, **resources.process_bundle("gpu", kind)}
        if len(nodes.place([[told] * len(group) for group in groups], cluster)) == len(groups):
            return [f"{section}.accelerator_type={kind}"]
    return None


def has_pipeline_core(groups: Sequence[Sequence[nodes.Bundle]], cluster: ClusterSpec) -> bool:
    """Whether a core is left beside an engine, without which the pipeline that feeds it would wait for ever."""
    return len(nodes.place([*groups, ({"CPU": 1.0},)], cluster)) > len(groups)


def suggest_training(student: Shape, arm: Arm, cluster: ClusterSpec | None) -> str:
    """The overrides of the nearest way of training that fits; empty where none does, or it fits as it is.

    Args:
        student: the model's shape.
        arm: whose workers.
        cluster: what there is; None for any GPU.
    """
    gpus = {gpu.kind: gpu for each in cluster.nodes if (gpu := each.gpu)} if cluster else GPUS
    group = resources.trial_bundles(arm.train, "gpu")[: arm.train.min_workers or arm.train.num_workers]
    best, least = "", math.inf
    for cost, told, train in _training_options(arm.train):
        if cost >= least:
            continue
        needs = worker_bytes(student, arm.model_copy(update={"train": train}), True)
        holding = [kind for kind, gpu in gpus.items() if memory.holds_worker(gpu, needs, train)]
        if not holding or (cluster and not nodes.place([group], cluster, holding)):
            continue
        named = accelerator_type_override("train", [group], cluster, holding) if cluster else []
        if named is not None:
            best, least = " ".join([told, *named]).strip(), cost
    return best


def suggest_num_workers(student: Shape, arm: Arm, cluster: ClusterSpec) -> str:
    """The most workers that there is room for and the batch can be divided by; empty where none fit."""
    train = arm.train
    for number in range(train.num_workers - 1, 0, -1):
        fewer = train.model_copy(update={"num_workers": number, "min_workers": None})
        changed = arm.model_copy(update={"train": fewer})
        group = resources.trial_bundles(fewer, "gpu")
        if train.batch_size % number or not nodes.place([group], cluster):
            continue
        told = [f"train.num_workers={number}", *["train.min_workers=null"] * (train.min_workers is not None)]
        if further := suggest_training(student, changed, cluster):
            return " ".join([*told, further])
        needs = worker_bytes(student, changed, True)
        gpus = [gpu for each in cluster.nodes if (gpu := each.gpu)]
        holding = [gpu.kind for gpu in gpus if memory.holds_worker(gpu, needs, fewer)]
        if nodes.place([group], cluster, holding):
            return " ".join(told)
    return ""


def _training_options(train: Train) -> Iterator[tuple[float, str, Train]]:
    """Other ways of training: what each counts, its overrides, and what it is."""
    rows = math.ceil(train.batch_size / train.num_workers)
    halved = [size for power in range(8) if (size := min(train.micro_batch_size, rows) >> power) and not rows % size]
    lengths = [train.max_length >> power for power in range(8) if train.max_length >> power >= MIN_LENGTH]
    stages = [train.zero_stage, *[3] * (train.num_workers > 1 and train.zero_stage < 3 and not train.min_workers)]
    checkpointing = [train.gradient_checkpointing, *[True] * (not train.gradient_checkpointing)]
    for stage, again, micro, length in itertools.product(stages, checkpointing, halved, lengths or [train.max_length]):
        told = {
            "gradient_checkpointing": again,
            "micro_batch_size": micro,
            "zero_stage": stage,
            "max_length": length,
        }
        changed = {name: value for name, value in told.items() if value != getattr(train, name)}
        cost = _CHECKPOINTING * ("gradient_checkpointing" in changed) + _STAGE * ("zero_stage" in changed)
        cost += _MICRO_BATCH * math.log2(halved[0] / micro) + _LENGTH * math.log2(train.max_length / length)
        shown = " ".join(f"train.{name}={str(value).lower()}" for name, value in changed.items())
        yield cost, shown, train.model_copy(update=changed)
