"""A trial: its specification, its folder and its status."""

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
from raykd.storage.schemas import COMPLETE
from raykd.training import schedule


@dataclass(frozen=True)
class TrialSpec:
    """One trial."""

    trial_id: str
    arm_name: str
    arm: Arm
    seed: int
    overrides: dict[str, Any]
    problems: Path
    completions: Path | None
    """Folder of the completions to train on, for a student that learns from its own answers those that it begins with;
    None where targets are the tokens of the reference solutions."""
    same_tokens: bool
    """Whether the teacher's token ids mean the same to the student."""
    experiment: str
    """The experiment's name."""
    folder: Path
    """The trial's folder."""
    config_id: str
    """What it learns: the arm, and the point of the sweep where there is one (`raykd.tuning.variants`)."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """The searched fields by dotted path, those that bear on the arm."""
    sweep: Sweep | None = None
    """How it is measured on the validation problems while it learns; None where it is not."""
    max_tokens: int = 0
    """How long an answer to a validation problem may be."""
    round: int | None = None
    """Which round of a student that learns from its own answers; None for training in one go."""

    @property
    def rounds(self) -> int:
        """In how many parts the training is done."""
        return self.arm.targets.rounds if self.arm.targets.source == "student" else 1

    @property
    def output_dir(self) -> Path:
        """The folder of what this part of the training makes: the trial's own for the last part."""
        is_last = self.round is None or self.round == self.rounds - 1
        return self.folder if is_last else self.round_folder(self.round or 0)

    def round_folder(self, number: int) -> Path:
        """Where a round's answers, their scores and, but for the last round, its adapter are."""
        return TrialPaths(self.folder).round(number)


def problem_ids(job: TrialSpec) -> list[str]:
    """The training problems, in their order."""
    return files.read_table(split_file(job.problems, "train"), ["problem_id"])["problem_id"].to_pylist()


def problem_ids_of_round(job: TrialSpec, number: int) -> frozenset[str]:
    """The problems that the steps of a round go through, which a student answers at its beginning."""
    ids, train = problem_ids(job), job.arm.train
    steps = list(schedule.training_order(len(ids), train.batch_size, train.epochs, job.seed))
    return frozenset(
        ids[row] for step in schedule.steps_of_round(len(steps), number, job.rounds) for row in steps[step][1]
    )


def trial_status(job: TrialSpec) -> str:
    """What a trial has come to; empty where it goes on."""
    record = TrialPaths(job.folder).record
    return files.read_json(record)["status"] if record.exists() else ""


def has_adapter(job: TrialSpec) -> bool:
    """Whether a trial's adapter is there, or that of its round."""
    if job.output_dir != job.folder:
        return RoundPaths(job.output_dir).record.exists()
    return trial_status(job) == COMPLETE


def filter_parallel(jobs: Sequence[TrialSpec], is_so: Callable[[TrialSpec], bool]) -> list[TrialSpec]:
    """The jobs of which something is so; several are looked at a time, for a bucket takes its time to answer."""
    with ThreadPoolExecutor(filesystem.MAX_PARALLEL_REQUESTS) as pool:
        return [job for job, so in zip(jobs, pool.map(is_so, jobs), strict=True) if so]


def write_trial_status(job: TrialSpec, status: str, error: str = "", **more: Any) -> None:
    """Writes what a trial has come to, with how far its loss curve goes."""
    curve = read_loss_curve(TrialPaths(job.folder).metrics)
    measured = validations(curve)
    last = curve[-1] if curve else {}
    files.write_json(
        TrialPaths(job.folder).record,
        {
            "trial_id": job.trial_id,
            "arm": job.arm_name,
            "seed": job.seed,
            "overrides": job.overrides,
            "hparams": job.hparams,
            "strategy": job.arm.prompt.strategy if job.arm.needs_teacher else "",
            "status": status,
            "error": error,
            **more,
            "num_workers": last.get("num_workers", job.arm.train.num_workers),
            "accelerator": last.get("accelerator", ""),
            **{name: last.get(name, 0) for name in ("target_tokens", "seconds")},
            "steps": last.get("step", 0),
            "loss_first": curve[0]["loss"] if curve else None,
            "loss_last": last.get("loss"),
            "validation": measured[-1] if measured else None,
            "adapter": str(TrialPaths(job.folder).adapter) if status == COMPLETE else None,
        },
    )


def read_loss_curve(file: Path) -> list[dict[str, Any]]:
    """The points of a trial's loss curve, as far as it has come.

    Raises:
        UserError: where a line is no point.
    """
    return files.read_json_lines(file) if file.exists() else []


def validations(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured on the validation problems, from the first time to the last."""
    return [point["validation"] for point in curve if point.get("validation")]


def last_validation_metric(job: TrialSpec) -> float | None:
    """What a trial of a sweep had when it was last measured; None where it was not."""
    measured = validations(read_loss_curve(TrialPaths(job.folder).metrics))
    return measured[-1][job.sweep.metric] if measured and job.sweep else None


def rank_by_validation(found: Mapping[str, Iterable[float]], metric: str) -> list[str]:
    """Points by what their seeds reached in the mean, the best first; those of more seeds before those of fewer.

    A point that lost a seed on the way was stopped there for being worse.

    Args:
        found: what each seed reached when it was last measured.
        metric: `accuracy` or `loss`.
    """
    sign = -1 if metric == "accuracy" else 1

    def key(point: str) -> tuple[Any, ...]:
        values = list(found[point])
        mean = sum(values) / len(values)
        return -len(values), math.inf if math.isnan(mean) else sign * mean, point

    return sorted(found, key=key)
