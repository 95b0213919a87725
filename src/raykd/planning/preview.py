"""Preview: what will be sent to whom, and in what arms differ, before anything is started."""

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from raykd import identity
from raykd.config.experiment import Experiment
from raykd.config.overrides import flatten
from raykd.data import datasets, prompts
from raykd.data.prompts import Messages
from raykd.errors import UserError
from raykd.models import loading, tokenization
from raykd.storage import filesystem


def arms_table(experiment: Experiment) -> Table:
    """The arms, each with every field in which not all of them agree, or that one of them names."""
    leaves = {name: dict(flatten(identity.effective_config(experiment.arm(name)), "")) for name in experiment.arms}
    paths = dict.fromkeys(path for each in leaves.values() for path in each)
    found = {path: {json.dumps(each[path]) for each in leaves.values() if path in each} for path in paths}
    named = {path for overrides in experiment.arms.values() for path, _ in flatten(overrides, "")}
    differing = [path for path in paths if len(found[path]) > 1 or path in named]
    title = Text(f"{experiment.name}: arms differ in nothing but this")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Folded rather than cut: names and values are what the table is for.
    table.add_column("Arm", overflow="fold")
    for path in differing:
        table.add_column(Text(path.replace(".", ".\n")), overflow="fold")
    for name, each in leaves.items():
        table.add_row(Text(name), *(Text(_shown(each.get(path))) for path in differing))
    return table


def describe_search(experiment: Experiment) -> str:
    """What a sweep would train and ask, in a few lines; empty where the experiment has none.

    Raises:
        UserError: where an arm and a point do not go together.
    """
    if experiment.sweep is None:
        return ""
    # Loads Ray Tune, which takes seconds.
    from raykd.tuning.variants import boundary_configs, random_points, variants

    told, seeds = experiment.sweep, len(experiment.seeds)
    at_random = told.search == "random"
    found = (
        variants(experiment, dict.fromkeys(experiment.arms, random_points(told)))
        if at_random
        else boundary_configs(experiment)
    )
    chosen = "drawn, the same for every arm" if at_random else "chosen by Optuna for each arm"
    lines = [f"sweep: {told.num_samples} points {chosen}; stopped early: {told.scheduler}"]
    for path, axis in told.space.items():
        ((way, values),) = axis.model_dump(exclude_defaults=True).items()
        lines.append(f"  {path}: {way} {json.dumps(values)}")
    for name in experiment.arms:
        number = sum(each.arm_name == name for each in found) if at_random else told.num_samples
        lines.append(f"  arm {name}: {number} points x {seeds} seeds = {number * seeds} trials")
    measured = f"{told.metric} on {experiment.dataset.num_validation} validation problems"
    lines.append(f"  each is measured {told.num_validations} times: {measured}")
    tested = "all that are trained to the end" if told.test_top_n is None else f"the best {told.test_top_n} of each arm"
    lines.append(f"  asked the test problems: {tested}, and the base student")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def render_prompts(experiment: Experiment, wanted: str) -> str:
    """What teacher and student are sent for one training problem, by each model's own chat template.

    Args:
        experiment: the experiment; its problems are read, and not written.
        wanted: the problem's number in the training split, or its id.

    Raises:
        UserError: where there is no such problem.
    """
    problem = _problem(datasets.read_split(experiment.dataset, filesystem.resolve(experiment.storage), "train"), wanted)
    teacher = loading.teacher_tokenizer(experiment.teacher)
    student = loading.load_tokenizer(experiment.student)
    instruction = experiment.prompt.instruction
    blocks = [f"problem {problem['problem_id']}, reference answer {problem['reference_answer']}"]
    asking: dict[str, list[str]] = {}
    for name in experiment.arms:
        if (arm := experiment.arm(name)).needs_teacher:
            asking.setdefault(arm.prompt.strategy, []).append(name)
    for name, arms_of_it in asking.items():
        title = f"teacher {experiment.teacher.model}, strategy {name} (arms: {', '.join(arms_of_it)})"
        messages = prompts.teacher_messages(problem, experiment.strategies[name], instruction)
        blocks.append(_rendered(title, teacher, messages))
    messages = prompts.student_messages(problem, instruction)
    blocks.append(_rendered(f"student {experiment.student.model}, every arm", student, messages))
    protocol = experiment.evaluate.protocol
    if protocol != "zero_shot_chat":
        tokens = len(tokenization.question_token_ids(student, problem, instruction, protocol))
        text = tokenization.question_text(student, problem, instruction, protocol)
        blocks.append(f"--- student, as the test problems are asked ({protocol}): {tokens} tokens\n{text}")
    return "\n\n".join(blocks)


def _problem(rows: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    ids = [row["problem_id"] for row in rows]
    if wanted in ids:
        number = ids.index(wanted)
    # Of decimal digits alone int() makes a number, and of not too many.
    elif wanted.isdecimal() and len(wanted) < 19 and int(wanted) < len(ids):
        number = int(wanted)
    else:
        raise UserError(f"no training problem {wanted!r}: give a number below {len(ids)}, or an id such as {ids[0]!r}")
    return rows[number]


def _rendered(title: str, tokenizer: Any, messages: Messages) -> str:
    if tokenizer is None:
        return "\n".join([f"--- {title}: messages", *(f"[{each['role']}]\n{each['content']}" for each in messages)])
    text = tokenization.prompt_text(tokenizer, messages)
    tokens = len(tokenization.prompt_token_ids(tokenizer, messages))
    return f"--- {title}: {tokens} tokens\n{text}"
