"""The whole run, from problems to report. Start reading here.

Each step is a function from folders to a folder. Completed steps are skipped, so the same command resumes an
interrupted run.
"""

from contextlib import ExitStack
from pathlib import Path

from raykd.cluster.connection import connected
from raykd.cluster.resources import attention_workers, engine_processors, resolve_accelerator, teacher_processors
from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment
from raykd.data import datasets
from raykd.evaluation import attention, evaluate, lm_eval_task
from raykd.pipeline import run_record
from raykd.pipeline.on_policy import run_on_policy
from raykd.pipeline.plan import Plan, resolve
from raykd.pipeline.preflight import preflight
from raykd.runtime import metrics
from raykd.runtime.console import print_status
from raykd.storage import files, lock
from raykd.storage.paths import ExperimentPaths
from raykd.teacher import completion_set, generate, server
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import trial_status
from raykd.tuning import tuner

# How many trials are named on one line.
MAX_NAMED_TRIALS = 8


def run_experiment(experiment: Experiment, command: str, retry_failed: bool = False, stage: str = "run") -> Path:
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
            preflight(plan, resources)
            generate_completions(plan, resources)
            train_students(plan, resources)
            if plan.pending_search:
                # By now it is known which points there are.
                plan = resolve(experiment, retry_failed)
                start(plan, command)
            make_predictions(plan, resources)
            measure_attention(plan, resources)
    record_results(plan)
    # Not before there is something to draw.
    from raykd.report.build import write_report

    write_report(plan.folder)
    return plan.folder


def start(plan: Plan, command: str) -> None:
    """Write the problems, and record what is about to be done, before any work.

    Args:
        plan: the experiment, which `resolve` has found nothing wrong with.
        command: what was typed, for the report.
    """
    datasets.write_splits(plan.experiment.dataset, plan.root)
    run_record.start(
        plan.experiment,
        plan.folder,
        problems=plan.problems,
        predictions=plan.predictions,
        attention=plan.attention,
        found=plan.identities(),
        trials=[job.trial_id for job in plan.jobs],
        command=command,
    )
    files.write_text(ExperimentPaths(plan.folder).config, dump_experiment(plan.experiment))


def generate_completions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 2: the primed teacher, served, answers the training problems under every strategy."""
    experiment = plan.experiment
    with ExitStack() as locks:
        # Another experiment may be asking the same.
        for request in completion_set.missing_sets(plan.requests):
            who, otherwise = f"experiment {experiment.name!r}", " (it asks the same)"
            locks.enter_context(lock.folder_lock(request.folder, who, otherwise, print_status))
        if missing := completion_set.missing_sets(plan.requests):
            _ask_teacher(plan, missing, resources)


def _ask_teacher(plan: Plan, missing: list[CompletionSet], resources: dict[str, float]) -> None:
    experiment = plan.experiment
    app = server.app_name(experiment.name)
    top_k, versions = max(request.top_k for request in missing), run_record.versions()
    held = teacher_processors(experiment.teacher, resources)
    with (
        run_record.track_time(plan.folder, "completions"),
        run_record.track_processors(plan.folder, run_record.TEACHER_ROLE, *held),
        server.serve_teacher(experiment.teacher, top_k, app, resources),
    ):
        context = generate.GenerationContext(
            plan.problems, experiment.teacher, experiment.prompt.instruction, app, experiment.name, versions
        )
        generate.generate_completions(missing, context)


def train_students(plan: Plan, resources: dict[str, float]) -> None:
    """Step 3: every arm with every seed becomes a LoRA student, a trial of Ray Tune each."""
    experiment, pending = plan.experiment, plan.pending
    if not pending and not plan.pending_search:
        return
    metrics.show_trials(experiment.name, {job.trial_id: trial_status(job) for job in plan.jobs})
    if plan.pending_search:
        print_status(
            f"training {plan.pending_search.num_trials} students at points that Optuna chooses by what others reach"
        )
    if pending:
        named = ", ".join(job.trial_id for job in pending[:MAX_NAMED_TRIALS]) + (
            ", …" if len(pending) > MAX_NAMED_TRIALS else ""
        )
        print_status(f"training {len(pending)} students with DeepSpeed ({named})")
    on_policy = [job for job in pending if job.arm.targets.source == "student"]
    given = [job for job in pending if job.arm.targets.source != "student"]
    with run_record.track_time(plan.folder, "students"):
        if given or plan.pending_search:
            over = [job for job in plan.jobs if job.trial_id not in {each.trial_id for each in pending}]
            tuner.run_trials(given, experiment, plan.folder, resources, over, plan.pending_search)
        if on_policy:
            run_on_policy(
                on_policy, plan.asked, experiment, plan.problems, plan.folder, resources, run_record.versions()
            )


def make_predictions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 4: all adapters, and the base student, answer the test problems in one engine."""
    if plan.is_predicted():
        return
    experiment = plan.experiment
    kind = resolve_accelerator(experiment.evaluate.engine.accelerator, resources)
    print_status(f"starting the engine for {len(plan.eval_models)} students ({kind})")
    held = engine_processors(experiment.evaluate.engine, resources)
    with (
        run_record.track_time(plan.folder, "predictions"),
        run_record.track_processors(plan.folder, run_record.ANSWERS_ROLE, *held),
    ):
        evaluate.evaluate_students(
            plan.eval_models,
            problems=plan.problems,
            student=experiment.student,
            evaluation=experiment.evaluate,
            instruction=experiment.prompt.instruction,
            accelerator=kind,
            folder=plan.predictions,
        )


def measure_attention(plan: Plan, resources: dict[str, float]) -> None:
    """Step 5: all students read the same solutions, and it is measured what their attention heads look at."""
    told, folder = plan.experiment.attention, plan.attention
    if told is None or folder is None or plan.is_measured():
        return
    experiment = plan.experiment
    kind = resolve_accelerator(told.accelerator, resources)
    workers = attention_workers(told, kind, resources)
    print_status(f"reading the same solutions with {len(plan.eval_models)} students ({kind})")
    with (
        run_record.track_time(plan.folder, "attention"),
        run_record.track_processors(plan.folder, run_record.ATTENTION_ROLE, kind, workers),
    ):
        errors = attention.measure_attention(
            plan.eval_models,
            problems=plan.problems,
            student=experiment.student,
            attention=told,
            dtype=plan.attention_dtype,
            instruction=experiment.prompt.instruction,
            accelerator=kind,
            num_workers=workers,
            folder=folder,
        )
    if errors:
        print_status(f"attention: {errors} texts could not be read; the report says why")


def record_results(plan: Plan) -> None:
    """Step 6: what a report needs beside the rows: the teacher's counts, and the test as a task of lm-eval.

    After it a report is written from the experiment's folder alone.
    """
    run_record.record_completions(plan.folder, plan.experiment.teacher.model, plan.teacher_usages)
    evaluate.collect_predictions(plan.predictions.parent, ExperimentPaths(plan.folder).all_predictions)
    tasks = ExperimentPaths(plan.folder).lm_eval
    lm_eval_task.write_task(plan.experiment, plan.problems, tasks)
    # Of the student that was asked last; the others' differ in the adapter.
    adapter = plan.eval_models[-1].adapter
    run_record.set_entry(
        plan.folder, "harness", lm_eval_task.lm_eval_command(plan.experiment, tasks, str(adapter or ""))
    )
