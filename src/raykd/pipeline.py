"""Pipeline: the whole run, from problems to report. Start reading here.

Each step is a function from folders to a folder. What is complete is skipped, so the same command goes on
after whatever ended it.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raykd import (
    attention,
    completions,
    config,
    evaluate,
    finalists,
    generate,
    harness,
    journal,
    location,
    lock,
    metrics,
    models,
    placement,
    problems,
    rounds,
    storage,
    study,
    sweep,
    teacher,
    tracking,
)
from raykd.cluster import connected, is_on_a_node
from raykd.completions import Request
from raykd.config import Experiment
from raykd.job import Job, outcome
from raykd.progress import LOG, say
from raykd.study import Make, Undrawn
from raykd.variants import Point, Variant, arm_of, at, corners, lessons, variants

# What is done on a cluster, in this order.
STAGES = ("generate", "train", "evaluate", "attention")
# How many trials are named on one line.
NAMED = 8


@dataclass(frozen=True)
class Plan:
    """An experiment with its models found, and where all of it lies."""

    experiment: Experiment
    root: Path
    folder: Path
    problems: Path
    teacher_model: dict[str, str]
    student_model: dict[str, str]
    same_tokens: bool
    variants: list[Variant]
    """What is trained on."""
    asked: dict[str, Request | None]
    """For each of `variants.lessons` the completions it is about; None where nothing is asked of the teacher."""
    retry_failed: bool
    """Whether trials of a sweep that failed are tried again."""
    undrawn: Undrawn | None
    """The points of a sweep that will be chosen by what others reach; None where all are known."""

    @property
    def predictions(self) -> Path:
        """Where the students' answers to the test problems are: other folders for other ways of asking."""
        return self.folder / "predictions" / evaluate.folder_name(self.experiment.evaluate)

    @property
    def attention(self) -> Path | None:
        """Where it is what the students' attention heads did; None where that is not measured."""
        told = self.experiment.attention
        return self.folder / "attention" / attention.folder_name(told, self.attention_dtype) if told else None

    @property
    def attention_dtype(self) -> str:
        """The type of the model whose attention is measured."""
        told = self.experiment.attention
        return (told.dtype if told else None) or self.experiment.train.dtype

    @property
    def log(self) -> Path:
        """Where libraries write what they have to say."""
        return self.folder / LOG

    @property
    def requests(self) -> list[Request]:
        """The distinct sets of completions that the arms need before they are trained."""
        asked = [request for request in self.asked.values() if request and request.sequence != "student"]
        return list({request.folder: request for request in asked}.values())

    @property
    def teachings(self) -> list[journal.Teaching]:
        """All that the teacher wrote or scored, and for which arms."""
        arms: dict[Path, dict[str, None]] = {}
        for lesson, request in self.asked.items():
            if request:
                arms.setdefault(request.folder, {})[arm_of(lesson)] = None
        given = [journal.Teaching(each, list(arms[each.folder]), [each.folder]) for each in self.requests]
        scored: dict[str, list[Path]] = {}
        for job in self.jobs:
            if job.arm.targets.sequence == "student":
                scored.setdefault(job.lesson, []).extend(rounds.scored(job))
        own = [
            journal.Teaching(request, [arm_of(lesson)], folders)
            for lesson, folders in scored.items()
            if (request := self.asked[lesson])
        ]
        return given + own

    @cached_property
    def jobs(self) -> list[Job]:
        """The trials."""
        found = (self.problems, self.asked, self.student_model, self.same_tokens, self.folder)
        return sweep.jobs(self.experiment, self.variants, *found)

    @property
    def pending(self) -> list[Job]:
        """The trials that have not come to their end."""
        return sweep.pending(self.jobs, self.retry_failed)

    @property
    def contestants(self) -> list[evaluate.Contestant]:
        """Who answers the test problems: the untouched student, and every adapter that is there and goes so far."""
        adapters = [
            evaluate.Contestant(job.trial_id, job.arm_name, job.seed, job.folder / "adapter", job.arm.student.lora.rank)
            for job in finalists.of(self.jobs, self.experiment.sweep)
        ]
        return [evaluate.UNTOUCHED_STUDENT, *adapters]

    def is_complete(self) -> bool:
        """Whether nothing is left but to write the report."""
        is_trained = not self.pending and not self.undrawn
        return not completions.missing(self.requests) and is_trained and _are_predicted(self) and _is_measured(self)


def run(experiment: Experiment, command: str, retry_failed: bool = False, stage: str = "run") -> Path:
    """Runs an experiment from problems to report, and returns its folder.

    Args:
        experiment: the experiment.
        command: what was typed, for the report.
        retry_failed: whether trials of a sweep that failed are tried again.
        stage: what this is called in Ray's dashboard.
    """
    plan = prepare(experiment, command, retry_failed)
    if not plan.is_complete():
        with connected(plan.log, experiment.name, stage) as resources:
            check(plan, resources)
            make_completions(plan, resources)
            train_students(plan, resources)
            if plan.undrawn:
                # By now it is known which points there are.
                plan = prepare(experiment, command, retry_failed)
            make_predictions(plan, resources)
            measure_attention(plan, resources)
    write_report(plan)
    return plan.folder


def prepare(experiment: Experiment, command: str, retry_failed: bool = False) -> Plan:
    """Step 1: finds the models, writes the problems, and claims the experiment's folder.

    Raises:
        ValueError: where something that the experiment names is not there or does not fit together.
    """
    root = location.at(experiment.storage)
    folder = root / "experiments" / experiment.name
    tracking.check(experiment.tracking, folder)
    journal.claim(experiment, folder)
    for named in (experiment.teacher, experiment.student):
        if named.trust_remote_code:
            say(f"warning: code that comes with {named.model} is run (trust_remote_code)")
    teacher_model = models.identify(experiment.teacher)
    student_model = models.identify(experiment.student)
    teacher_tokenizer = models.teacher_tokenizer(experiment.teacher)
    student_tokenizer = models.load_tokenizer(experiment.student)
    # Where the teacher gives text alone, the student reads it by its own tokenizer.
    same_tokens = teacher_tokenizer is not None and models.same_tokens(teacher_tokenizer, student_tokenizer)
    drawn = study.drawn(experiment, folder)
    trained = variants(experiment, drawn)
    bounds = corners(experiment) if experiment.sweep and experiment.sweep.search == "optuna" else []
    for variant in [*trained, *bounds]:
        if variant.arm.targets.kind == "top_k" and not same_tokens:
            raise ValueError(
                f"arm {variant.arm_name!r}: soft targets need one tokenizer, but {experiment.teacher.model} and "
                f"{experiment.student.model} have different ones; set targets.kind=hard"
            )
    if any(variant.arm.train.packing for variant in [*trained, *bounds]):
        models.check_packing(experiment.student)
    splits = problems.prepare(experiment.problems, root)
    for variant in trained:
        arm = variant.arm
        steps = arm.train.epochs * math.ceil(problems.split_size(splits, "train") / arm.train.batch_size)
        if arm.targets.sequence == "student" and arm.targets.rounds > steps:
            raise ValueError(
                f"arm {variant.arm_name!r}: targets.rounds={arm.targets.rounds} is more than its {steps} optimizer "
                "steps"
            )
    asked = completions.of_arms(experiment, lessons([*trained, *bounds]), splits, root, teacher_model)

    def make(name: str, point: Point) -> list[Job]:
        variant = at(experiment, name, point)
        own = completions.of_arms(experiment, lessons([variant]), splits, root, teacher_model)
        return sweep.jobs(experiment, [variant], splits, own, student_model, same_tokens, folder)

    undrawn = _undrawn(experiment, drawn, make, bounds)
    found = (splits, teacher_model, student_model, same_tokens, trained, asked)
    plan = Plan(experiment, root, folder, *found, retry_failed, undrawn)
    identities = {"teacher": teacher_model, "student": student_model}
    trials = [job.trial_id for job in plan.jobs]
    where = (plan.problems, plan.predictions, plan.attention)
    journal.begin(experiment, folder, *where, identities, trials, command)
    storage.write_text(folder / "experiment.yaml", config.dump(experiment))
    return plan


def _undrawn(
    experiment: Experiment, drawn: Mapping[str, Sequence[Point]], make: Make, bounds: list[Variant]
) -> Undrawn | None:
    """What a search that chooses by results has left to choose."""
    if experiment.sweep is None or not bounds:
        return None
    num_points = sum(experiment.sweep.num_samples - len(points) for points in drawn.values())
    num_trials = num_points * len(experiment.seeds)
    return Undrawn(make, bounds, num_trials) if num_trials else None


def check(plan: Plan, resources: dict[str, float], stages: Sequence[str] = STAGES) -> None:
    """Before anything is started: what is still to be done must fit into the cluster, and prompts into the models.

    Args:
        plan: the experiment.
        resources: the cluster's, as Ray names them.
        stages: those that will run.

    Raises:
        ValueError: with what does not fit, and the way out.
    """
    experiment, instruction = plan.experiment, plan.experiment.prompt.instruction
    pending = plan.pending if "train" in stages else []
    # Seeds of an arm ask the same.
    own = {job.lesson: job for job in pending if job.arm.targets.sequence == "student"}
    to_score = [(request, job.arm.targets.rollout) for name, job in own.items() if (request := plan.asked[name])]
    missing = completions.missing(plan.requests) if "generate" in stages else []
    will_serve = experiment.teacher.endpoint is None and bool(missing or to_score)
    will_predict = "evaluate" in stages and not _are_predicted(plan)
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
        raise ValueError(
            f"evaluate.engine: its {len(group)} processes do not fit onto one node, and Ray brings adapters from a "
            "bucket to one only; lower its tensor or pipeline parallel size, or give a folder that all nodes see as "
            "storage"
        )
    bounds = plan.undrawn.corners if plan.undrawn and "train" in stages else []
    for train in [job.arm.train for job in pending] + [each.arm.train for each in bounds]:
        placement.check_trial(train, placement.accelerator(train.accelerator, resources), resources)
    if plan.experiment.attention and "attention" in stages and not _is_measured(plan):
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
    if _are_predicted(plan):
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
    if told is None or folder is None or _is_measured(plan):
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


def write_report(plan: Plan) -> None:
    """Step 6: tables and plots from the rows, and the test as a task of lm-evaluation-harness."""
    # Not before there is something to draw.
    from raykd.report import write_report as write

    journal.note_completions(plan.folder, plan.experiment.teacher.model, plan.teachings)
    evaluate.collect(plan.predictions.parent, plan.folder / "predictions.parquet")
    tasks = plan.folder / harness.FOLDER
    harness.write_task(plan.experiment, plan.problems, tasks)
    # Of the student that was asked last; the others' differ in the adapter.
    adapter = plan.contestants[-1].adapter
    journal.note(plan.folder, "harness", harness.command(plan.experiment, tasks, str(adapter or "")))
    write(plan.folder)


def _is_measured(plan: Plan) -> bool:
    return not plan.attention or _holds_all(plan, plan.attention)


def _are_predicted(plan: Plan) -> bool:
    return _holds_all(plan, plan.predictions)


def _holds_all(plan: Plan, folder: Path) -> bool:
    """Whether a folder is complete, and of the students that there are now."""
    manifest = storage.read_manifest(folder)
    return manifest is not None and manifest["trials"] == [each.trial_id for each in plan.contestants]
