"""Pipeline: the whole run, from problems to report. Start reading here.

Each step is a function from folders to a folder. What is complete is skipped, so the same command goes on
after whatever ended it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from raykd import (
    attention,
    completions,
    config,
    evaluate,
    generate,
    harness,
    journal,
    location,
    lock,
    metrics,
    placement,
    problems,
    rounds,
    storage,
    sweep,
    teacher,
)
from raykd.cluster import connected, is_on_a_node
from raykd.completions import Request
from raykd.config import Experiment
from raykd.faults import UserError
from raykd.job import outcome
from raykd.plan import Plan, resolve
from raykd.progress import say

# What is done on a cluster, in this order.
STAGES = ("generate", "train", "evaluate", "attention")
# How many trials are named on one line.
NAMED = 8


def run(experiment: Experiment, command: str, retry_failed: bool = False, stage: str = "run") -> Path:
    """Runs an experiment from problems to report, and returns its folder.

    Args:
        experiment: the experiment.
        command: what was typed, for the report.
        retry_failed: whether trials of a sweep that failed are tried again.
        stage: what this is called in Ray's dashboard.
    """
    plan = resolve(experiment, retry_failed)
    start(plan, command)
    if not plan.is_complete():
        with connected(plan.log, experiment.name, stage) as resources:
            check(plan, resources)
            make_completions(plan, resources)
            train_students(plan, resources)
            if plan.undrawn:
                # By now it is known which points there are.
                plan = resolve(experiment, retry_failed)
                start(plan, command)
            make_predictions(plan, resources)
            measure_attention(plan, resources)
    record(plan)
    # Not before there is something to draw.
    from raykd.report import write_report

    write_report(plan.folder)
    return plan.folder


def start(plan: Plan, command: str) -> None:
    """Write the problems, and record what is about to be done, before any work.

    Args:
        plan: the experiment, which `resolve` has found nothing wrong with.
        command: what was typed, for the report.
    """
    problems.prepare(plan.experiment.problems, plan.root)
    journal.begin(
        plan.experiment,
        plan.folder,
        problems=plan.problems,
        predictions=plan.predictions,
        attention=plan.attention,
        found=plan.identities(),
        trials=[job.trial_id for job in plan.jobs],
        command=command,
    )
    storage.write_text(plan.folder / "experiment.yaml", config.dump(plan.experiment))


def check(plan: Plan, resources: dict[str, float], stages: Sequence[str] = STAGES) -> None:
    """Before anything is started: what is still to be done must fit into the cluster, and prompts into the models.

    Args:
        plan: the experiment.
        resources: the cluster's, as Ray names them.
        stages: those that will run.

    Raises:
        UserError: with what does not fit, and the way out.
    """
    experiment, instruction = plan.experiment, plan.experiment.prompt.instruction
    pending = plan.pending if "train" in stages else []
    # Seeds of an arm ask the same.
    own = {job.lesson: job for job in pending if job.arm.targets.sequence == "student"}
    to_score = [(request, job.arm.targets.rollout) for name, job in own.items() if (request := plan.asked[name])]
    missing = completions.missing(plan.requests) if "generate" in stages else []
    will_serve = experiment.teacher.endpoint is None and bool(missing or to_score)
    will_predict = "evaluate" in stages and not plan.is_predicted()
    for name, engine, replicas, is_needed in (
        ("teacher", experiment.teacher.engine, experiment.teacher.replicas.min, will_serve),
        ("evaluate", experiment.evaluate.engine, 1, bool(own) or will_predict),
    ):
        if is_needed:
            kind = placement.accelerator(engine.accelerator, resources)
            placement.check_engine(f"{name}.engine", engine, kind, resources, replicas)
    students = experiment.evaluate.engine
    group = placement.engine_bundles(students, placement.accelerator(students.accelerator, resources))
    if location.is_remote(plan.root) and (own or will_predict) and not is_on_a_node(group):
        raise UserError(
            f"evaluate.engine: its {len(group)} processes do not fit onto one node, and Ray brings adapters from a "
            "bucket to one only; lower its tensor or pipeline parallel size, or give a folder that all nodes see as "
            "storage"
        )
    bounds = plan.undrawn.corners if plan.undrawn and "train" in stages else []
    for train in [job.arm.train for job in pending] + [each.arm.train for each in bounds]:
        placement.check_trial(train, placement.accelerator(train.accelerator, resources), resources)
    if plan.experiment.attention and "attention" in stages and not plan.is_measured():
        kind = placement.accelerator(plan.experiment.attention.accelerator, resources)
        placement.attention_workers(plan.experiment.attention, kind, resources)
    for requests, room in [
        *([[request], request.sampling.max_tokens] for request in missing),
        *([[request], sampling.max_tokens] for request, sampling in to_score),
    ]:
        generate.check_lengths(requests, plan.problems, experiment.teacher, instruction, room)
    told = experiment.evaluate
    answering = [
        (f"student of arm {job.arm_name!r}", "train", told.as_in_training(job.arm.targets.rollout))
        for job in own.values()
    ]
    if (pending or bounds) and experiment.sweep and experiment.sweep.metric == "accuracy":
        answering.append(("students", "validation", told.as_in_training(told.sampling)))
    if will_predict:
        answering.append(("students", "test", told))
    for whose, split, asked in answering:
        evaluate.check_lengths(plan.problems / f"{split}.parquet", experiment.student, asked, instruction, whose)


def make_completions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 2: the primed teacher, served, answers the training problems under every strategy."""
    experiment = plan.experiment
    with ExitStack() as locks:
        # Another experiment may be asking the same.
        for request in completions.missing(plan.requests):
            who, otherwise = f"experiment {experiment.name!r}", " (it asks the same)"
            locks.enter_context(lock.held(request.folder, who, otherwise, say))
        if missing := completions.missing(plan.requests):
            _ask_teacher(plan, missing, resources)


def _ask_teacher(plan: Plan, missing: list[Request], resources: dict[str, float]) -> None:
    experiment = plan.experiment
    app = teacher.app_name(experiment.name)
    top_k, versions = max(request.top_k for request in missing), journal.versions()
    held = placement.teacher_processors(experiment.teacher, resources)
    with (
        journal.timed(plan.folder, "completions"),
        journal.occupied(plan.folder, journal.TEACHER, *held),
        teacher.served(experiment.teacher, top_k, app, resources),
    ):
        given = (plan.problems, experiment.teacher, experiment.prompt.instruction)
        generate.generate(missing, *given, app, experiment.name, versions)


def train_students(plan: Plan, resources: dict[str, float]) -> None:
    """Step 3: every arm with every seed becomes a LoRA student, a trial of Ray Tune each."""
    experiment, pending = plan.experiment, plan.pending
    if not pending and not plan.undrawn:
        return
    metrics.show_trials(experiment.name, {job.trial_id: outcome(job) for job in plan.jobs})
    if plan.undrawn:
        say(f"training {plan.undrawn.num_trials} students at points that Optuna chooses by what others reach")
    if pending:
        named = ", ".join(job.trial_id for job in pending[:NAMED]) + (", …" if len(pending) > NAMED else "")
        say(f"training {len(pending)} students with DeepSpeed ({named})")
    on_policy = [job for job in pending if job.arm.targets.sequence == "student"]
    given = [job for job in pending if job.arm.targets.sequence != "student"]
    with journal.timed(plan.folder, "students"):
        if given or plan.undrawn:
            over = [job for job in plan.jobs if job.trial_id not in {each.trial_id for each in pending}]
            sweep.run(given, experiment, plan.folder, resources, over, plan.undrawn)
        if on_policy:
            rounds.run(on_policy, plan.asked, experiment, plan.problems, plan.folder, resources, journal.versions())


def make_predictions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 4: all adapters, and the untouched student, answer the test problems in one engine."""
    if plan.is_predicted():
        return
    experiment = plan.experiment
    kind = placement.accelerator(experiment.evaluate.engine.accelerator, resources)
    say(f"starting the engine for {len(plan.contestants)} students ({kind})")
    held = placement.engine_processors(experiment.evaluate.engine, resources)
    given = (plan.problems, experiment.student, experiment.evaluate, experiment.prompt.instruction)
    with journal.timed(plan.folder, "predictions"), journal.occupied(plan.folder, journal.ANSWERS, *held):
        evaluate.evaluate(plan.contestants, *given, kind, plan.predictions)


def measure_attention(plan: Plan, resources: dict[str, float]) -> None:
    """Step 5: all students read the same solutions, and it is measured what their attention heads look at."""
    told, folder = plan.experiment.attention, plan.attention
    if told is None or folder is None or plan.is_measured():
        return
    experiment = plan.experiment
    kind = placement.accelerator(told.accelerator, resources)
    workers = placement.attention_workers(told, kind, resources)
    say(f"reading the same solutions with {len(plan.contestants)} students ({kind})")
    given = (plan.problems, experiment.student, told, plan.attention_dtype, experiment.prompt.instruction)
    with journal.timed(plan.folder, "attention"), journal.occupied(plan.folder, journal.ATTENTION, kind, workers):
        errors = attention.measure(plan.contestants, *given, kind, workers, folder)
    if errors:
        say(f"attention: {errors} texts could not be read; the report says why")


def record(plan: Plan) -> None:
    """Step 6: what a report needs beside the rows: the teacher's counts, and the test as a task of lm-eval.

    After it a report is written from the experiment's folder alone.
    """
    journal.note_completions(plan.folder, plan.experiment.teacher.model, plan.teachings)
    evaluate.collect(plan.predictions.parent, plan.folder / "predictions.parquet")
    tasks = plan.folder / harness.FOLDER
    harness.write_task(plan.experiment, plan.problems, tasks)
    # Of the student that was asked last; the others' differ in the adapter.
    adapter = plan.contestants[-1].adapter
    journal.note(plan.folder, "harness", harness.command(plan.experiment, tasks, str(adapter or "")))
