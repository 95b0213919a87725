"""Plan: what an experiment comes to: its models, problems, completions and trials, and where all of it lies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raykd import (
    attention,
    completions,
    evaluate,
    finalists,
    journal,
    location,
    models,
    problems,
    rounds,
    storage,
    study,
    sweep,
    tracking,
)
from raykd.completions import Request
from raykd.config import Experiment
from raykd.faults import UserError
from raykd.job import Job
from raykd.problems import Splits
from raykd.progress import LOG, say
from raykd.study import Make, Undrawn
from raykd.variants import Point, Variant, arm_of, at, corners, lessons, variants


@dataclass(frozen=True)
class Plan:
    """An experiment with its models found, and where all of it lies."""

    experiment: Experiment
    root: Path
    folder: Path
    splits: Splits
    """The problems, which `start` writes."""
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
    def problems(self) -> Path:
        """The folder of the splits."""
        return self.splits.folder

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
        found = (self.splits, self.asked, self.student_model, self.same_tokens, self.folder)
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
        return not completions.missing(self.requests) and is_trained and self.is_predicted() and self.is_measured()

    def is_predicted(self) -> bool:
        """Whether the students' answers to the test problems are complete."""
        return self._holds_all(self.predictions)

    def is_measured(self) -> bool:
        """Whether the attention of all students is measured, where it is to be."""
        return not self.attention or self._holds_all(self.attention)

    def identities(self) -> dict[str, dict[str, str]]:
        """What identifies the weights of the teacher and of the student."""
        return {"teacher": self.teacher_model, "student": self.student_model}

    def _holds_all(self, folder: Path) -> bool:
        """Whether a folder is complete, and of the students that there are now."""
        manifest = storage.read_manifest(folder)
        return manifest is not None and manifest["trials"] == [each.trial_id for each in self.contestants]


def resolve(experiment: Experiment, retry_failed: bool = False) -> Plan:
    """Step 1: find the models and the problems, and what is to be done with them; nothing is written.

    Args:
        experiment: the experiment.
        retry_failed: whether trials of a sweep that failed are tried again.

    Raises:
        UserError: where something that the experiment names is not there or does not fit together.
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
            raise UserError(
                f"arm {variant.arm_name!r}: soft targets need one tokenizer, but {experiment.teacher.model} and "
                f"{experiment.student.model} have different ones; set targets.kind=hard"
            )
    if any(variant.arm.train.packing for variant in [*trained, *bounds]):
        models.check_packing(experiment.student)
    splits = problems.resolve(experiment.problems, root)
    for variant in trained:
        arm = variant.arm
        steps = arm.train.epochs * math.ceil(splits.counts["train"] / arm.train.batch_size)
        if arm.targets.sequence == "student" and arm.targets.rounds > steps:
            raise UserError(
                f"arm {variant.arm_name!r}: targets.rounds={arm.targets.rounds} is more than its {steps} optimizer "
                "steps"
            )
    asked = completions.of_arms(experiment, lessons([*trained, *bounds]), splits.content, root, teacher_model)

    def make(name: str, point: Point) -> list[Job]:
        variant = at(experiment, name, point)
        own = completions.of_arms(experiment, lessons([variant]), splits.content, root, teacher_model)
        return sweep.jobs(experiment, [variant], splits, own, student_model, same_tokens, folder)

    undrawn = _undrawn(experiment, drawn, make, bounds)
    found = (splits, teacher_model, student_model, same_tokens, trained, asked)
    plan = Plan(experiment, root, folder, *found, retry_failed, undrawn)
    journal.check(folder, plan.identities(), splits.folder)
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
