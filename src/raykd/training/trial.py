"""A trial: its specification, its folder, its status and its loss curve."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raykd.config.experiment import Arm
from raykd.config.sections import Sweep
from raykd.storage import files, filesystem
from raykd.storage.paths import RoundPaths, TrialPaths, split_file
from raykd.storage.provenance import provenance
from raykd.storage.schemas import COMPLETE
from raykd.training import schedule
from raykd.training.trial_record import LossPoint, Validation, read_loss_curve, read_round_record, read_trial_record


@dataclass(frozen=True)
class TrialSpec:
    """One trial: an arm with values for the searched fields, and a seed."""

    trial_id: str
    arm_name: str
    arm: Arm
    seed: int
    overrides: dict[str, Any]
    problems: Path
    completions: Path | None
    """Folder of the completions to train on, or of the warm-up rounds for a student that learns from its own answers;
    None for reference solutions as hard targets."""
    same_tokens: bool
    """Whether teacher and student have the same tokenizer."""
    experiment: str
    """The experiment's name."""
    folder: Path
    """The trial's folder."""
    config_id: str
    """Id of the arm with its searched values, shared by all seeds (`raykd.tuning.variants`)."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """Values of the searched fields by dotted path, without those that have no effect on the arm."""
    sweep: Sweep | None = None
    """The section `sweep`, for validation during training; None for no validation."""
    max_tokens: int = 0
    """Maximum number of tokens of an answer to a validation problem."""
    round: int | None = None
    """The current round, from 0, of a student that learns from its own answers; None for training without rounds."""

    @property
    def rounds(self) -> int:
        """Number of rounds; 1 for training without rounds."""
        return self.arm.targets.rounds if self.arm.targets.source == "student" else 1

    @property
    def output_dir(self) -> Path:
        """Folder of the adapter and status: of the current round, or of the trial for its last round."""
        if self.round is None or self.round == self.rounds - 1:
            return self.folder
        return self.round_folder(self.round)

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round's answers, their scores and, except for the last round, its adapter."""
        return TrialPaths(self.folder).round(number)


def problem_ids(trial: TrialSpec) -> list[str]:
    """Return the ids of the training problems, in their order."""
    return files.read_table(split_file(trial.problems, "train"), ["problem_id"])["problem_id"].to_pylist()


def problem_ids_of_round(trial: TrialSpec, number: int) -> frozenset[str]:
    """Return the ids of the problems in the steps of a round, which the student answers before it.

    Args:
        trial: the trial.
        number: the round, from 0.
    """
    ids, train = problem_ids(trial), trial.arm.train
    steps = list(schedule.training_order(len(ids), train.batch_size, train.epochs, trial.seed))
    return frozenset(
        ids[row] for step in schedule.steps_of_round(len(steps), number, trial.rounds) for row in steps[step][1]
    )


def trial_status(trial: TrialSpec) -> str:
    """Return the final status of a trial, such as `schemas.COMPLETE`; "" if it has none yet."""
    record = read_trial_record(trial.folder)
    return record["status"] if record else ""


def has_adapter(trial: TrialSpec) -> bool:
    """Return whether the adapter of a trial, or of its current round, is complete."""
    if trial.output_dir != trial.folder:
        return RoundPaths(trial.output_dir).record.exists()
    return trial_status(trial) == COMPLETE


def trained_digest(trial: TrialSpec) -> str:
    """Return the digest of the adapter of a trial, or of its current round, as it was after training."""
    if trial.output_dir != trial.folder:
        return read_round_record(trial.output_dir)["adapter_digest"]
    return (read_trial_record(trial.folder) or {}).get("adapter_digest", "")


def filter_parallel(trials: Sequence[TrialSpec], predicate: Callable[[TrialSpec], bool]) -> list[TrialSpec]:
    """Return the trials for which a predicate is true.

    Threads evaluate it, because it reads files and a bucket answers slowly.

    Args:
        trials: the trials.
        predicate: a function of one trial.
    """
    with ThreadPoolExecutor(filesystem.MAX_PARALLEL_REQUESTS) as pool:
        results = pool.map(predicate, trials)
        return [trial for trial, is_kept in zip(trials, results, strict=True) if is_kept]


def write_trial_status(trial: TrialSpec, status: str, error: str = "", **entries: Any) -> None:
    """Write a trial's final status and a summary of its loss curve to its trial.json.

    Args:
        trial: the trial.
        status: the final status, such as `schemas.COMPLETE`.
        error: why it failed; "" if it did not.
        entries: further entries of the file.
    """
    curve = read_loss_curve(TrialPaths(trial.folder).metrics)
    measurements = validations(curve)
    losses = [point["loss"] for point in curve if point["loss"] is not None]
    last = curve[-1] if curve else {}
    files.write_json(
        TrialPaths(trial.folder).record,
        {
            "trial_id": trial.trial_id,
            "arm": trial.arm_name,
            "seed": trial.seed,
            "overrides": trial.overrides,
            "hparams": trial.hparams,
            "strategy": trial.arm.prompt.strategy if trial.arm.needs_teacher else "",
            "status": status,
            "error": error,
            **entries,
            "num_workers": last.get("num_workers", trial.arm.train.num_workers),
            "accelerator": last.get("accelerator", ""),
            **{name: last.get(name, 0) for name in ("target_tokens", "seconds")},
            "steps": last.get("step", 0),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "made_with": provenance(),
            "validation": measurements[-1] if measurements else None,
            "adapter": str(TrialPaths(trial.folder).adapter) if status == COMPLETE else None,
        },
    )


def validations(curve: Iterable[LossPoint]) -> list[Validation]:
    """Return the validation results in a loss curve, in order of step."""
    return [validation for point in curve if (validation := point.get("validation"))]


def last_validation_metric(trial: TrialSpec) -> float | None:
    """Return the sweep's metric at a trial's last validation; None if there was none."""
    measurements = validations(read_loss_curve(TrialPaths(trial.folder).metrics))
    return measurements[-1].get(trial.sweep.metric) if measurements and trial.sweep else None


def rank_by_validation(scores: Mapping[str, Iterable[float]], metric: str) -> list[str]:
    """Return configurations by the mean score of their seeds, the best first; more seeds rank before fewer.

    A missing seed was stopped early by the sweep's scheduler, because the configuration was worse.

    Args:
        scores: by configuration, the last validation score of each seed.
        metric: `accuracy` or `loss`.
    """
    sign = -1 if metric == "accuracy" else 1

    def key(config: str) -> tuple[Any, ...]:
        values = list(scores[config])
        mean = sum(values) / len(values)
        return -len(values), math.inf if math.isnan(mean) else sign * mean, config

    return sorted(scores, key=key)
