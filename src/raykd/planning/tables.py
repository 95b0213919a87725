"""Needs: what an experiment asks for before anything is started, as tables: memory, layout, tokens, hours and money."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from raykd.cluster.gpus import GIB, GPUS
from raykd.cluster.nodes import ClusterSpec
from raykd.cluster.resources import resolve_accelerator
from raykd.config.experiment import Experiment
from raykd.models import architecture
from raykd.models.architecture import Shape
from raykd.planning import cost, demand, memory, suggest
from raykd.planning.cost import Rates
from raykd.planning.fit import Fit, fit_stages, largest_arm, refusal_message

UNKNOWN_SHAPE = "not known here: neither a folder, nor in the hub's cache, nor a Llama 3; nor is its memory"


def plan_tables(experiment: Experiment, cluster: ClusterSpec | None, rates: Rates) -> tuple[list[Table], str]:
    """What an experiment needs, and why it cannot run.

    Args:
        experiment: the experiment.
        cluster: what there is; None where nothing is said of it.
        rates: how fast the stages go.

    Returns:
        The tables, and the reasons with the ways out; empty where it can run as far as is known.

    Raises:
        UserError: where a model's configuration, or the cluster, cannot be read.
    """
    told = experiment.teacher
    teacher = architecture.find_shape(told.model, told.revision, told.engine.engine_kwargs)
    student = architecture.find_shape(experiment.student.model, experiment.student.revision)
    fits = fit_stages(experiment, teacher, student, cluster, rates.accelerator)
    resources = cluster.resources if cluster else demand.UNKNOWN_CLUSTER[rates.accelerator]
    found = []
    if any(fit.stage == "teacher" for fit in fits):
        found.append(teacher_table(experiment, teacher, resources))
    found.append(student_table(experiment, student, resources))
    found.append(stage_table(fits, cluster))
    trained = next(fit for fit in fits if fit.stage == "train")
    at_a_time = max(1, len(trained.placed)) if cluster else 1
    found.append(work_table(experiment, cost.stage_costs(experiment, rates, resources, at_a_time), rates, at_a_time))
    return found, refusal_message(fits)


def teacher_table(experiment: Experiment, shape: Shape | None, resources: dict[str, float]) -> Table:
    """The teacher's weights, keys and values, and the GPUs that hold a process of its engine."""
    engine = experiment.teacher.engine
    table = _table(f"Teacher {experiment.teacher.model}", "", "")
    if shape is None:
        table.add_row("Shape", UNKNOWN_SHAPE)
        return table
    on_gpu = resolve_accelerator(engine.accelerator, resources) == "gpu"
    needs = memory.engine_memory(shape, engine, GPUS["A10G"] if on_gpu else None)
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    whole, width = memory.weight_bytes(shape, engine.engine_kwargs.get("dtype")), "of each process"
    table.add_row(
        "Parameters",
        f"{_describe_parameters(shape.parameters)}, weights in "
        f"{_weight_type(shape, engine.engine_kwargs.get('dtype'))}",
    )
    table.add_row("Shape", f"{shape.layers} layers, {shape.heads} heads, {shape.kv_heads} of keys and values")
    table.add_row("Read from", shape.source)
    table.add_row(
        "Weights", f"{_gib(whole)} GiB; {_gib(needs.weights)} {width}: {tensor} tensor x {pipeline} pipeline parallel"
    )
    table.add_row("Keys and values", f"{needs.kv_token:,} bytes a token {width}")
    table.add_row(
        "A sequence", f"{_gib(needs.kv_sequence)} GiB {width}, of {needs.max_model_len:,} tokens (max_model_len)"
    )
    if on_gpu:
        _, holding = suggest.gpus_for_engine(shape, engine, (0, 0), served=True)
        room = {kind: memory.engine_memory(shape, engine, GPUS[kind]).sequences(GPUS[kind].bytes) for kind in holding}
        told = ", ".join(f"{kind} ({number})" for kind, number in room.items() if kind != "A100") or "none"
        table.add_row("GPUs that hold it", f"{told}: such sequences at a time, of {needs.share:.0%} of the memory")
    else:
        table.add_row("On a CPU", f"{_gib(needs.fixed)} GiB, and keys and values (VLLM_CPU_KVCACHE_SPACE)")
    return table


def student_table(experiment: Experiment, shape: Shape | None, resources: dict[str, float]) -> Table:
    """What a training worker needs by ZeRO stage, with and without checkpointing."""
    title = f"Student {experiment.student.model}"
    if shape is None:
        table = _table(title, "", "")
        table.add_row("Shape", UNKNOWN_SHAPE)
        return table
    first = experiment.arm(next(iter(experiment.arms)))
    on_gpu = resolve_accelerator(first.train.accelerator, resources) == "gpu"
    arm = largest_arm(experiment, shape, on_gpu)
    train, lora = arm.train, arm.student.lora
    rows = min(train.micro_batch_size, -(-train.batch_size // train.num_workers))
    passes = f"{rows} x {train.max_length:,} tokens in a pass (micro_batch_size x max_length)"
    told = (
        f"{title}: {_describe_parameters(shape.parameters)}, {train.dtype}, LoRA of rank {lora.r}\n"
        f"GiB of each of {train.num_workers} workers, {passes}"
    )
    columns = ("Frozen", "LoRA", "Gradients", "Adam", "Buffers", "Kept", "Loss", "All")
    table = _table(told, "ZeRO", "Checkpoints", *columns, *(["From"] if on_gpu else []))
    for stage in (0, 1, 2, 3):
        if not stage and train.dtype == "bfloat16":
            # Refused when the experiment is read.
            continue
        for again in (False, True):
            changed = train.model_copy(update={"zero_stage": stage, "gradient_checkpointing": again})
            each = memory.worker_memory(shape, lora, changed, cost.max_target_tokens(arm), on_gpu)
            parts = (each.base, each.adapter, each.gradients, each.optimizer, each.buffers, each.activations, each.loss)
            kinds = [kind for kind, gpu in GPUS.items() if memory.holds_worker(gpu, each.total, changed)]
            own = (stage, again) == (train.zero_stage, train.gradient_checkpointing)
            cells = [f"{stage}{' *' * own}", "yes" if again else "no", *map(_gib, parts), _gib(each.total)]
            table.add_row(*cells, *([kinds[0] if kinds else "–"] if on_gpu else []), style="bold" if own else "")
    rest = "CUDA's context. From: the smallest GPU that holds it." if on_gpu else "Python and its libraries."
    table.caption = f"* as configured. Kept: for the backward pass. All: with {rest}"
    return table


def stage_table(fits: Sequence[Fit], cluster: ClusterSpec | None) -> Table:
    """How the stages, which follow one another, lie on a cluster, or on what kinds of GPUs they can."""
    where = f"Stages on {cluster.name}" if cluster else "Stages"
    table = _table(where, "Stage", "Asks for", "GiB each", "Lies on" if cluster else "Held by")
    for fit in fits:
        needs = "–" if fit.needs is None else _gib(fit.needs)
        table.add_row(fit.stage, fit.layout, needs, _describe_placement(fit) if cluster else _describe_kinds(fit.kinds))
    if cluster:
        what = ", ".join(f"{each.count} x {each.name}" for each in cluster.nodes)
        others = sum(each.count for each in cluster.nodes if not each.is_head)
        limit = f", no more than {cluster.most} beside the head" if (cluster.most or others) < others else ""
        table.caption = f"There are, or may be, {what}{limit}."
    return table


def _describe_placement(fit: Fit) -> str:
    if fit.problem:
        return f"nowhere: {fit.problem}"
    first = fit.placed[0]
    spread = ", ".join(f"{number} on {name}" for name, number in first.on)
    spans = f"{len(first.on)} node{'s' * (len(first.on) > 1)} ({spread})"
    number = f"{len(fit.placed)} of {fit.wanted} at a time, each on " if fit.wanted > 1 else ""
    return "; ".join([number + spans, *fit.notes])


def _describe_kinds(kinds: Sequence[str]) -> str:
    if kinds == ("CPU",):
        return "a CPU"
    # What Ray calls A100 may be of 40 GB or of 80.
    return "any GPU" if len(kinds) == len(GPUS) else ", ".join(kind for kind in kinds if kind != "A100") or "none"


def work_table(experiment: Experiment, work: Iterable[cost.StageCost], rates: Rates, at_a_time: int) -> Table:
    """Tokens, hours and money."""
    currency, work = experiment.prices.currency, list(work)
    title = f"Tokens, hours and money; rates: {rates.source}" if any(each.rate for each in work) else "Tokens"
    table = _table(title, "What", "Rows", "Tokens", "A second", "Hours", "Processor hours", currency)
    for each in work:
        tokens = "–" if each.tokens is None else f"{'≤ ' * each.is_bound}{each.tokens:,.0f}"
        rate, hours = _number(each.rate, 0), _hours(each.hours)
        cells = (tokens, rate, hours, _hours(each.processor_hours), _number(each.cost, 2))
        table.add_row(each.what, _number(each.rows, 0), *cells)
    costs = [each.cost for each in work if each.cost is not None]
    if costs:
        hours = sum(each.processor_hours or 0 for each in work)
        table.add_row("all that has a price", "", "", "", "", _hours(hours), _number(sum(costs), 2), style="bold")
    notes = [f"{at_a_time} students are trained at a time."] if at_a_time > 1 else []
    if not all(each.rate for each in work if each.processors):
        notes.append("Hours: by --rates-from RUN_FOLDER, or --generation-rate, --training-rate, --eval-rate.")
    elif not costs:
        notes.append("Money: by prices.gpu_hour or prices.cpu_hour.")
    table.caption = " ".join(notes) or None
    return table


def _table(title: str, *columns: str) -> Table:
    # Folded rather than cut, as in the table of the arms.
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.show_header = any(columns)
    text = ("", "Stage", "Asks for", "Lies on", "Held by", "What", "ZeRO", "Checkpoints", "From")
    for name in columns:
        table.add_column(name, overflow="fold", justify="left" if name in text else "right")
    return table


def _weight_type(shape: Shape, dtype: str | None) -> str:
    if shape.quantization.bits < 16:
        return shape.quantization.name
    return dtype if dtype and dtype != "auto" else "bfloat16"


def _describe_parameters(parameters: int) -> str:
    """A number of parameters in words."""
    return (
        f"{parameters / 1e9:.2f} billion parameters"
        if parameters >= 1e9
        else f"{parameters / 1e6:.1f} million parameters"
    )


def _gib(amount: int) -> str:
    """Bytes in GiB, in three digits or so."""
    value = amount / GIB
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}" if value >= 0.01 or not amount else "<0.01"


def _hours(value: float | None) -> str:
    """Hours, in two digits or so where they are few."""
    return "<0.01" if value is not None and 0 < value < 0.01 else _number(value, 2 if value and value < 10 else 1)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
