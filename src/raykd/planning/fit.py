"""Placement of an experiment's stages on a cluster, and the reason where a stage does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raykd.cluster import nodes
from raykd.cluster.gpus import GIB, GPUS, Gpu
from raykd.cluster.nodes import ClusterSpec, Placement
from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.engine import Engine
from raykd.config.experiment import Arm, Experiment
from raykd.config.overrides import flatten
from raykd.models.architecture import Shape
from raykd.planning import demand, memory, suggest


@dataclass(frozen=True)
class Fit:
    """Placement of a stage on a cluster, or the reason why it does not fit."""

    stage: str
    layout: str
    """Requested processes in words, such as `2 x TP 4 x PP 1`."""
    required_bytes: int | None
    """Bytes of the fullest process, on the available type of GPU that needs the fewest; None where unknown."""
    gpus: tuple[str, ...] = ()
    """Types of GPU that hold a process; `("CPU",)` on a CPU."""
    placements: tuple[Placement, ...] = ()
    num_groups: int = 1
    """Largest number of placement groups that the stage requests."""
    problem: str = ""
    """Why the stage cannot run; empty where it can."""
    suggestion: str = ""
    """Overrides of the closest fit; empty where none was found."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _StageRequest:
    """Placement groups that a stage requests."""

    stage: str
    layout: str
    groups: Sequence[demand.Group]
    min_groups: int
    """Number of groups without which the stage does not start."""
    cluster: ClusterSpec | None
    """Nodes of the cluster; None for any that is large enough."""

    @property
    def bundle(self) -> Mapping[str, float]:
        return self.groups[0][0]

    @property
    def is_on_gpu(self) -> bool:
        return "GPU" in self.bundle

    @property
    def required_groups(self) -> Sequence[demand.Group]:
        return self.groups[: self.min_groups]

    def fit(
        self,
        required_bytes: int | None,
        gpus: tuple[str, ...],
        placements: tuple[Placement, ...] = (),
        problem: str = "",
        suggestion: str = "",
        notes: tuple[str, ...] = (),
    ) -> Fit:
        return Fit(
            stage=self.stage,
            layout=self.layout,
            required_bytes=required_bytes,
            gpus=gpus,
            placements=placements,
            num_groups=len(self.groups),
            problem=problem,
            suggestion=suggestion,
            notes=notes,
        )


@dataclass(frozen=True)
class _GpuPlacement:
    """Placements on GPUs that hold a process, with the problem and its solution where there are too few."""

    placements: tuple[Placement, ...]
    problem: str = ""
    suggestion: str = ""


def refusal_message(fits: Sequence[Fit]) -> str:
    """Return the problems of all stages with suggestions; empty where every stage fits."""
    messages = []
    for fit in fits:
        if fit.problem:
            remedy = "no other layout fits here"
            if fit.suggestion:
                remedy = f"closest fit: {fit.suggestion}"
            messages.append(f"{fit.stage}: {fit.problem}; {remedy}")
    return ". ".join(messages)


def fit_stages(
    experiment: Experiment,
    teacher: Shape | None,
    student: Shape | None,
    cluster: ClusterSpec | None = None,
    accelerator: str = "gpu",
) -> list[Fit]:
    """Return the fit of each stage. Stages run one after another, so each is placed on the empty cluster.

    Args:
        experiment: the experiment.
        teacher: the teacher's shape; None where unknown, which leaves out its memory.
        student: the student's shape; None as for the teacher.
        cluster: nodes of the cluster; None for any that is large enough.
        accelerator: `gpu` or `cpu`, for `accelerator: auto` without a cluster.
    """
    resources = cluster.resources if cluster else demand.UNKNOWN_CLUSTER[accelerator]
    stage_demand = demand.resource_demand(experiment, resources)
    fits = []
    if stage_demand.generation:
        fits.append(
            _engine_fit(
                stage="teacher",
                engine=experiment.teacher.engine,
                shape=teacher,
                groups=stage_demand.generation,
                min_replicas=experiment.teacher.replicas.min,
                cluster=cluster,
            )
        )
    fits.append(_training_fit(experiment, student, stage_demand.training, cluster))
    fits.append(
        _engine_fit(
            stage="evaluate",
            engine=experiment.evaluate.engine,
            shape=student,
            groups=stage_demand.evaluation,
            min_replicas=1,
            cluster=cluster,
            adapters=demand.max_adapters(experiment),
        )
    )
    if stage_demand.attention:
        fits.append(_attention_fit(experiment, student, stage_demand.attention, cluster))
    return fits


def largest_arm(experiment: Experiment, student: Shape, on_gpu: bool = True) -> Arm:
    """Return the arm whose training workers need the most memory."""
    return max(demand.arms_at_bounds(experiment), key=lambda arm: suggest.worker_bytes(student, arm, on_gpu))


def _engine_fit(
    *,
    stage: str,
    engine: Engine,
    shape: Shape | None,
    groups: Sequence[demand.Group],
    min_replicas: int,
    cluster: ClusterSpec | None,
    adapters: tuple[int, int] = (0, 0),
) -> Fit:
    is_served = stage == "teacher"
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    request = _StageRequest(
        stage=stage,
        layout=f"{len(groups)} x TP {tensor} x PP {pipeline}",
        groups=groups,
        min_groups=max(1, min_replicas),
        cluster=cluster,
    )
    if not request.is_on_gpu:
        needs = memory.engine_memory(shape, engine, None, adapters, is_served).min_gpu_bytes if shape else None
        return _cpu_fit(request, needs)

    bytes_by_gpu: dict[str, int] = {}
    feasible = tuple(GPUS)
    if shape:
        bytes_by_gpu, holding = suggest.gpus_for_engine(shape, engine, adapters, is_served)
        feasible = tuple(holding)
    required_bytes = _least_required_bytes(bytes_by_gpu, cluster)
    invalid_sharding = suggest.sharding_error(shape, engine) if shape else ""

    def suggestion() -> str:
        if shape is None:
            return ""
        return suggest.suggest_engine(stage, shape, engine, request.bundle, request.min_groups, cluster, adapters)

    if cluster is None:
        problem = invalid_sharding or _too_large_everywhere(feasible, required_bytes)
        return request.fit(required_bytes, feasible, problem=problem, suggestion=suggestion() if problem else "")

    placed = _place(request, cluster, feasible, bytes_by_gpu)
    problem = invalid_sharding or placed.problem or _missing_pipeline_core(cluster, request.required_groups)
    remedy = placed.suggestion
    if problem and shape and (invalid_sharding or not remedy):
        remedy = suggestion()
    notes: tuple[str, ...] = ()
    if any(placement.splits(tensor) for placement in placed.placements):
        notes = ("tensor parallel groups span nodes, which is slow: set pipeline_parallel_size to the number of nodes",)
    return request.fit(required_bytes, feasible, placed.placements, problem, remedy, notes)


def _least_required_bytes(bytes_by_gpu: Mapping[str, int], cluster: ClusterSpec | None) -> int | None:
    """Return the bytes of a process on the type of GPU that needs the fewest, of those in the cluster."""
    available = {gpu.kind for group in cluster.nodes if (gpu := group.gpu)} if cluster else set()
    candidates = available or set(bytes_by_gpu)
    return min((amount for gpu, amount in bytes_by_gpu.items() if gpu in candidates), default=None)


def _place(
    request: _StageRequest, cluster: ClusterSpec, feasible: Sequence[str], bytes_by_gpu: Mapping[str, int]
) -> _GpuPlacement:
    """Place a stage on GPUs that hold its processes.

    Args:
        request: the stage.
        cluster: its nodes.
        feasible: types of GPU that hold a process.
        bytes_by_gpu: bytes of a process on each type of GPU.
    """
    groups, bundle, required = request.groups, request.bundle, request.required_groups
    candidates = {gpu.kind: gpu for group in nodes.feasible_nodes(cluster, bundle).nodes if (gpu := group.gpu)}
    placements = tuple(nodes.place(groups, cluster, feasible))
    if len(placements) >= request.min_groups:
        section = request.stage if request.stage in ("train", "attention") else f"{request.stage}.engine"
        overrides = suggest.accelerator_type_override(section, required, cluster, feasible)
        if overrides == []:
            return _GpuPlacement(placements)
        infeasible = [gpu for gpu in candidates if gpu not in feasible]
        problem = f"may be placed on {', '.join(infeasible)}, which cannot hold it"
        return _GpuPlacement(placements, problem, "".join(overrides or ()))

    requested_types = [name for name in bundle if name.startswith(ACCELERATOR_TYPE_PREFIX)]
    if requested_types and not candidates:
        problem = f"no node has {requested_types[0]}"
    elif len(nodes.place(required, cluster)) < request.min_groups:
        problem = _missing_resources(required, cluster)
    elif not any(gpu in feasible for gpu in candidates):
        largest = max(candidates.values(), key=lambda gpu: gpu.bytes)
        problem = _too_large(bytes_by_gpu.get(largest.kind), largest)
    else:
        problem = (
            f"GPUs that can hold it ({', '.join(feasible)}) have room for {len(placements)} of at least "
            f"{request.min_groups}"
        )
    return _GpuPlacement(placements, problem)


def _missing_resources(groups: Sequence[demand.Group], cluster: ClusterSpec) -> str:
    required, available = _total(groups), cluster.resources
    missing = {name: amount for name, amount in required.items() if amount > available.get(name, 0)}
    amounts = [
        f"{amount:g} {name}, the cluster has {available.get(name, 0):g}"
        for name, amount in (missing or required).items()
    ]
    # The totals suffice where single nodes do not.
    spread = "" if missing else ", but not on nodes that hold them together"
    return f"needs {'; '.join(amounts)}{spread}"


def _missing_pipeline_core(cluster: ClusterSpec, groups: Sequence[demand.Group]) -> str:
    """Return why the Ray Data pipeline that feeds an engine would never start; empty where it has a core."""
    if suggest.has_pipeline_core(groups, cluster):
        return ""
    required, cores = _total(groups)["CPU"] + 1, cluster.resources.get("CPU", 0)
    return f"needs {required:g} CPU (one for the pipeline), the cluster has {cores:g}"


def _too_large_everywhere(feasible: Sequence[str], required_bytes: int | None) -> str:
    """Return why no known type of GPU holds a process; empty where one does."""
    if feasible:
        return ""
    return _too_large(required_bytes, max(GPUS.values(), key=lambda gpu: gpu.bytes))


def _too_large(required_bytes: int | None, gpu: Gpu) -> str:
    required = required_bytes or 0
    if memory.fits(required, gpu.bytes):
        return f"{gpu.kind} does not support bfloat16"
    return f"a process needs {required / GIB:.1f} GiB, {gpu.kind} has {gpu.bytes / GIB:.1f}"


def _total(groups: Sequence[demand.Group]) -> dict[str, float]:
    """Return the CPUs and GPUs of placement groups."""
    names = dict.fromkeys(name for name in groups[0][0] if not name.startswith(ACCELERATOR_TYPE_PREFIX))
    return {name: sum(bundle.get(name, 0.0) for group in groups for bundle in group) for name in names}


def _cpu_fit(request: _StageRequest, required_bytes: int | None) -> Fit:
    cluster = request.cluster
    if cluster is None:
        return request.fit(required_bytes, ("CPU",))
    placements = tuple(nodes.place(request.groups, cluster))
    problem = ""
    if len(placements) < request.min_groups:
        cores = _total(request.required_groups)["CPU"]
        problem = f"needs {cores:g} CPU, the cluster has {cluster.resources.get('CPU', 0):g}"
    elif request.stage != "train":
        problem = _missing_pipeline_core(cluster, request.required_groups)
    return request.fit(required_bytes, ("CPU",), placements, problem)


def _training_fit(
    experiment: Experiment, student: Shape | None, groups: Sequence[demand.Group], cluster: ClusterSpec | None
) -> Fit:
    on_gpu = "GPU" in groups[0][0]
    arm = largest_arm(experiment, student, on_gpu) if student else experiment.arm(next(iter(experiment.arms)))
    num_workers = len(groups[0])
    workers = "worker" if num_workers == 1 else "workers"
    # Arms may differ in their number of workers.
    min_workers = max(other.train.min_workers or other.train.num_workers for other in demand.arms_at_bounds(experiment))
    request = _StageRequest(
        stage="train",
        layout=f"{len(groups)} x {num_workers} {workers}, ZeRO {arm.train.zero_stage}",
        groups=[group[:min_workers] for group in groups],
        min_groups=1,
        cluster=cluster,
    )
    required_bytes = suggest.worker_bytes(student, arm, on_gpu) if student else None
    if not on_gpu:
        return _cpu_fit(request, required_bytes)

    feasible = tuple(name for name, gpu in GPUS.items() if memory.holds_worker(gpu, required_bytes or 0, arm.train))
    suggestion = ""
    if cluster is None:
        problem = _too_large_everywhere(feasible, required_bytes)
        if problem and student:
            suggestion = suggest.suggest_training(student, arm, None)
        return request.fit(
            required_bytes, feasible, problem=problem, suggestion=_with_arm_overrides(experiment, suggestion)
        )
    placed = _place(request, cluster, feasible, dict.fromkeys(GPUS, required_bytes or 0))
    suggestion = placed.suggestion
    if placed.problem and student and not suggestion:
        suggestion = suggest.suggest_training(student, arm, cluster)
        suggestion = suggestion or suggest.suggest_num_workers(student, arm, cluster)
    return request.fit(
        required_bytes, feasible, placed.placements, placed.problem, _with_arm_overrides(experiment, suggestion)
    )


def _with_arm_overrides(experiment: Experiment, overrides: str) -> str:
    """Return overrides, repeated for the arms that set such a field themselves."""
    expanded = []
    for override in overrides.split():
        path = override.partition("=")[0]
        arms = [name for name, arm in experiment.arms.items() if path in dict(flatten(arm, ""))]
        if len(arms) < len(experiment.arms):
            expanded.append(override)
        expanded.extend(f"arms.{name}.{override}" for name in arms)
    return " ".join(expanded)


def _attention_fit(
    experiment: Experiment, student: Shape | None, groups: Sequence[demand.Group], cluster: ClusterSpec | None
) -> Fit:
    attention = experiment.attention
    assert attention, "resource_demand requests attention workers only with this section"
    request = _StageRequest(
        stage="attention", layout=f"{len(groups)} x 1 worker", groups=groups, min_groups=1, cluster=cluster
    )
    required_bytes = None
    if student:
        value_bytes = 4 if (attention.dtype or experiment.train.dtype) == "float32" else 2
        # `attention_heads` computes attention weights block by block in float32, which is little beside the model.
        required_bytes = student.parameters * value_bytes + memory.CUDA_CONTEXT + GIB
    if not request.is_on_gpu:
        return _cpu_fit(request, required_bytes)
    feasible = tuple(
        name for name, gpu in GPUS.items() if required_bytes is None or memory.fits(required_bytes, gpu.bytes)
    )
    if cluster is None:
        return request.fit(required_bytes, feasible)
    placed = _place(request, cluster, feasible, dict.fromkeys(GPUS, required_bytes or 0))
    suggestion = placed.suggestion
    if placed.problem and not suggestion:
        suggestion = "attention=null"
    return request.fit(required_bytes, feasible, placed.placements, placed.problem, suggestion)
