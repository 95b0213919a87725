"""Tables of `raykd plan`: memory, placement, tokens, hours and cost of an experiment."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from raykd.cluster.gpus import GIB, GPUS
from raykd.cluster.nodes import ClusterSpec
from raykd.cluster.resources import resolve_accelerator
from raykd.config.experiment import Experiment
from raykd.models import architecture
from raykd.models.architecture import Shape
from raykd.planning import cost, demand, memory, suggest
from raykd.planning.cost import Rates
from raykd.planning.fit import Fit, fit_stages, largest_arm, refusal_message
from raykd.runtime.rich_console import cell

UNKNOWN_SHAPE = "unknown, and so is its memory: not a local directory, not in the hub's cache, and not a Llama 3"
# Columns of text; numbers are aligned to the right.
_LEFT_ALIGNED = ("", "Stage", "Request", "Placement", "GPUs", "ZeRO", "Checkpointing", "Smallest GPU")


def plan_tables(experiment: Experiment, cluster: ClusterSpec | None, rates: Rates) -> tuple[list[Table], str]:
    """Return the requirements of an experiment, and why it cannot run.

    Args:
        experiment: the experiment.
        cluster: nodes of the cluster; None where no cluster is given.
        rates: throughputs of the stages.

    Returns:
        The tables, and the problems with suggestions; empty where every stage fits as far as is known.

    Raises:
        UserError: where the configuration of a model, or the cluster's file, cannot be read.
    """
    teacher_config, student_config = experiment.teacher, experiment.student
    engine_kwargs = teacher_config.engine.engine_kwargs
    teacher = architecture.find_shape(teacher_config.model, teacher_config.revision, engine_kwargs)
    student = architecture.find_shape(student_config.model, student_config.revision)
    fits = fit_stages(experiment, teacher, student, cluster, rates.accelerator)
    resources = cluster.resources if cluster else demand.UNKNOWN_CLUSTER[rates.accelerator]
    tables = []
    if any(fit.stage == "teacher" for fit in fits):
        tables.append(teacher_table(experiment, teacher, resources))
    tables.append(student_table(experiment, student, resources))
    tables.append(stage_table(fits, cluster))
    training = next(fit for fit in fits if fit.stage == "train")
    concurrent_trials = max(1, len(training.placements)) if cluster else 1
    costs = cost.stage_costs(experiment, rates, resources, concurrent_trials)
    tables.append(cost_table(experiment, costs, rates, concurrent_trials))
    return tables, refusal_message(fits)


def teacher_table(experiment: Experiment, shape: Shape | None, resources: dict[str, float]) -> Table:
    """Return the teacher's weights and KV cache, and the GPUs that hold a process of its engine."""
    engine = experiment.teacher.engine
    table = _table(f"Teacher {experiment.teacher.model}", "", "")
    if shape is None:
        table.add_row("Architecture", UNKNOWN_SHAPE)
        return table
    on_gpu = resolve_accelerator(engine.accelerator, resources) == "gpu"
    needs = memory.engine_memory(shape, engine, GPUS["A10G"] if on_gpu else None)
    dtype = engine.engine_kwargs.get("dtype")
    sharding = f"TP {engine.tensor_parallel_size} x PP {engine.pipeline_parallel_size}"
    table.add_row("Parameters", f"{_describe_parameters(shape.parameters)}, weights in {_weight_type(shape, dtype)}")
    table.add_row("Architecture", f"{shape.layers} layers, {shape.heads} heads, {shape.kv_heads} KV heads")
    table.add_row("Source", shape.source)
    table.add_row(
        "Weights",
        f"{_gib(memory.weight_bytes(shape, dtype))} GiB; {_gib(needs.weights)} GiB per process ({sharding})",
    )
    table.add_row("KV cache", f"{needs.kv_token:,} bytes per token and process")
    table.add_row(
        "Sequence", f"{_gib(needs.kv_sequence)} GiB of KV cache per process at max_model_len={needs.max_model_len:,}"
    )
    if on_gpu:
        _, feasible = suggest.gpus_for_engine(shape, engine, (0, 0), served=True)
        sequences = {gpu: memory.engine_memory(shape, engine, GPUS[gpu]).sequences(GPUS[gpu].bytes) for gpu in feasible}
        # `A100` is the name of both sizes, 40 GB and 80 GB.
        listed = ", ".join(f"{gpu} ({number})" for gpu, number in sequences.items() if gpu != "A100") or "none"
        table.add_row(
            "GPUs",
            f"{listed}; in brackets: concurrent sequences of max_model_len at "
            f"gpu_memory_utilization={needs.utilization:g}",
        )
    else:
        table.add_row("CPU", f"{_gib(needs.fixed)} GiB plus the KV cache (VLLM_CPU_KVCACHE_SPACE)")
    return table


def student_table(experiment: Experiment, shape: Shape | None, resources: dict[str, float]) -> Table:
    """Return the memory of a training worker by ZeRO stage, with and without gradient checkpointing."""
    title = f"Student {experiment.student.model}"
    if shape is None:
        table = _table(title, "", "")
        table.add_row("Architecture", UNKNOWN_SHAPE)
        return table
    first_arm = experiment.arm(next(iter(experiment.arms)))
    on_gpu = resolve_accelerator(first_arm.train.accelerator, resources) == "gpu"
    arm = largest_arm(experiment, shape, on_gpu)
    train, lora = arm.train, arm.student.lora
    micro_batch = min(train.micro_batch_size, -(-train.batch_size // train.num_workers))
    caption = (
        f"{title}: {_describe_parameters(shape.parameters)}, {train.dtype}, LoRA rank {lora.r}\n"
        f"GiB per worker (num_workers={train.num_workers}), micro-batches of {micro_batch} x "
        f"{train.max_length:,} tokens (micro_batch_size x max_length)"
    )
    columns = ["ZeRO", "Checkpointing"]
    columns += ["Base", "LoRA", "Gradients", "Adam", "Buffers", "Activations", "Loss", "Total"]
    if on_gpu:
        columns.append("Smallest GPU")
    table = _table(caption, *columns)
    for stage in (0, 1, 2, 3):
        if not stage and train.dtype == "bfloat16":
            # The configuration rejects this combination.
            continue
        for checkpointing in (False, True):
            options = train.model_copy(update={"zero_stage": stage, "gradient_checkpointing": checkpointing})
            needs = memory.worker_memory(shape, lora, options, cost.max_target_tokens(arm), on_gpu)
            is_configured = (stage, checkpointing) == (train.zero_stage, train.gradient_checkpointing)
            parts = (
                *(needs.base, needs.adapter, needs.gradients, needs.optimizer, needs.buffers, needs.activations),
                *(needs.loss, needs.total),
            )
            cells = [f"{stage} *" if is_configured else str(stage), "yes" if checkpointing else "no"]
            cells += map(_gib, parts)
            if on_gpu:
                feasible = [name for name, gpu in GPUS.items() if memory.holds_worker(gpu, needs.total, options)]
                cells.append(feasible[0] if feasible else "–")
            table.add_row(*cells, style="bold" if is_configured else "")
    overhead = "the CUDA context" if on_gpu else "Python and its libraries"
    table.caption = f"* as configured. Total: with {overhead}."
    return table


def stage_table(fits: Sequence[Fit], cluster: ClusterSpec | None) -> Table:
    """Return the placement of the stages on a cluster, or the types of GPU that hold them."""
    title = f"Stages on {cluster.name}" if cluster else "Stages"
    table = _table(title, "Stage", "Request", "GiB/process", "Placement" if cluster else "GPUs")
    for fit in fits:
        required = "–" if fit.required_bytes is None else _gib(fit.required_bytes)
        table.add_row(
            fit.stage, fit.layout, required, _describe_placement(fit) if cluster else _describe_gpus(fit.gpus)
        )
    if cluster:
        groups = ", ".join(f"{group.count} x {group.name}" for group in cluster.nodes)
        num_workers = sum(group.count for group in cluster.nodes if not group.is_head)
        limit = ""
        if cluster.max_workers and cluster.max_workers < num_workers:
            limit = f"; at most {cluster.max_workers} nodes beside the head"
        table.caption = f"Available nodes, or limits of the autoscaler: {groups}{limit}."
    return table


def _describe_placement(fit: Fit) -> str:
    if fit.problem:
        return f"does not fit: {fit.problem}"
    first = fit.placements[0].bundles_per_node
    spread = ", ".join(f"{number} on {name}" for name, number in first)
    text = f"1 node ({spread})" if len(first) == 1 else f"{len(first)} nodes ({spread})"
    if fit.num_groups > 1:
        text = f"{len(fit.placements)} of {fit.num_groups} at a time, each on {text}"
    return "; ".join([text, *fit.notes])


def _describe_gpus(gpus: Sequence[str]) -> str:
    if gpus == ("CPU",):
        return "CPU"
    if len(gpus) == len(GPUS):
        return "any"
    # `A100` is the name of both sizes, 40 GB and 80 GB.
    return ", ".join(gpu for gpu in gpus if gpu != "A100") or "none"


def cost_table(experiment: Experiment, costs: Iterable[cost.StageCost], rates: Rates, concurrent_trials: int) -> Table:
    """Return tokens, hours and cost of each stage."""
    currency, stages = experiment.prices.currency, list(costs)
    title = f"Tokens, hours and cost; rates: {rates.source}" if any(stage.rate for stage in stages) else "Tokens"
    table = _table(title, "Stage", "Rows", "Tokens", "Tokens/s", "Hours", "Processor hours", currency)
    for stage in stages:
        table.add_row(
            stage.stage,
            _number(stage.rows, 0),
            _tokens(stage),
            _number(stage.rate, 0),
            _hours(stage.hours),
            _hours(stage.processor_hours),
            _number(stage.cost, 2),
        )
    amounts = [stage.cost for stage in stages if stage.cost is not None]
    if amounts:
        hours = sum(stage.processor_hours or 0 for stage in stages)
        table.add_row("Total of priced stages", "", "", "", "", _hours(hours), _number(sum(amounts), 2), style="bold")
    notes = [f"{concurrent_trials} trials train at a time."] if concurrent_trials > 1 else []
    if not all(stage.rate for stage in stages if stage.processors):
        notes.append("For hours: --rates-from RUN_FOLDER, or --generation-rate, --training-rate and --eval-rate.")
    elif not amounts:
        notes.append("For cost: prices.gpu_hour or prices.cpu_hour.")
    table.caption = " ".join(notes) or None
    return table


def _tokens(stage: cost.StageCost) -> str:
    if stage.tokens is None:
        return "–"
    return f"≤ {stage.tokens:,.0f}" if stage.is_bound else f"{stage.tokens:,.0f}"


def _table(title: str, *columns: str) -> Table:
    # Cells are folded, not cut, as in the table of the arms.
    table = Table(title=cell(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.show_header = any(columns)
    for name in columns:
        table.add_column(name, overflow="fold", justify="left" if name in _LEFT_ALIGNED else "right")
    return table


def _weight_type(shape: Shape, dtype: str | None) -> str:
    if shape.quantization.bits < 16:
        return shape.quantization.name
    return dtype if dtype and dtype != "auto" else "bfloat16"


def _describe_parameters(parameters: int) -> str:
    """Return a number of parameters in words."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} billion parameters"
    return f"{parameters / 1e6:.1f} million parameters"


def _gib(amount: int) -> str:
    """Return bytes as GiB with about three digits."""
    value = amount / GIB
    if value >= 1:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.01 or not amount else "<0.01"


def _hours(value: float | None) -> str:
    """Return hours with one digit after the point, two below 10 hours."""
    if value is not None and 0 < value < 0.01:
        return "<0.01"
    return _number(value, 2 if value and value < 10 else 1)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
