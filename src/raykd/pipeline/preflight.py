"""Checks before anything starts: the stages must fit the cluster, and the prompts the context length."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raykd import __version__
from raykd.cluster.capacity import fits_on_one_node
from raykd.cluster.resources import attention_workers, check_engine, check_trial, engine_bundles, resolve_accelerator
from raykd.config.sections import Evaluate
from raykd.errors import UserError
from raykd.evaluation import evaluate
from raykd.pipeline.plan import STAGES, Plan
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths, split_file
from raykd.teacher import build_prompts, completion_set
from raykd.teacher.completion_set import CompletionSet
from raykd.training import checkpoints
from raykd.training.trial import TrialSpec
from raykd.tuning.variants import Variant

# PyPI has no CPU build of some packages that vLLM's CPU build names and does not need, hence `--no-deps`.
CPU_INSTALL = (
    "pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "
    f"-r https://raw.githubusercontent.com/raykd/raykd/v{__version__}/requirements/cpu.txt"
)


@dataclass(frozen=True)
class RemainingWork:
    """What the stages of a command still have to do; the checks look at nothing else."""

    plan: Plan
    resources: Mapping[str, float]
    """The cluster's resources, by Ray's names."""
    pending: list[TrialSpec]
    """The trials to train."""
    search_bounds: list[Variant]
    """The bounds of a search whose points are not known yet."""
    on_policy: dict[str, TrialSpec]
    """A pending trial that learns from its own answers, for each config id; its other seeds have the same lengths."""
    missing: list[CompletionSet]
    """The completion sets to generate."""
    will_predict: bool
    """Whether students will answer the test problems."""
    will_measure: bool
    """Whether the attention of students will be measured."""

    @property
    def sets_to_score(self) -> list[tuple[CompletionSet, TrialSpec]]:
        """How the teacher scores on-policy answers, and a trial whose student writes them."""
        pairs = ((self.plan.completion_sets[config_id], trial) for config_id, trial in self.on_policy.items())
        return [(completions, trial) for completions, trial in pairs if completions]

    @property
    def uses_teacher_engine(self) -> bool:
        """Whether the teacher is served on this cluster."""
        return self.plan.experiment.teacher.endpoint is None and bool(self.missing or self.sets_to_score)

    @property
    def uses_student_engine(self) -> bool:
        """Whether students answer problems in an engine of vLLM."""
        return bool(self.on_policy) or self.will_predict


def preflight(plan: Plan, resources: Mapping[str, float], stages: Sequence[str] = STAGES) -> None:
    """Check that the remaining work fits the cluster and the models.

    Args:
        plan: the resolved experiment.
        resources: the cluster's resources, by Ray's names.
        stages: the stages that will run, of `STAGES`.

    Raises:
        UserError: if something does not fit; the message names the remedy.
    """
    work = _remaining_work(plan, resources, stages)
    for check in CHECKS:
        check(work)


def _remaining_work(plan: Plan, resources: Mapping[str, float], stages: Sequence[str]) -> RemainingWork:
    pending = plan.pending_trials() if "train" in stages else []
    return RemainingWork(
        plan=plan,
        resources=resources,
        pending=pending,
        search_bounds=plan.pending_search.boundary_configs if plan.pending_search and "train" in stages else [],
        on_policy={trial.config_id: trial for trial in pending if trial.arm.targets.source == "student"},
        missing=completion_set.missing_sets(plan.required_sets) if "generate" in stages else [],
        will_predict="evaluate" in stages and not plan.is_predicted(),
        will_measure=bool(plan.experiment.attention) and "attention" in stages and not plan.is_measured(),
    )


def check_vllm(work: RemainingWork) -> None:
    """Raise UserError if an engine is needed and vLLM is not installed."""
    sections = []
    if work.uses_teacher_engine:
        sections.append("teacher.engine")
    if work.uses_student_engine:
        sections.append("evaluate.engine")
    if sections and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{' and '.join(sections)}: vLLM is not installed; run `pip install 'raykd[gpu]'` for NVIDIA GPUs, or "
            f"`{CPU_INSTALL}` for CPUs"
        )


def check_teacher_engine(work: RemainingWork) -> None:
    """Raise UserError if the cluster cannot hold the teacher."""
    teacher = work.plan.experiment.teacher
    if work.uses_teacher_engine:
        accelerator = resolve_accelerator(teacher.engine.accelerator, work.resources)
        check_engine("teacher.engine", teacher.engine, accelerator, work.resources, teacher.replicas.min)


def check_student_engine(work: RemainingWork) -> None:
    """Raise UserError if the cluster cannot hold the students' engine."""
    engine = work.plan.experiment.evaluate.engine
    if work.uses_student_engine:
        accelerator = resolve_accelerator(engine.accelerator, work.resources)
        check_engine("evaluate.engine", engine, accelerator, work.resources)


def check_adapters_reach_engine(work: RemainingWork) -> None:
    """Raise UserError if the students' engine spans nodes while the adapters are in a bucket."""
    if not work.uses_student_engine or not filesystem.is_remote(work.plan.root):
        return
    engine = work.plan.experiment.evaluate.engine
    bundles = engine_bundles(engine, resolve_accelerator(engine.accelerator, work.resources))
    if not fits_on_one_node(bundles):
        raise UserError(
            f"evaluate.engine: its {len(bundles)} processes do not fit on one node, and Ray copies adapters from a "
            "bucket to one node only; lower its tensor or pipeline parallel size, or set `storage` to a folder that "
            "all nodes share"
        )


def check_training(work: RemainingWork) -> None:
    """Raise UserError if the cluster cannot hold one trial of each kind."""
    for each in [*work.pending, *work.search_bounds]:
        train = each.arm.train
        check_trial(train, resolve_accelerator(train.accelerator, work.resources), work.resources)


def check_checkpoints(work: RemainingWork) -> None:
    """Raise UserError if a trial was interrupted under another layout of workers, which its checkpoint depends on."""
    folder = ExperimentPaths(work.plan.folder).checkpoints
    interrupted = {each.name for each in filesystem.list_dirs(folder)} if work.pending else set[str]()
    for trial in work.pending:
        if trial.trial_id in interrupted:
            checkpoints.check_layout(folder / trial.trial_id, trial.arm.train)


def check_attention(work: RemainingWork) -> None:
    """Raise UserError if the cluster cannot hold a worker that measures attention."""
    section = work.plan.experiment.attention
    if work.will_measure and section:
        attention_workers(section, resolve_accelerator(section.accelerator, work.resources), work.resources)


def check_teacher_lengths(work: RemainingWork) -> None:
    """Raise UserError if too many of the teacher's prompts exceed its context length."""
    lengths = [(completions, completions.sampling.max_tokens) for completions in work.missing]
    lengths += [(completions, trial.arm.targets.rollout.max_tokens) for completions, trial in work.sets_to_score]
    experiment = work.plan.experiment
    for completions, max_tokens in lengths:
        build_prompts.check_teacher_lengths(
            [completions], work.plan.problems, experiment.teacher, experiment.prompt.instruction, max_tokens
        )


def check_rollout_lengths(work: RemainingWork) -> None:
    """Raise UserError if too many training prompts leave no room for on-policy answers."""
    evaluation = work.plan.experiment.evaluate
    for trial in work.on_policy.values():
        _check_student_lengths(
            work, "train", evaluation.as_in_training(trial.arm.targets.rollout), f"student of arm {trial.arm_name!r}"
        )


def check_validation_lengths(work: RemainingWork) -> None:
    """Raise UserError if too many validation prompts leave no room for answers, where a sweep measures accuracy."""
    sweep, evaluation = work.plan.experiment.sweep, work.plan.experiment.evaluate
    if (work.pending or work.search_bounds) and sweep and sweep.metric == "accuracy":
        _check_student_lengths(work, "validation", evaluation.as_in_training(evaluation.sampling), "students")


def check_test_lengths(work: RemainingWork) -> None:
    """Raise UserError if too many test prompts leave no room for answers."""
    if work.will_predict:
        _check_student_lengths(work, "test", work.plan.experiment.evaluate, "students")


def _check_student_lengths(work: RemainingWork, split: str, evaluation: Evaluate, role: str) -> None:
    evaluate.check_student_lengths(
        split_file(work.plan.problems, split),
        student=work.plan.experiment.student,
        evaluation=evaluation,
        instruction=work.plan.experiment.prompt.instruction,
        role=role,
    )


CHECKS: tuple[Callable[[RemainingWork], None], ...] = (
    check_vllm,
    check_teacher_engine,
    check_student_engine,
    check_adapters_reach_engine,
    check_training,
    check_checkpoints,
    check_attention,
    check_teacher_lengths,
    check_rollout_lengths,
    check_validation_lengths,
    check_test_lengths,
)
"""The checks in their order, the quick ones first: those of lengths tokenize every prompt."""
