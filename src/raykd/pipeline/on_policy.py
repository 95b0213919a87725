"""On-policy distillation: students learn from their own answers, scored by the primed teacher.

Each round has three steps (Agarwal et al., arXiv 2306.13649). Every student answers the problems of its next optimizer
steps with its current adapter. The primed teacher scores these answers token by token. The student trains on them.
The student answers without the prime and is scored with it, which is context distillation. If the prime holds the
reference answer, the teacher's scores use knowledge that the student never has.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from raykd.cluster import resources
from raykd.config.experiment import Experiment
from raykd.evaluation.rollout import write_rollouts
from raykd.evaluation.student_batch import StudentModel
from raykd.pipeline import run_record
from raykd.runtime.console import print_status
from raykd.storage import row_store
from raykd.storage.paths import RoundPaths
from raykd.teacher import generate, server
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import TrialSpec, has_adapter, problem_ids_of_round, trained_digest
from raykd.tuning import tuner


@dataclass(frozen=True)
class StageContext:
    """Settings that the steps of all rounds share."""

    experiment: Experiment
    problems: Path
    """The folder of the splits."""
    folder: Path
    """The experiment's folder."""
    cluster: Mapping[str, float]
    """The cluster's resources, by Ray's names."""
    completion_sets: Mapping[str, CompletionSet | None]
    """How the answers of each config id are scored; None if their tokens are the targets."""


def run_on_policy(pending: Sequence[TrialSpec], context: StageContext) -> None:
    """Train students on their own answers, round by round, all students in step.

    Args:
        pending: trials that are not finished, at least one.
        context: the settings of the stage.
    """
    experiment = context.experiment
    scoring_sets = [each for trial in pending if (each := context.completion_sets[trial.config_id])]
    top_k = max((each.top_k for each in scoring_sets), default=0)
    train_sections = [trial.arm.train for trial in pending]
    # Ray Train sizes elastic trials by the nodes' total resources: it would wait for workers that the teacher holds.
    is_elastic = any(train.min_workers for train in train_sections)
    keep_teacher = (
        bool(scoring_sets)
        and not is_elastic
        and resources.fits_alongside_teacher(experiment, train_sections, context.cluster)
    )
    with _serve_teacher(context, top_k) if keep_teacher else nullcontext():
        for number in range(max(trial.rounds for trial in pending)):
            rounds = _pending_rounds(pending, number)
            if not rounds:
                continue
            # Students in warm-up rounds learn from the completions in `TrialSpec.completions`.
            warmup = [each for each in rounds if number < each.arm.targets.warmup_rounds]
            on_policy = [each for each in rounds if number >= each.arm.targets.warmup_rounds]
            if warmup:
                print_status(f"round {number + 1}: {len(warmup)} students learn from the reference solutions")
            if on_policy:
                print_status(f"round {number + 1}: {len(on_policy)} students answer, are scored and learn from it")
                serving = nullcontext() if keep_teacher else _serve_teacher(context, top_k)
                on_policy = _with_answers(on_policy, context, serving)
            tuner.run_trials(
                warmup + on_policy,
                experiment,
                context.folder,
                context.cluster,
                teacher=experiment.teacher if keep_teacher else None,
            )


def _pending_rounds(pending: Sequence[TrialSpec], number: int) -> list[TrialSpec]:
    """Return the trials of one round: those that have not trained it, and whose previous round succeeded."""
    rounds = [dataclasses.replace(trial, round=number) for trial in pending if number < trial.rounds]
    return [each for each in rounds if not has_adapter(each) and _has_previous_adapter(each)]


def _has_previous_adapter(trial: TrialSpec) -> bool:
    """Return whether the previous round of a trial succeeded; a trial that failed takes no further rounds."""
    return trial.round == 0 or has_adapter(dataclasses.replace(trial, round=(trial.round or 0) - 1))


def _with_answers(
    trials: Sequence[TrialSpec], context: StageContext, serving: AbstractContextManager[None]
) -> list[TrialSpec]:
    """Return trials of a round with their students' answers to learn from, scored if the targets are soft.

    Args:
        trials: the trials, each with its round set.
        context: the settings of the stage.
        serving: serves the teacher; entered only if answers must be scored.
    """
    _write_answers(trials, context)
    answers = {trial.trial_id: _answers_folder(trial) for trial in trials}
    scores = {
        trial.trial_id: dataclasses.replace(each, folder=_scores_folder(trial, trial.round or 0))
        for trial in trials
        if (each := context.completion_sets[trial.config_id])
    }
    missing = {
        answers[trial_id]: each for trial_id, each in scores.items() if row_store.read_manifest(each.folder) is None
    }
    if missing:
        with serving:
            generation = generate.GenerationContext(
                problems_dir=context.problems,
                teacher=context.experiment.teacher,
                instruction=context.experiment.prompt.instruction,
                app=server.app_name(context.experiment.name),
                experiment=context.experiment.name,
            )
            generate.score_completions(missing, generation)
    folders = answers | {trial_id: each.folder for trial_id, each in scores.items()}
    return [dataclasses.replace(trial, completions=folders[trial.trial_id]) for trial in trials]


def _write_answers(trials: Sequence[TrialSpec], context: StageContext) -> None:
    """Write the students' missing answers; students with the same sampling share an engine."""
    experiment = context.experiment
    missing = [trial for trial in trials if row_store.read_manifest(_answers_folder(trial)) is None]
    accelerator = resources.resolve_accelerator(experiment.evaluate.engine.accelerator, context.cluster)
    for sampling in dict.fromkeys(trial.arm.targets.rollout for trial in missing):
        print_status(f"starting the engine for {len(missing)} students ({accelerator})")
        folders = {
            _student_model(trial): _answers_folder(trial) for trial in missing if trial.arm.targets.rollout == sampling
        }
        _, num_processors = resources.engine_processors(experiment.evaluate.engine, context.cluster)
        with run_record.track_processors(context.folder, run_record.EVALUATE_ROLE, accelerator, num_processors):
            write_rollouts(
                folders,
                problems=context.problems,
                student=experiment.student,
                evaluation=experiment.evaluate,
                sampling=sampling,
                instruction=experiment.prompt.instruction,
                accelerator=accelerator,
            )


def _student_model(trial: TrialSpec) -> StudentModel:
    number = trial.round or 0
    base = StudentModel(trial.trial_id, trial.arm_name, trial.seed, None, 0, "", problem_ids_of_round(trial, number))
    if not number:
        return base
    digest = trained_digest(dataclasses.replace(trial, round=number - 1))
    adapter = RoundPaths(trial.round_folder(number - 1)).adapter
    return dataclasses.replace(base, adapter=adapter, rank=trial.arm.student.lora.r, digest=digest)


def _answers_folder(trial: TrialSpec) -> Path:
    return RoundPaths(trial.round_folder(trial.round or 0)).answers


def _scores_folder(trial: TrialSpec, number: int) -> Path:
    return RoundPaths(trial.round_folder(number)).completions


def scored_folders(trial: TrialSpec) -> list[Path]:
    """Return the folders of the scores of a trial's own answers, one for each round after the warm-up."""
    return [_scores_folder(trial, number) for number in range(trial.arm.targets.warmup_rounds, trial.rounds)]


@contextmanager
def _serve_teacher(context: StageContext, top_k: int) -> Iterator[None]:
    """Serve the teacher for a `with` block, and record the processor time that it takes."""
    experiment = context.experiment
    accelerator, num_processors = resources.teacher_processors(experiment.teacher, context.cluster)
    with (
        run_record.track_processors(context.folder, run_record.TEACHER_ROLE, accelerator, num_processors),
        server.serve_teacher(experiment.teacher, top_k, server.app_name(experiment.name), dict(context.cluster)),
    ):
        yield
