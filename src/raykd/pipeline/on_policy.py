"""Rounds: students that learn from their own answers, scored by the primed teacher (on-policy distillation).

In each round every such student answers the problems of its next steps with its adapter as it is, the teacher,
primed, scores those answers token by token, and the student takes the steps (Agarwal et al., arXiv 2306.13649).
A student's prime-free answer under the teacher's primed judgement is context distillation; where the prime holds the
gold answer, the teacher judges with knowledge that the student will not have.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from raykd.training.trial import TrialSpec, has_adapter, problem_ids_of_round
from raykd.tuning import tuner


def run_on_policy(
    pending: list[TrialSpec],
    asked: Mapping[str, CompletionSet | None],
    experiment: Experiment,
    problems: Path,
    folder: Path,
    cluster: Mapping[str, float],
    versions: Mapping[str, str],
) -> None:
    """Trains students on their own answers, round by round, all of them in step.

    Args:
        pending: trials that are not complete.
        asked: for each lesson how its answers are scored; None where the tokens themselves are the targets.
        experiment: the experiment.
        problems: the folder of the splits.
        folder: the experiment's folder.
        cluster: the cluster's resources.
        versions: of the packages that matter, for the manifests.
    """
    soft = [request for job in pending if (request := asked[job.config_id])]
    top_k = max((request.top_k for request in soft), default=0)
    trains = [job.arm.train for job in pending]
    # Ray Train counts what nodes have as if nothing else held any of it: a trial that is to go on with fewer workers
    # would wait for the teacher's.
    is_elastic = any(train.min_workers for train in trains)
    stays = bool(soft) and not is_elastic and resources.fits_alongside_teacher(experiment, trains, cluster)
    with _serve_if_needed(experiment, top_k, folder, cluster) if stays else nullcontext():
        for number in range(max(job.rounds for job in pending)):
            parts = [dataclasses.replace(job, round=number) for job in pending if number < job.rounds]
            parts = [part for part in parts if not has_adapter(part) and _adapter_exists(part)]
            if not parts:
                continue
            own = [part for part in parts if number >= part.arm.targets.warmup_rounds]
            # What a student begins with is given: see `Job.completions`.
            begun = [part for part in parts if part not in own]
            if begun:
                print_status(f"round {number + 1}: {len(begun)} students learn from the reference solutions")
            if own:
                print_status(f"round {number + 1}: {len(own)} students answer, are scored and learn from it")
                serving = nullcontext() if stays else _serve_if_needed(experiment, top_k, folder, cluster)
                own = _answer_round(own, asked, experiment, problems, folder, cluster, versions, serving)
            tuner.run_trials(begun + own, experiment, folder, cluster, beside=experiment.teacher if stays else None)


def _answer_round(
    parts: list[TrialSpec],
    asked: Mapping[str, CompletionSet | None],
    experiment: Experiment,
    problems: Path,
    folder: Path,
    cluster: Mapping[str, float],
    versions: Mapping[str, str],
    serving: AbstractContextManager[None],
) -> list[TrialSpec]:
    """The parts, each with the student's answers to learn from, scored where the arm's targets are soft."""
    _answer_rounds(parts, experiment, problems, folder, cluster)
    scored = {
        _answers_folder(part): _scoring_set(part, request) for part in parts if (request := asked[part.config_id])
    }
    missing = {answers: each for answers, each in scored.items() if row_store.read_manifest(each.folder) is None}
    if missing:
        with serving:
            instruction, app = experiment.prompt.instruction, server.app_name(experiment.name)
            context = generate.GenerationContext(
                problems, experiment.teacher, instruction, app, experiment.name, versions
            )
            generate.score_completions(missing, context)
    folders = {_answers_folder(part): _answers_folder(part) for part in parts} | {
        path: each.folder for path, each in scored.items()
    }
    return [dataclasses.replace(part, completions=folders[_answers_folder(part)]) for part in parts]


def _adapter_exists(part: TrialSpec) -> bool:
    """Whether the round before went well; a trial that failed stays behind."""
    return part.round == 0 or has_adapter(dataclasses.replace(part, round=(part.round or 0) - 1))


def _answers_folder(part: TrialSpec) -> Path:
    return RoundPaths(part.round_folder(part.round or 0)).answers


def _scoring_set(part: TrialSpec, request: CompletionSet) -> CompletionSet:
    return dataclasses.replace(request, folder=_scores_folder(part, part.round or 0))


def _scores_folder(job: TrialSpec, number: int) -> Path:
    return RoundPaths(job.round_folder(number)).completions


def scored_folders(job: TrialSpec) -> list[Path]:
    """Where the scores of a trial's own answers are, round by round."""
    return [_scores_folder(job, number) for number in range(job.arm.targets.warmup_rounds, job.rounds)]


@contextmanager
def _serve_if_needed(experiment: Experiment, top_k: int, folder: Path, cluster: Mapping[str, float]) -> Iterator[None]:
    """The teacher for a `with` block, and how long it held its processors."""
    held = resources.teacher_processors(experiment.teacher, cluster)
    with (
        run_record.track_processors(folder, run_record.TEACHER_ROLE, *held),
        server.serve_teacher(experiment.teacher, top_k, server.app_name(experiment.name), dict(cluster)),
    ):
        yield


def _answer_rounds(
    parts: list[TrialSpec], experiment: Experiment, problems: Path, folder: Path, cluster: Mapping[str, float]
) -> None:
    """Has the students answer what is missing, those with the same sampling in one engine."""
    missing = [part for part in parts if row_store.read_manifest(_answers_folder(part)) is None]
    kind = resources.resolve_accelerator(experiment.evaluate.engine.accelerator, cluster)
    samplings = dict.fromkeys(part.arm.targets.rollout for part in missing)
    for sampling in samplings:
        print_status(f"starting the engine for {len(missing)} students ({kind})")
        folders = {
            _student_model(part): _answers_folder(part) for part in missing if part.arm.targets.rollout == sampling
        }
        held = resources.engine_processors(experiment.evaluate.engine, cluster)
        with run_record.track_processors(folder, run_record.ANSWERS_ROLE, *held):
            write_rollouts(
                folders,
                problems=problems,
                student=experiment.student,
                evaluation=experiment.evaluate,
                sampling=sampling,
                instruction=experiment.prompt.instruction,
                accelerator=kind,
            )


def _student_model(part: TrialSpec) -> StudentModel:
    number = part.round or 0
    adapter = RoundPaths(part.round_folder(number - 1)).adapter if number else None
    rank = part.arm.student.lora.r if adapter else 0
    return StudentModel(part.trial_id, part.arm_name, part.seed, adapter, rank, problem_ids_of_round(part, number))
