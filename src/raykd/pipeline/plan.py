"""Resolve an experiment: models, problems, trials and the folders of every stage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raykd.config.experiment import Experiment
from raykd.data import datasets
from raykd.data.datasets import Splits
from raykd.errors import UserError
from raykd.evaluation import evaluate, student_batch
from raykd.evaluation.attention import attention_folder_name
from raykd.models import loading
from raykd.pipeline import on_policy, run_record
from raykd.runtime.console import print_status
from raykd.storage import filesystem, row_store
from raykd.storage.paths import ExperimentPaths, StoragePaths, TrialPaths
from raykd.teacher import completion_set
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import TrialSpec
from raykd.tuning import searcher, selection, trackers, trials
from raykd.tuning.searcher import MakeTrials, PendingSearch
from raykd.tuning.variants import (
    Hparams,
    Variant,
    arm_of_config_id,
    arms_by_config_id,
    boundary_configs,
    variant_at,
    variants,
)


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
    asked: dict[str, CompletionSet | None]
    """The completion set of each config id; None where the teacher is not asked."""
    retry_failed: bool
    """Whether trials of a sweep that failed are tried again."""
    pending_search: PendingSearch | None
    """The points of a sweep that will be chosen by what others reach; None where all are known."""

    @property
    def problems(self) -> Path:
        """The folder of the splits."""
        return self.splits.folder

    @property
    def predictions(self) -> Path:
        """Where the students' answers to the test problems are: other folders for other ways of asking."""
        return ExperimentPaths(self.folder).predictions / evaluate.folder_name(self.experiment.evaluate)

    @property
    def attention(self) -> Path | None:
        """Where it is what the students' attention heads did; None where that is not measured."""
        told = self.experiment.attention
        return (
            ExperimentPaths(self.folder).attention / attention_folder_name(told, self.attention_dtype) if told else None
        )

    @property
    def attention_dtype(self) -> str:
        """The type of the model whose attention is measured."""
        told = self.experiment.attention
        return (told.dtype if told else None) or self.experiment.train.dtype

    @property
    def log(self) -> Path:
        """Where libraries write what they have to say."""
        return ExperimentPaths(self.folder).log

    @property
    def requests(self) -> list[CompletionSet]:
        """The distinct sets of completions that the arms need before they are trained."""
        asked = [request for request in self.asked.values() if request and request.source != "student"]
        return list({request.folder: request for request in asked}.values())

    @property
    def teacher_usages(self) -> list[run_record.TeacherUsage]:
        """All that the teacher wrote or scored, and for which arms."""
        arms: dict[Path, dict[str, None]] = {}
        for lesson, request in self.asked.items():
            if request:
                arms.setdefault(request.folder, {})[arm_of_config_id(lesson)] = None
        given = [run_record.TeacherUsage(each, list(arms[each.folder]), [each.folder]) for each in self.requests]
        scored: dict[str, list[Path]] = {}
        for job in self.jobs:
            if job.arm.targets.source == "student":
                scored.setdefault(job.config_id, []).extend(on_policy.scored_folders(job))
        own = [
            run_record.TeacherUsage(request, [arm_of_config_id(lesson)], folders)
            for lesson, folders in scored.items()
            if (request := self.asked[lesson])
        ]
        return given + own

    @cached_property
    def jobs(self) -> list[TrialSpec]:
        """The trials."""
        found = (self.splits, self.asked, self.student_model, self.same_tokens, self.folder)
        return trials.trial_specs(self.experiment, self.variants, *found)

    @property
    def pending(self) -> list[TrialSpec]:
        """The trials that have not come to their end."""
        return trials.pending_trials(self.jobs, self.retry_failed)

    @property
    def eval_models(self) -> list[student_batch.StudentModel]:
        """Who answers the test problems: the base student, and every adapter that is there and goes so far."""
        adapters = [
            student_batch.StudentModel(
                job.trial_id, job.arm_name, job.seed, TrialPaths(job.folder).adapter, job.arm.student.lora.r
            )
            for job in selection.selected_trials(self.jobs, self.experiment.sweep)
        ]
        return [student_batch.BASE_STUDENT, *adapters]

    def is_complete(self) -> bool:
        """Whether nothing is left but to write the report."""
        is_trained = not self.pending and not self.pending_search
        return (
            not completion_set.missing_sets(self.requests) and is_trained and self.is_predicted() and self.is_measured()
        )

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
        manifest = row_store.read_manifest(folder)
        return manifest is not None and manifest["trials"] == [each.trial_id for each in self.eval_models]


def resolve(experiment: Experiment, retry_failed: bool = False) -> Plan:
    """Step 1: find the models and the problems, and what is to be done with them; nothing is written.

    Args:
        experiment: the experiment.
        retry_failed: whether trials of a sweep that failed are tried again.

    Raises:
        UserError: where something that the experiment names is not there or does not fit together.
    """
    root = filesystem.resolve(experiment.storage)
    folder = StoragePaths(root).experiment(experiment.name)
    trackers.check_tracker(experiment.tracking, folder)
    run_record.check_compatible(experiment, folder)
    for named in (experiment.teacher, experiment.student):
        if named.trust_remote_code:
            print_status(f"warning: code that comes with {named.model} is run (trust_remote_code)")
    teacher_model = loading.identify_model(experiment.teacher)
    student_model = loading.identify_model(experiment.student)
    teacher_tokenizer = loading.teacher_tokenizer(experiment.teacher)
    student_tokenizer = loading.load_tokenizer(experiment.student)
    # Where the teacher gives text alone, the student reads it by its own tokenizer.
    same_tokens = teacher_tokenizer is not None and loading.have_same_tokens(teacher_tokenizer, student_tokenizer)
    drawn = searcher.known_points(experiment, folder)
    trained = variants(experiment, drawn)
    bounds = boundary_configs(experiment) if experiment.sweep and experiment.sweep.search == "optuna" else []
    for variant in [*trained, *bounds]:
        if variant.arm.targets.kind == "top_k" and not same_tokens:
            raise UserError(
                f"arm {variant.arm_name!r}: soft targets need one tokenizer, but {experiment.teacher.model} and "
                f"{experiment.student.model} have different ones; set targets.kind=hard"
            )
    if any(variant.arm.train.packing for variant in [*trained, *bounds]):
        loading.check_packing(experiment.student)
    splits = datasets.resolve_splits(experiment.dataset, root)
    for variant in trained:
        arm = variant.arm
        steps = arm.train.epochs * math.ceil(splits.counts["train"] / arm.train.batch_size)
        if arm.targets.source == "student" and arm.targets.rounds > steps:
            raise UserError(
                f"arm {variant.arm_name!r}: targets.rounds={arm.targets.rounds} is more than its {steps} optimizer "
                "steps"
            )
    asked = completion_set.completion_sets_for(
        experiment, arms_by_config_id([*trained, *bounds]), splits.content, root, teacher_model
    )

    def make(name: str, point: Hparams) -> list[TrialSpec]:
        variant = variant_at(experiment, name, point)
        own = completion_set.completion_sets_for(
            experiment, arms_by_config_id([variant]), splits.content, root, teacher_model
        )
        return trials.trial_specs(experiment, [variant], splits, own, student_model, same_tokens, folder)

    pending_search = _pending_search(experiment, drawn, make, bounds)
    found = (splits, teacher_model, student_model, same_tokens, trained, asked)
    plan = Plan(experiment, root, folder, *found, retry_failed, pending_search)
    run_record.check_contents(folder, plan.identities(), splits.folder)
    return plan


def _pending_search(
    experiment: Experiment, drawn: Mapping[str, Sequence[Hparams]], make: MakeTrials, bounds: list[Variant]
) -> PendingSearch | None:
    """What a search that chooses by results has left to choose."""
    if experiment.sweep is None or not bounds:
        return None
    num_points = sum(experiment.sweep.num_samples - len(points) for points in drawn.values())
    num_trials = num_points * len(experiment.seeds)
    return PendingSearch(make, bounds, num_trials) if num_trials else None
