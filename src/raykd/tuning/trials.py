"""The trials of an experiment: arms x hyper-parameters x seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raykd import identity
from raykd.config.experiment import Experiment
from raykd.data.datasets import Splits
from raykd.storage import hashing
from raykd.storage.paths import ExperimentPaths
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED
from raykd.teacher.completion_set import CompletionSet
from raykd.training.trial import TrialSpec, filter_parallel, has_adapter, trial_status
from raykd.tuning.variants import Variant


def trial_specs(
    experiment: Experiment,
    variants: Sequence[Variant],
    splits: Splits,
    asked: Mapping[str, CompletionSet | None],
    student: Mapping[str, str],
    same_tokens: bool,
    folder: Path,
) -> list[TrialSpec]:
    """The trials of an experiment: every arm at every point with every seed.

    A trial's id ends in a hash of all that determines its adapter, so a changed setting is another trial.

    Args:
        experiment: the experiment.
        variants: what is trained on.
        splits: the problems.
        asked: the completion set of each config id; None where the teacher is not asked.
        student: what identifies the student's weights.
        same_tokens: whether the teacher's token ids are the student's.
        folder: the experiment's folder.
    """
    made = []
    for variant in variants:
        arm, request = variant.arm, asked[variant.config_id]
        # A student's own answers are not there yet: what is given is what it begins with.
        given = asked.get(f"{variant.config_id}/warmup") if arm.targets.source == "student" else request
        for seed in experiment.seeds:
            completion_content = request.content if request else None
            content = identity.trial(experiment, arm, seed, splits.content, completion_content, student)
            trial_id = f"{variant.arm_name}-s{seed}-{hashing.content_key(content)[:8]}"
            made.append(
                TrialSpec(
                    trial_id=trial_id,
                    arm_name=variant.arm_name,
                    arm=arm,
                    seed=seed,
                    overrides=dict(experiment.arms[variant.arm_name]),
                    problems=splits.folder,
                    completions=given.folder if given else None,
                    same_tokens=same_tokens,
                    experiment=experiment.name,
                    folder=ExperimentPaths(folder).trial(trial_id),
                    config_id=variant.config_id,
                    hparams=variant.hparams,
                    sweep=experiment.sweep,
                    max_tokens=experiment.evaluate.sampling.max_tokens,
                )
            )
    return made


def pending_trials(jobs: Sequence[TrialSpec], retry_failed: bool = False) -> list[TrialSpec]:
    """The trials that have not come to their end.

    Args:
        jobs: trials.
        retry_failed: whether those that failed are tried again; outside a sweep they always are.
    """

    def is_over(job: TrialSpec) -> bool:
        if job.sweep is None:
            return has_adapter(job)
        # What an earlier scheduler stopped goes to its end where there is none now.
        stopped = {STOPPED} if job.sweep.scheduler != "none" else set()
        return trial_status(job) in {COMPLETE} | stopped | (set() if retry_failed else {FAILED})

    return filter_parallel(jobs, lambda job: not is_over(job))
