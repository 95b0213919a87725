"""The whole run, from problems to report. Start reading here.

Each step reads folders and writes one. A completed step is skipped, so the same command resumes an interrupted run.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from raykd.cluster.connection import connected
from raykd.cluster.resources import attention_workers, engine_processors, resolve_accelerator, teacher_processors
from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment
from raykd.data import datasets
from raykd.evaluation import attention, evaluate, lm_eval_task
from raykd.pipeline import preflight, run_record
from raykd.pipeline.on_policy import StageContext, run_on_policy
from raykd.pipeline.plan import STAGES, Plan, resolve
from raykd.report.build import write_report
from raykd.runtime import metrics
from raykd.runtime.console import print_status
from raykd.storage import files, lock
from raykd.storage.paths import ExperimentPaths
from raykd.teacher import completion_set, generate, server
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import TrialSpec, trial_status
from raykd.tuning import tuner

# Trials that a status line names.
MAX_NAMED_TRIALS = 8


def run_experiment(experiment: Experiment, command: str, retry_failed: bool = False, stage: str = "run") -> Path:
    """Run an experiment from problems to report, and return its folder.

    Args:
        experiment: the experiment.
        command: the command line, for the report.
        retry_failed: whether failed trials of a sweep are retried.
        stage: the name of the run in Ray's dashboard.
    """
    plan = resolve(experiment, retry_failed)
    if plan.is_complete():
        start(plan, command)
    else:
        with connected(plan.log, experiment.name, stage) as resources:
            check_and_start(plan, command, resources)
            generate_completions(plan, resources)
            train_students(plan, resources)
            if plan.pending_search:
                # The search has chosen its points: the plan now knows all trials.
                plan = resolve(experiment, retry_failed)
                start(plan, command)
            make_predictions(plan, resources)
            measure_attention(plan, resources)
    record_results(plan)
    write_report(plan.folder)
    return plan.folder


def check_and_start(plan: Plan, command: str, resources: dict[str, float], stages: Sequence[str] = STAGES) -> None:
    """Check that the remaining work fits, then start.

    An experiment that is refused leaves no record, so its configuration can still change under the same name.

    Args:
        plan: the resolved experiment.
        command: the command line, for the report.
        resources: the cluster's resources, by Ray's names.
        stages: the stages that will run, of `STAGES`.

    Raises:
        UserError: if something does not fit.
    """
    datasets.write_splits(plan.experiment.dataset, plan.root)
    preflight.preflight(plan, resources, stages)
    _write_record(plan, command, has_work=True)


def start(plan: Plan, command: str) -> None:
    """Write the problems, the configuration and the run record, before any other work.

    Args:
        plan: the resolved experiment.
        command: the command line, for the report; only recorded if it is the first.
    """
    datasets.write_splits(plan.experiment.dataset, plan.root)
    _write_record(plan, command, has_work=False)


def _write_record(plan: Plan, command: str, has_work: bool) -> None:
    run_record.start(
        plan.experiment,
        plan.folder,
        problems=plan.problems,
        predictions=plan.predictions,
        attention=plan.attention,
        identities=plan.identities(),
        trials=[trial.trial_id for trial in plan.trials],
        command=command,
        has_work=has_work,
    )
    files.write_text(ExperimentPaths(plan.folder).config, dump_experiment(plan.experiment))


def generate_completions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 2: generate the primed teacher's completions of the training problems under every strategy."""
    owner = f"experiment {plan.experiment.name!r}"
    with ExitStack() as locks:
        # Experiments share completion sets: another one may be generating the same.
        for each in completion_set.missing_sets(plan.required_sets):
            locks.enter_context(lock.folder_lock(each.folder, owner, " (same completions)", print_status))
        if missing := completion_set.missing_sets(plan.required_sets):
            _generate_missing(plan, missing, resources)


def _generate_missing(plan: Plan, missing: list[CompletionSet], resources: dict[str, float]) -> None:
    experiment = plan.experiment
    app = server.app_name(experiment.name)
    top_k = max(each.top_k for each in missing)
    accelerator, num_processors = teacher_processors(experiment.teacher, resources)
    with (
        run_record.track_time(plan.folder, "generate"),
        run_record.track_processors(plan.folder, run_record.TEACHER_ROLE, accelerator, num_processors),
        server.serve_teacher(experiment.teacher, top_k, app, resources),
    ):
        context = generate.GenerationContext(
            problems_dir=plan.problems,
            teacher=experiment.teacher,
            instruction=experiment.prompt.instruction,
            app=app,
            experiment=experiment.name,
        )
        generate.generate_completions(missing, context)


def train_students(plan: Plan, resources: dict[str, float]) -> None:
    """Step 3: train a LoRA student for every arm, point and seed, each as a trial of Ray Tune."""
    pending = plan.pending_trials()
    if not pending and not plan.pending_search:
        return
    _show_trials(plan, pending)
    on_policy = [trial for trial in pending if trial.arm.targets.source == "student"]
    off_policy = [trial for trial in pending if trial.arm.targets.source != "student"]
    with run_record.track_time(plan.folder, "train"):
        if off_policy or plan.pending_search:
            pending_ids = {trial.trial_id for trial in pending}
            tuner.run_trials(
                off_policy,
                plan.experiment,
                plan.folder,
                resources,
                finished=[trial for trial in plan.trials if trial.trial_id not in pending_ids],
                pending_search=plan.pending_search,
            )
        if on_policy:
            context = StageContext(
                experiment=plan.experiment,
                problems=plan.problems,
                folder=plan.folder,
                cluster=resources,
                completion_sets=plan.completion_sets,
            )
            run_on_policy(on_policy, context)


def _show_trials(plan: Plan, pending: list[TrialSpec]) -> None:
    """Show in the metrics and on the screen which trials will be trained."""
    metrics.show_trials(plan.experiment.name, {trial.trial_id: trial_status(trial) for trial in plan.trials})
    if plan.pending_search:
        print_status(
            f"training {plan.pending_search.num_trials} students at points that Optuna chooses by earlier results"
        )
    if pending:
        names = ", ".join(trial.trial_id for trial in pending[:MAX_NAMED_TRIALS])
        if len(pending) > MAX_NAMED_TRIALS:
            names += ", …"
        print_status(f"training {len(pending)} students with DeepSpeed ({names})")


def make_predictions(plan: Plan, resources: dict[str, float]) -> None:
    """Step 4: answer the test problems with the base student and all adapters, in one engine."""
    if plan.is_predicted():
        return
    experiment, eval_models = plan.experiment, plan.eval_models()
    accelerator, num_processors = engine_processors(experiment.evaluate.engine, resources)
    print_status(f"starting the engine for {len(eval_models)} students ({accelerator})")
    with (
        run_record.track_time(plan.folder, "evaluate"),
        run_record.track_processors(plan.folder, run_record.EVALUATE_ROLE, accelerator, num_processors),
    ):
        evaluate.evaluate_students(
            eval_models,
            problems=plan.problems,
            student=experiment.student,
            evaluation=experiment.evaluate,
            instruction=experiment.prompt.instruction,
            accelerator=accelerator,
            folder=plan.predictions,
        )


def measure_attention(plan: Plan, resources: dict[str, float]) -> None:
    """Step 5: measure the attention heads of all students on the same solutions."""
    experiment, folder = plan.experiment, plan.attention
    if experiment.attention is None or folder is None or plan.is_measured():
        return
    eval_models = plan.eval_models()
    accelerator = resolve_accelerator(experiment.attention.accelerator, resources)
    num_workers = attention_workers(experiment.attention, accelerator, resources)
    print_status(f"reading the same solutions with {len(eval_models)} students ({accelerator})")
    with (
        run_record.track_time(plan.folder, "attention"),
        run_record.track_processors(plan.folder, run_record.ATTENTION_ROLE, accelerator, num_workers),
    ):
        num_errors = attention.measure_attention(
            eval_models,
            problems=plan.problems,
            student=experiment.student,
            attention=experiment.attention,
            dtype=plan.attention_dtype,
            instruction=experiment.prompt.instruction,
            accelerator=accelerator,
            num_workers=num_workers,
            folder=folder,
        )
    if num_errors:
        print_status(f"attention: {num_errors} texts could not be read; see the report for the reasons")


def record_results(plan: Plan) -> None:
    """Step 6: record the teacher's counts and, once students are evaluated, write the test as a task of lm-eval.

    Afterwards the experiment's folder holds everything that the report needs.
    """
    run_record.record_completions(plan.folder, plan.experiment.teacher.model, plan.teacher_usages)
    evaluate.collect_predictions(plan.predictions.parent, ExperimentPaths(plan.folder).all_predictions)
    if not plan.is_predicted():
        # Before the evaluation nothing reads the test problems.
        return
    tasks = ExperimentPaths(plan.folder).lm_eval
    lm_eval_task.write_task(plan.experiment, plan.problems, tasks)
    # The last student's command; those of the others differ in the adapter only.
    adapter = plan.eval_models()[-1].adapter
    run_record.set_entry(
        plan.folder, "harness", lm_eval_task.lm_eval_command(plan.experiment, tasks, str(adapter or ""))
    )
