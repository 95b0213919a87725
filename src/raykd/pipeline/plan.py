"""Resolve an experiment: its models, problems, trials and the folders of every stage."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raykd.config.experiment import Experiment
from raykd.data import datasets
from raykd.data.datasets import Splits
from raykd.errors import UserError
from raykd.evaluation import evaluate, student_batch
from raykd.evaluation.attention import attention_folder_name
from raykd.models import loading
from raykd.models.adapters import check_digest
from raykd.pipeline import on_policy, run_record
from raykd.runtime.console import print_status
from raykd.storage import filesystem, row_store
from raykd.storage.paths import ExperimentPaths, StoragePaths, TrialPaths
from raykd.storage.schemas import FAILED
from raykd.teacher import completion_set
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import TrialSpec, trained_digest
from raykd.training.trial_record import read_trial_record
from raykd.tuning import searcher, selection, trackers
from raykd.tuning.searcher import MakeTrials, PendingSearch
from raykd.tuning.trials import pending_trials, trial_specs
from raykd.tuning.variants import (
    Hparams,
    Variant,
    arm_of_config_id,
    arms_by_config_id,
    boundary_configs,
    variant_at,
    variants,
)

# The stages that use the cluster, in their order.
STAGES = ("generate", "train", "evaluate", "attention")


@dataclass(frozen=True)
class Plan:
    """A resolved experiment: its inputs, its trials and the folders of its results.

    Fields and properties never change. Methods read the storage, so their results change as the run proceeds.
    """

    experiment: Experiment
    root: Path
    """The storage folder."""
    folder: Path
    """The experiment's folder."""
    splits: Splits
    """The problems, which `raykd.pipeline.run.start` writes."""
    teacher_model: dict[str, str]
    """The identity of the teacher's weights."""
    student_model: dict[str, str]
    """The identity of the student's weights."""
    trials: list[TrialSpec]
    """All trials whose hyperparameters are known."""
    completion_sets: dict[str, CompletionSet | None]
    """The completion set of each config id; None where the teacher is not used."""
    retry_failed: bool
    """Whether failed trials of a sweep are retried."""
    pending_search: PendingSearch | None
    """The points of a sweep that depend on earlier results; None if all points are known."""

    @property
    def problems(self) -> Path:
        """The folder of the splits."""
        return self.splits.folder

    @property
    def predictions(self) -> Path:
        """The folder of the students' test answers; it depends on the evaluation settings."""
        return ExperimentPaths(self.folder).predictions / evaluate.folder_name(self.experiment.evaluate)

    @property
    def attention(self) -> Path | None:
        """The folder of the attention measurements; None if attention is not measured."""
        section = self.experiment.attention
        if section is None:
            return None
        return ExperimentPaths(self.folder).attention / attention_folder_name(section, self.attention_dtype)

    @property
    def attention_dtype(self) -> str:
        """The dtype of the models whose attention is measured."""
        section = self.experiment.attention
        return (section.dtype if section else None) or self.experiment.train.dtype

    @property
    def log(self) -> Path:
        """The log file of the libraries."""
        return ExperimentPaths(self.folder).log

    @property
    def required_sets(self) -> list[CompletionSet]:
        """The distinct completion sets that must be complete before training."""
        return list(
            {each.folder: each for each in self.completion_sets.values() if each and each.source != "student"}.values()
        )

    @property
    def teacher_usages(self) -> list[run_record.TeacherUsage]:
        """Everything that the teacher generates or scores, with the arms that use it."""
        arms_by_folder: dict[Path, dict[str, None]] = {}
        for config_id, completions in self.completion_sets.items():
            if completions:
                arms_by_folder.setdefault(completions.folder, {})[arm_of_config_id(config_id)] = None
        usages = [
            run_record.TeacherUsage(each, list(arms_by_folder[each.folder]), [each.folder])
            for each in self.required_sets
        ]
        scores_by_config: dict[str, list[Path]] = {}
        for trial in self.trials:
            if trial.arm.targets.source == "student":
                scores_by_config.setdefault(trial.config_id, []).extend(on_policy.scored_folders(trial))
        for config_id, folders in scores_by_config.items():
            if completions := self.completion_sets[config_id]:
                usages.append(run_record.TeacherUsage(completions, [arm_of_config_id(config_id)], folders))
        return usages

    def pending_trials(self) -> list[TrialSpec]:
        """Return the trials that are not finished."""
        return pending_trials(self.trials, self.retry_failed)

    def failed_trials(self) -> dict[str, str]:
        """Return the errors of the failed trials by trial id."""
        records = [record for trial in self.trials if (record := read_trial_record(trial.folder))]
        return {record["trial_id"]: record.get("error", "") for record in records if record["status"] == FAILED}

    def eval_models(self) -> list[student_batch.StudentModel]:
        """Return the models to test: the base student, then every adapter that was selected."""
        adapters = [
            student_batch.StudentModel(
                trial.trial_id,
                trial.arm_name,
                trial.seed,
                TrialPaths(trial.folder).adapter,
                trial.arm.student.lora.r,
                trained_digest(trial),
            )
            for trial in selection.selected_trials(self.trials, self.experiment.sweep)
        ]
        return [student_batch.BASE_STUDENT, *adapters]

    def is_complete(self, stages: Sequence[str] = STAGES) -> bool:
        """Return whether nothing remains to be done by some stages, of `STAGES`."""
        checks: dict[str, Callable[[], bool]] = {
            "generate": lambda: not completion_set.missing_sets(self.required_sets),
            "train": lambda: not self.pending_trials() and not self.pending_search,
            "evaluate": self.is_predicted,
            "attention": self.is_measured,
        }
        return all(checks[stage]() for stage in stages)

    def is_predicted(self) -> bool:
        """Return whether the students' test answers are complete."""
        return self._is_complete_folder(self.predictions)

    def is_measured(self) -> bool:
        """Return whether the attention of all students is measured, or need not be."""
        return not self.attention or self._is_complete_folder(self.attention)

    def identities(self) -> dict[str, dict[str, str]]:
        """Return the identities of the teacher's and the student's weights."""
        return {"teacher": self.teacher_model, "student": self.student_model}

    def _is_complete_folder(self, folder: Path) -> bool:
        """Return whether a folder is complete and covers exactly the current students.

        Raises:
            UserError: if an adapter was modified after it was trained.
        """
        manifest = row_store.read_manifest(folder)
        if manifest is None or manifest["trials"] != student_batch.digests(self.eval_models()):
            return False
        for model in self.eval_models():
            if model.adapter:
                check_digest(model.adapter, model.digest)
        return True


def resolve(experiment: Experiment, retry_failed: bool = False) -> Plan:
    """Step 1: find the models and the problems, and determine the trials. Write nothing.

    Args:
        experiment: the experiment.
        retry_failed: whether failed trials of a sweep are retried.

    Raises:
        UserError: if something that the experiment names is missing, or if its settings conflict.
    """
    root = filesystem.resolve(experiment.storage)
    folder = StoragePaths(root).experiment(experiment.name)
    trackers.check_tracker(experiment.tracking, folder)
    run_record.check_compatible(experiment, folder)
    for section in (experiment.teacher, experiment.student):
        if section.trust_remote_code:
            print_status(f"warning: code that comes with {section.model} is run (trust_remote_code)")
    teacher_model = loading.identify_model(experiment.teacher)
    student_model = loading.identify_model(experiment.student)
    same_tokens = _have_same_tokens(experiment)
    known_points = searcher.known_points(experiment, folder)
    known_variants = variants(experiment, known_points)
    search_bounds: list[Variant] = []
    if experiment.sweep and experiment.sweep.search == "optuna":
        search_bounds = boundary_configs(experiment)
    possible_variants = [*known_variants, *search_bounds]
    _check_tokenizers(experiment, possible_variants, same_tokens)
    if any(variant.arm.train.packing for variant in possible_variants):
        loading.check_packing(experiment.student)
    splits = datasets.resolve_splits(experiment.dataset, root)
    _check_rounds(known_variants, splits)

    def completion_sets_of(some_variants: list[Variant]) -> dict[str, CompletionSet | None]:
        arms = arms_by_config_id(some_variants)
        return completion_set.completion_sets_for(experiment, arms, splits.content, root, teacher_model)

    def specs_of(some_variants: list[Variant], completion_sets: Mapping[str, CompletionSet | None]) -> list[TrialSpec]:
        return trial_specs(
            experiment,
            variants=some_variants,
            splits=splits,
            completion_sets=completion_sets,
            student_model=student_model,
            same_tokens=same_tokens,
            folder=folder,
        )

    def make_trials(arm_name: str, point: Hparams) -> list[TrialSpec]:
        variant = variant_at(experiment, arm_name, point)
        return specs_of([variant], completion_sets_of([variant]))

    completion_sets = completion_sets_of(possible_variants)
    plan = Plan(
        experiment=experiment,
        root=root,
        folder=folder,
        splits=splits,
        teacher_model=teacher_model,
        student_model=student_model,
        trials=specs_of(known_variants, completion_sets),
        completion_sets=completion_sets,
        retry_failed=retry_failed,
        pending_search=_pending_search(experiment, known_points, make_trials, search_bounds),
    )
    run_record.check_contents(folder, plan.identities(), splits.folder)
    return plan


def _have_same_tokens(experiment: Experiment) -> bool:
    """Return whether the teacher's token ids can be the student's targets."""
    teacher_tokenizer = loading.teacher_tokenizer(experiment.teacher)
    student_tokenizer = loading.load_tokenizer(experiment.student)
    # A chat API returns text only, which the student encodes with its own tokenizer.
    return teacher_tokenizer is not None and loading.have_same_tokens(teacher_tokenizer, student_tokenizer)


def _check_tokenizers(experiment: Experiment, some_variants: Sequence[Variant], same_tokens: bool) -> None:
    """Raise UserError if soft targets would need the token ids of another tokenizer."""
    for variant in some_variants:
        if variant.arm.targets.kind == "top_k" and not same_tokens:
            raise UserError(
                f"arm {variant.arm_name!r}: soft targets need one tokenizer, but {experiment.teacher.model} and "
                f"{experiment.student.model} have different ones; set targets.kind=hard"
            )


def _check_rounds(some_variants: Sequence[Variant], splits: Splits) -> None:
    """Raise UserError if an arm has more on-policy rounds than optimizer steps."""
    for variant in some_variants:
        train, targets = variant.arm.train, variant.arm.targets
        steps = train.epochs * math.ceil(splits.counts["train"] / train.batch_size)
        if targets.source == "student" and targets.rounds > steps:
            raise UserError(
                f"arm {variant.arm_name!r}: targets.rounds={targets.rounds} exceeds its {steps} optimizer steps; "
                "lower targets.rounds or train.batch_size, or raise train.epochs"
            )


def _pending_search(
    experiment: Experiment,
    known_points: Mapping[str, Sequence[Hparams]],
    make_trials: MakeTrials,
    search_bounds: list[Variant],
) -> PendingSearch | None:
    """Return the remaining points of a search that depends on results; None if nothing remains."""
    if experiment.sweep is None or not search_bounds:
        return None
    num_points = sum(experiment.sweep.num_samples - len(points) for points in known_points.values())
    num_trials = num_points * len(experiment.seeds)
    return PendingSearch(make_trials, search_bounds, num_trials) if num_trials else None
