"""Preview of an experiment before it starts: differences between arms, trials of a sweep, and rendered prompts."""

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from raykd import identity
from raykd.config.experiment import Experiment
from raykd.config.overrides import flatten
from raykd.data import datasets, prompts
from raykd.data.prompts import Messages
from raykd.errors import UserError
from raykd.models import loading, tokenization
from raykd.runtime.rich_console import cell
from raykd.storage import filesystem


def arms_table(experiment: Experiment) -> Table:
    """Return the arms with the fields in which they differ, or that an arm sets."""
    configs = {name: dict(flatten(identity.effective_config(experiment.arm(name)), "")) for name in experiment.arms}
    paths = dict.fromkeys(path for config in configs.values() for path in config)
    values = {path: {json.dumps(config[path]) for config in configs.values() if path in config} for path in paths}
    overridden = {path for overrides in experiment.arms.values() for path, _ in flatten(overrides, "")}
    differing = [path for path in paths if len(values[path]) > 1 or path in overridden]
    title = cell(f"{experiment.name}: arms, and all fields in which they differ")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Folded, not cut: names and values must stay complete.
    table.add_column("Arm", overflow="fold")
    for path in differing:
        table.add_column(cell(path.replace(".", ".\n")), overflow="fold")
    for name, config in configs.items():
        table.add_row(cell(name), *(cell(_format_value(config.get(path))) for path in differing))
    return table


def describe_search(experiment: Experiment) -> str:
    """Return a description of a sweep in a few lines; empty where the experiment has none.

    Raises:
        UserError: where a point is invalid for an arm.
    """
    if experiment.sweep is None:
        return ""
    # This import loads Ray Tune, which takes seconds.
    from raykd.tuning.variants import boundary_configs, random_points, variants

    sweep, num_seeds = experiment.sweep, len(experiment.seeds)
    is_random = sweep.search == "random"
    if is_random:
        points = variants(experiment, dict.fromkeys(experiment.arms, random_points(sweep)))
        source = "drawn at random, the same for every arm"
    else:
        # Checks that every arm is valid at the bounds of the search space.
        points = boundary_configs(experiment)
        source = "chosen by Optuna for each arm"
    lines = [f"sweep: {sweep.num_samples} points {source}; scheduler: {sweep.scheduler}"]
    for path, axis in sweep.space.items():
        ((distribution, values),) = axis.model_dump(exclude_defaults=True).items()
        lines.append(f"  {path}: {distribution} {json.dumps(values)}")
    for name in experiment.arms:
        number = sum(point.arm_name == name for point in points) if is_random else sweep.num_samples
        lines.append(f"  arm {name}: {number} points x {num_seeds} seeds = {number * num_seeds} trials")
    num_validation = experiment.dataset.num_validation
    lines.append(f"  validation: {sweep.metric} on {num_validation} problems, {sweep.num_validations} times a trial")
    tested = "all completed trials" if sweep.test_top_n is None else f"the best {sweep.test_top_n} of each arm"
    lines.append(f"  test problems: {tested}, and the base student")
    return "\n".join(lines)


def _format_value(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def render_prompts(experiment: Experiment, problem_id: str) -> str:
    """Return the prompts of teacher and student for one training problem, in each model's chat template.

    Args:
        experiment: the experiment; its dataset is read, and nothing is written.
        problem_id: the problem's id, or its number in the training split.

    Raises:
        UserError: where there is no such problem.
    """
    rows = datasets.read_split(experiment.dataset, filesystem.resolve(experiment.storage), "train")
    problem = _problem(rows, problem_id)
    teacher = loading.teacher_tokenizer(experiment.teacher)
    student = loading.load_tokenizer(experiment.student)
    instruction = experiment.prompt.instruction
    blocks = [f"problem {problem['problem_id']}, reference answer {problem['reference_answer']}"]
    arms_by_strategy: dict[str, list[str]] = {}
    for name in experiment.arms:
        if (arm := experiment.arm(name)).needs_teacher:
            arms_by_strategy.setdefault(arm.prompt.strategy, []).append(name)
    for name, arms in arms_by_strategy.items():
        title = f"teacher {experiment.teacher.model}, strategy {name} (arms: {', '.join(arms)})"
        messages = prompts.teacher_messages(problem, experiment.strategies[name], instruction)
        blocks.append(_render(title, teacher, messages))
    messages = prompts.student_messages(problem, instruction)
    blocks.append(_render(f"student {experiment.student.model}, every arm", student, messages))
    protocol = experiment.evaluate.protocol
    if protocol != "zero_shot_chat":
        tokens = len(tokenization.question_token_ids(student, problem, instruction, protocol))
        text = tokenization.question_text(student, problem, instruction, protocol)
        blocks.append(f"--- student, test problems ({protocol}): {tokens} tokens\n{text}")
    return "\n\n".join(blocks)


def _problem(rows: list[dict[str, Any]], problem_id: str) -> dict[str, Any]:
    ids = [row["problem_id"] for row in rows]
    if problem_id in ids:
        number = ids.index(problem_id)
    # int() raises ValueError for more than 4,300 digits.
    elif problem_id.isdecimal() and len(problem_id) < 19 and int(problem_id) < len(ids):
        number = int(problem_id)
    else:
        raise UserError(
            f"no training problem {problem_id!r}; give a number below {len(ids)}, or an id such as {ids[0]!r}"
        )
    return rows[number]


def _render(title: str, tokenizer: Any, messages: Messages) -> str:
    if tokenizer is None:
        turns = [f"[{message['role']}]\n{message['content']}" for message in messages]
        return "\n".join([f"--- {title}: messages", *turns])
    text = tokenization.prompt_text(tokenizer, messages)
    tokens = len(tokenization.prompt_token_ids(tokenizer, messages))
    return f"--- {title}: {tokens} tokens\n{text}"
