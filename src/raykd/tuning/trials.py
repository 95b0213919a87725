"""The trials of an experiment (arms x hyperparameters x seeds), and their registry during training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class TrialRegistry(Mapping[str, TrialSpec]):
    """The trials that one Tune run trains, by id.

    The searcher adds the trials of new points. The progress table, the trackers and the status callback only read it.

    Args:
        pending: the trials that are known before the run.
        replayed: finished trials of the same sweep, which only report their validation results again. They are not
            items of the mapping.
    """

    def __init__(self, pending: Iterable[TrialSpec], replayed: Iterable[TrialSpec] = ()) -> None:
        self._trials = {trial.trial_id: trial for trial in pending}
        self.replayed = {trial.trial_id: trial for trial in replayed}

    def __getitem__(self, trial_id: str) -> TrialSpec:
        return self._trials[trial_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def add(self, trial: TrialSpec) -> None:
        """Add a trial that the search created."""
        self._trials[trial.trial_id] = trial

    def all_trials(self) -> list[TrialSpec]:
        """Return the replayed trials, then those to train."""
        return [*self.replayed.values(), *self._trials.values()]


def trial_specs(
    experiment: Experiment,
    variants: Sequence[Variant],
    splits: Splits,
    completion_sets: Mapping[str, CompletionSet | None],
    student_model: Mapping[str, str],
    same_tokens: bool,
    folder: Path,
) -> list[TrialSpec]:
    """Return one trial for each variant and seed.

    A trial's id ends in a hash of everything that determines its adapter: a changed setting makes another trial.

    Args:
        experiment: the experiment.
        variants: the arms with their hyperparameters.
        splits: the problems.
        completion_sets: the completion set of each config id; None where the teacher is not used.
        student_model: the identity of the student's weights.
        same_tokens: whether the teacher's token ids are the student's.
        folder: the experiment's folder.
    """
    specs = []
    for variant in variants:
        arm, completions = variant.arm, completion_sets[variant.config_id]
        # On-policy answers do not exist yet: such a student starts from the completions of its warm-up rounds.
        initial = completion_sets.get(f"{variant.config_id}/warmup") if arm.targets.source == "student" else completions
        for seed in experiment.seeds:
            completion_content = completions.content if completions else None
            content = identity.trial(experiment, arm, seed, splits.content, completion_content, student_model)
            trial_id = f"{variant.arm_name}-s{seed}-{hashing.content_key(content)[:8]}"
            specs.append(
                TrialSpec(
                    trial_id=trial_id,
                    arm_name=variant.arm_name,
                    arm=arm,
                    seed=seed,
                    overrides=dict(experiment.arms[variant.arm_name]),
                    problems=splits.folder,
                    completions=initial.folder if initial else None,
                    same_tokens=same_tokens,
                    experiment=experiment.name,
                    folder=ExperimentPaths(folder).trial(trial_id),
                    config_id=variant.config_id,
                    hparams=variant.hparams,
                    sweep=experiment.sweep,
                    max_tokens=experiment.evaluate.sampling.max_tokens,
                )
            )
    return specs


def pending_trials(trials: Sequence[TrialSpec], retry_failed: bool = False) -> list[TrialSpec]:
    """Return the trials that are not finished.

    Args:
        trials: the trials to filter.
        retry_failed: whether failed trials of a sweep count as pending; without a sweep they always do.
    """

    def is_pending(trial: TrialSpec) -> bool:
        if trial.sweep is None:
            return not has_adapter(trial)
        finished = {COMPLETE}
        # Without early stopping, a trial that an earlier scheduler stopped is trained to its end.
        if trial.sweep.scheduler != "none":
            finished.add(STOPPED)
        if not retry_failed:
            finished.add(FAILED)
        return trial_status(trial) not in finished

    return filter_parallel(trials, is_pending)
