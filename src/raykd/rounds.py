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

from raykd import generate, journal, placement, storage, sweep, teacher
from raykd.completions import Request
from raykd.config import Experiment
from raykd.evaluate import Contestant
from raykd.job import Job, is_complete, problems_of_round
from raykd.progress import say
from raykd.rollout import rollout


def run(
    pending: list[Job],
    asked: Mapping[str, Request | None],
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
    soft = [request for job in pending if (request := asked[job.lesson])]
    top_k = max((request.top_k for request in soft), default=0)
    trains = [job.arm.train for job in pending]
    # Ray Train counts what nodes have as if nothing else held any of it: a trial that is to go on with fewer workers
    # would wait for the teacher's.
    is_elastic = any(train.min_workers for train in trains)
    stays = bool(soft) and not is_elastic and placement.hold_together(experiment, trains, cluster)
    with _serving(experiment, top_k, folder, cluster) if stays else nullcontext():
        for number in range(max(job.rounds for job in pending)):
            parts = [dataclasses.replace(job, round=number) for job in pending if number < job.rounds]
            parts = [part for part in parts if not is_complete(part) and _is_ready(part)]
            if not parts:
                continue
            own = [part for part in parts if number >= part.arm.targets.warmup_rounds]
            # What a student begins with is given: see `Job.completions`.
            begun = [part for part in parts if part not in own]
            if begun:
                say(f"round {number + 1}: {len(begun)} students learn from the reference solutions")
            if own:
                say(f"round {number + 1}: {len(own)} students answer, are scored and learn from it")
                serving = nullcontext() if stays else _serving(experiment, top_k, folder, cluster)
                own = _answered(own, asked, experiment, problems, folder, cluster, versions, serving)
            sweep.run(begun + own, experiment, folder, cluster, beside=experiment.teacher if stays else None)


def _answered(
    parts: list[Job],
    asked: Mapping[str, Request | None],
    experiment: Experiment,
    problems: Path,
    folder: Path,
    cluster: Mapping[str, float],
    versions: Mapping[str, str],
    serving: AbstractContextManager[None],
) -> list[Job]:
    """The parts, each with the student's answers to learn from, scored where the arm's targets are soft."""
    _answer(parts, experiment, problems, folder, cluster)
    scored = {_answers(part): _request(part, request) for part in parts if (request := asked[part.lesson])}
    missing = {answers: each for answers, each in scored.items() if storage.read_manifest(each.folder) is None}
    if missing:
        with serving:
            instruction, app = experiment.prompt.instruction, teacher.app_name(experiment.name)
            generate.score(missing, problems, experiment.teacher, instruction, app, experiment.name, versions)
    folders = {_answers(part): _answers(part) for part in parts} | {path: each.folder for path, each in scored.items()}
    return [dataclasses.replace(part, completions=folders[_answers(part)]) for part in parts]


def _is_ready(part: Job) -> bool:
    """Whether the round before went well; a trial that failed stays behind."""
    return part.round == 0 or is_complete(dataclasses.replace(part, round=(part.round or 0) - 1))


def _answers(part: Job) -> Path:
    return part.round_folder(part.round or 0) / "answers"


def _request(part: Job, request: Request) -> Request:
    return dataclasses.replace(request, folder=_scores(part, part.round or 0))


def _scores(job: Job, number: int) -> Path:
    return job.round_folder(number) / "completions"


def scored(job: Job) -> list[Path]:
    """Where the scores of a trial's own answers are, round by round."""
    return [_scores(job, number) for number in range(job.arm.targets.warmup_rounds, job.rounds)]


@contextmanager
def _serving(experiment: Experiment, top_k: int, folder: Path, cluster: Mapping[str, float]) -> Iterator[None]:
    """The teacher for a `with` block, and how long it held its processors."""
    held = placement.teacher_processors(experiment.teacher, cluster)
    with (
        journal.occupied(folder, journal.TEACHER, *held),
        teacher.served(experiment.teacher, top_k, teacher.app_name(experiment.name), dict(cluster)),
    ):
        yield


def _answer(
    parts: list[Job], experiment: Experiment, problems: Path, folder: Path, cluster: Mapping[str, float]
) -> None:
    """Has the students answer what is missing, those with the same sampling in one engine."""
    missing = [part for part in parts if storage.read_manifest(_answers(part)) is None]
    kind = placement.accelerator(experiment.evaluate.engine.accelerator, cluster)
    samplings = dict.fromkeys(part.arm.targets.rollout for part in missing)
    for sampling in samplings:
        say(f"starting the engine for {len(missing)} students ({kind})")
        folders = {_contestant(part): _answers(part) for part in missing if part.arm.targets.rollout == sampling}
        held = placement.engine_processors(experiment.evaluate.engine, cluster)
        given = (problems, experiment.student, experiment.evaluate, sampling, experiment.prompt.instruction)
        with journal.occupied(folder, journal.ANSWERS, *held):
            rollout(folders, *given, kind)


def _contestant(part: Job) -> Contestant:
    number = part.round or 0
    adapter = part.round_folder(number - 1) / "adapter" if number else None
    rank = part.arm.student.lora.rank if adapter else 0
    return Contestant(part.trial_id, part.arm_name, part.seed, adapter, rank, problems_of_round(part, number))
