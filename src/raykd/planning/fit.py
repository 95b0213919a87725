"""Fitting: whether the stages of an experiment fit into a cluster, and why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raykd.cluster import nodes
from raykd.cluster.gpus import GIB, GPUS, Gpu
from raykd.cluster.nodes import ClusterSpec, Placement
from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.engine import Engine
from raykd.config.experiment import Arm, Experiment
from raykd.config.overrides import flatten
from raykd.errors import UserError
from raykd.models.architecture import Shape
from raykd.planning import demand, memory, suggest


@dataclass(frozen=True)
class Fit:
    """How a stage lies on a cluster, or why it does not."""

    stage: str
    layout: str
    """What it asks for, in words."""
    needs: int | None
    """Bytes of its fullest process on the kind of GPU that it may be on, the least of all; None where not known."""
    kinds: tuple[str, ...] = ()
    """Kinds of GPUs that hold a process."""
    placed: tuple[Placement, ...] = ()
    wanted: int = 1
    """How many placement groups it asks for at most."""
    problem: str = ""
    """Why it cannot run; empty where it can."""
    remedy: str = ""
    """The nearest that fits, as overrides; empty where nothing was found."""
    notes: tuple[str, ...] = field(default=())


def refusal_message(fits: Sequence[Fit]) -> str:
    """Why an experiment cannot run, and the way out; empty where it can."""
    told = []
    for each in fits:
        if each.problem:
            way = f"nearest that fits: {each.remedy}" if each.remedy else "no other layout of it fits here"
            told.append(f"{each.stage}: {each.problem}; {way}")
    return ". ".join(told)


def fit_stages(
    experiment: Experiment,
    teacher: Shape | None,
    student: Shape | None,
    cluster: ClusterSpec | None = None,
    accelerator: str = "gpu",
) -> list[Fit]:
    """Whether each stage fits, by itself: they follow one another.

    Args:
        experiment: the experiment.
        teacher: the teacher's shape; None where it is not known, and then nothing is said of its memory.
        student: the student's.
        cluster: what there is; None for any that is large enough.
        accelerator: what `auto` is where nothing is told of the cluster.
    """
    resources = cluster.resources if cluster else demand.UNKNOWN_CLUSTER[accelerator]
    asked = demand.resource_demand(experiment, resources)
    found = []
    if asked.generation:
        told = experiment.teacher
        found.append(_engine_fit("teacher", told.engine, teacher, asked.generation, told.replicas.min, cluster))
    found.append(_training_fit(experiment, student, asked.training, cluster))
    engine = experiment.evaluate.engine
    found.append(_engine_fit("evaluate", engine, student, asked.evaluation, 1, cluster, max_adapters(experiment)))
    if asked.attention:
        found.append(_attention_fit(experiment, student, asked.attention, cluster))
    return found


def max_adapters(experiment: Experiment) -> tuple[int, int]:
    """How many adapters the engine of the students holds at a time, and the largest rank."""
    ranks = [arm.student.lora.r for arm in arms_at_bounds(experiment)]
    return min(experiment.evaluate.max_loras, demand.num_trials(experiment)), max(ranks)


def arms_at_bounds(experiment: Experiment) -> list[Arm]:
    """The arms, and each with a single field of the sweep at its ends."""
    space = experiment.sweep.space if experiment.sweep else {}
    ends = [{path: value} for path, axis in space.items() for value in axis.extremes]
    found = []
    for name in experiment.arms:
        found.append(experiment.arm(name))
        for point in ends:
            try:
                found.append(experiment.arm(name, point))
            except UserError:
                # What does not go with the arm's other fields may go with other values of those.
                continue
    return found


def largest_arm(experiment: Experiment, student: Shape, on_gpu: bool = True) -> Arm:
    """The arm whose training workers need the most memory."""
    return max(arms_at_bounds(experiment), key=lambda arm: suggest.worker_bytes(student, arm, on_gpu))


def _engine_fit(
    stage: str,
    engine: Engine,
    shape: Shape | None,
    groups: Sequence[demand.Group],
    least: int,
    cluster: ClusterSpec | None,
    loras: tuple[int, int] = (0, 0),
) -> Fit:
    served, needed = stage == "teacher", max(1, least)
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    layout = f"{len(groups)} x TP {tensor} x PP {pipeline}"
    on_gpu = "GPU" in groups[0][0]
    if not on_gpu:
        needs = memory.engine_memory(shape, engine, None, loras, served).least if shape else None
        return _cpu_fit(stage, layout, needs, groups, needed, cluster)
    kinds, found = suggest.gpus_for_engine(shape, engine, loras, served) if shape else ({}, list(GPUS))
    holding = tuple(found)
    there = {gpu.kind for each in cluster.nodes if (gpu := each.gpu)} if cluster else set()
    needs = min((amount for kind, amount in kinds.items() if kind in (there or kinds)), default=None)
    split = suggest.sharding_error(shape, engine) if shape else ""
    if cluster is None:
        problem = split or ("" if holding else _too_large(needs, max(GPUS.values(), key=lambda gpu: gpu.bytes)))
        remedy = (
            suggest.suggest_engine(stage, shape, engine, groups[0][0], needed, None, loras) if problem and shape else ""
        )
        return Fit(stage, layout, needs, holding, (), len(groups), problem, remedy)
    problem, placed, remedy = _place(cluster, groups, holding, needed, kinds, stage)
    notes = ()
    if placed and any(each.splits(tensor) for each in placed):
        notes = ("tensor parallel groups lie across nodes, which is slow: let PP count the nodes",)
    problem = split or problem or _missing_pipeline_core(cluster, groups[:needed])
    if problem and shape and not (remedy and not split):
        remedy = suggest.suggest_engine(stage, shape, engine, groups[0][0], needed, cluster, loras)
    return Fit(stage, layout, needs, holding, placed, len(groups), problem, remedy, notes)


def _place(
    cluster: ClusterSpec,
    groups: Sequence[demand.Group],
    holding: Sequence[str],
    needed: int,
    kinds: Mapping[str, int],
    stage: str,
) -> tuple[str, tuple[Placement, ...], str]:
    """Why not so many placement groups lie on GPUs that hold them, where they lie, and the way out where it is here."""
    there = {gpu.kind: gpu for each in nodes.feasible_nodes(cluster, groups[0][0]).nodes if (gpu := each.gpu)}
    placed = tuple(nodes.place(groups, cluster, holding))
    if len(placed) >= needed:
        where = stage if stage in ("train", "attention") else f"{stage}.engine"
        named = suggest.accelerator_type_override(where, groups[:needed], cluster, holding)
        if named == []:
            return "", placed, ""
        small = [kind for kind in there if kind not in holding]
        return f"may be placed on {', '.join(small)}, too small for it", placed, "".join(named or ())
    asked = [name for name in groups[0][0] if name.startswith(ACCELERATOR_TYPE_PREFIX)]
    if asked and not there:
        return f"no node has {asked[0]}", placed, ""
    if len(nodes.place(groups[:needed], cluster)) < needed:
        wanted, have = _total(groups[:needed]), cluster.resources
        short = {name: amount for name, amount in wanted.items() if amount > have.get(name, 0)}
        told = [f"{amount:g} {name}, there are {have.get(name, 0):g}" for name, amount in (short or wanted).items()]
        return f"needs {'; '.join(told)}" + ("" if short else ", but not side by side"), placed, ""
    if not any(kind in holding for kind in there):
        largest = max(there.values(), key=lambda gpu: gpu.bytes)
        return _too_large(kinds.get(largest.kind), largest), placed, ""
    return f"{len(placed)} of at least {needed} fit onto GPUs that hold it ({', '.join(holding)})", placed, ""


def _missing_pipeline_core(cluster: ClusterSpec, groups: Sequence[demand.Group]) -> str:
    """Why the pipeline that feeds an engine would wait for ever; empty where it would not."""
    if suggest.has_pipeline_core(groups, cluster):
        return ""
    taken, cores = _total(groups)["CPU"], cluster.resources.get("CPU", 0)
    return f"needs {taken + 1:g} CPU with the pipeline's, there are {cores:g}"


def _too_large(needs: int | None, gpu: Gpu) -> str:
    if (needs or 0) <= gpu.bytes * 0.95:
        return f"{gpu.kind} does not compute in bfloat16"
    return f"a process needs {(needs or 0) / GIB:.1f} GiB, {gpu.kind} has {gpu.bytes / GIB:.1f}"


def _total(groups: Sequence[demand.Group]) -> dict[str, float]:
    names = dict.fromkeys(name for name in groups[0][0] if not name.startswith(ACCELERATOR_TYPE_PREFIX))
    return {name: sum(bundle.get(name, 0.0) for group in groups for bundle in group) for name in names}


def _cpu_fit(
    stage: str,
    layout: str,
    needs: int | None,
    groups: Sequence[demand.Group],
    needed: int,
    cluster: ClusterSpec | None,
) -> Fit:
    if cluster is None:
        return Fit(stage, layout, needs, ("CPU",), (), len(groups))
    placed = tuple(nodes.place(groups, cluster))
    problem = ""
    if len(placed) < needed:
        cores = _total(groups[:needed])["CPU"]
        problem = f"needs {cores:g} CPU, there are {cluster.resources.get('CPU', 0):g}"
    elif stage != "train":
        problem = _missing_pipeline_core(cluster, groups[:needed])
    return Fit(stage, layout, needs, ("CPU",), placed, len(groups), problem)


def _training_fit(
    experiment: Experiment, student: Shape | None, groups: Sequence[demand.Group], cluster: ClusterSpec | None
) -> Fit:
    on_gpu = "GPU" in groups[0][0]
    arm = largest_arm(experiment, student, on_gpu) if student else experiment.arm(next(iter(experiment.arms)))
    train, number = arm.train, len(groups[0])
    layout = f"{len(groups)} x {number} worker{'s' * (number > 1)}, ZeRO {train.zero_stage}"
    needs = suggest.worker_bytes(student, arm, on_gpu) if student else None
    # Arms may differ in it.
    least = max(each.train.min_workers or each.train.num_workers for each in arms_at_bounds(experiment))
    if not on_gpu:
        trial = [group[:least] for group in groups]
        return _cpu_fit("train", layout, needs, trial, 1, cluster)
    holding = tuple(kind for kind, gpu in GPUS.items() if memory.holds_worker(gpu, needs or 0, train))
    kinds = dict.fromkeys(GPUS, needs or 0)
    if cluster is None:
        problem = "" if holding else _too_large(needs, max(GPUS.values(), key=lambda gpu: gpu.bytes))
        remedy = suggest.suggest_training(student, arm, None) if problem and student else ""
        return Fit("train", layout, needs, holding, (), len(groups), problem, _with_arm_overrides(experiment, remedy))
    problem, placed, remedy = _place(cluster, [group[:least] for group in groups], holding, 1, kinds, "train")
    if problem and student and not remedy:
        remedy = suggest.suggest_training(student, arm, cluster) or suggest.suggest_num_workers(student, arm, cluster)
    return Fit("train", layout, needs, holding, placed, len(groups), problem, _with_arm_overrides(experiment, remedy))


def _with_arm_overrides(experiment: Experiment, overrides: str) -> str:
    """Overrides, given to arms that set such a field themselves, too."""
    told = []
    for override in overrides.split():
        path = override.partition("=")[0]
        own = [name for name, arm in experiment.arms.items() if path in dict(flatten(arm, ""))]
        told += [override] * (len(own) < len(experiment.arms)) + [f"arms.{name}.{override}" for name in own]
    return " ".join(told)


def _attention_fit(
    experiment: Experiment, student: Shape | None, groups: Sequence[demand.Group], cluster: ClusterSpec | None
) -> Fit:
    told = experiment.attention
    assert told, "asked for by demand"
    layout, needs = f"{len(groups)} x 1 worker", None
    on_gpu = "GPU" in groups[0][0]
    if student:
        width = 4 if (told.dtype or experiment.train.dtype) == "float32" else 2
        # `attention_heads` computes attention weights block by block in float32, small beside the model.
        needs = student.parameters * width + memory.CUDA_CONTEXT + GIB
    if not on_gpu:
        return _cpu_fit("attention", layout, needs, groups, 1, cluster)
    holding = tuple(kind for kind, gpu in GPUS.items() if needs is None or memory.fits(needs, gpu.bytes))
    if cluster is None:
        return Fit("attention", layout, needs, holding, (), len(groups))
    kinds = dict.fromkeys(GPUS, needs or 0)
    problem, placed, remedy = _place(cluster, groups, holding, 1, kinds, "attention")
    remedy = remedy or "attention=null" * bool(problem)
    return Fit("attention", layout, needs, holding, placed, len(groups), problem, remedy)
