"""Report trials: the results of trials and of the base student, read from their folders and predictions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raykd.analysis.comparison import Answers
from raykd.analysis.scores import Row, Scores, compute_scores
from raykd.errors import UserError
from raykd.storage import filesystem
from raykd.storage.paths import TRIAL_FILE, TrialPaths
from raykd.storage.row_store import read_rows
from raykd.storage.schemas import COMPLETE, PREDICTION
from raykd.training.trial_record import read_loss_curve, read_trial_record


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial, or of the base student: its `trial.json` and the scores of its predictions."""

    trial_id: str
    arm: str
    seed: int
    status: str
    error: str
    strategy: str
    overrides: Mapping[str, Any]
    dropped: Mapping[str, int]
    scores: Scores
    train_rows: int | None = None
    train_steps: int | None = None
    target_tokens: int | None = None
    train_seconds: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss, without losses that are not finite."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    """The searched fields by dotted path."""
    validation: Mapping[str, Any] | None = None
    """The last validation's metrics."""
    num_workers: int | None = None
    accelerator: str = ""
    """`gpu` or `cpu`."""
    adapter: str = ""

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds of training multiplied by the number of GPUs; None without GPUs or where a number is not recorded."""
        if self.accelerator != "gpu" or self.train_seconds is None or not self.num_workers:
            return None
        return self.train_seconds * self.num_workers


def finite(value: Any) -> float | None:
    """Return the value where it is a finite number; else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def read_predictions(folder: Path) -> dict[str, dict[tuple[str, int], Row]]:
    """Return prediction rows by trial, problem and sample; an answer replaces the error of an earlier attempt."""
    rows: dict[str, dict[tuple[str, int], Row]] = {}
    if not folder.is_dir():
        return rows
    for row in read_rows(folder, PREDICTION).to_pylist():
        trial_rows = rows.setdefault(row["trial_id"], {})
        key = (row["problem_id"], row["sample_index"])
        earlier = trial_rows.get(key)
        if earlier is None or (earlier["error"] and not row["error"]):
            trial_rows[key] = row
    return rows


def read_trials(folder: Path, rows: Mapping[str, Answers]) -> list[TrialResult]:
    """Return the results of all trials that have ended, and of the base student.

    Args:
        folder: of the trials.
        rows: prediction rows by trial.

    Raises:
        UserError: a trial's record or loss curve is damaged.
    """
    trials = [_trial(file.parent, rows) for file in filesystem.find_in_subdirs(folder, TRIAL_FILE)]
    with_folder = {trial.trial_id for trial in trials}
    for trial_id, trial_rows in rows.items():
        if trial_id not in with_folder:
            first = next(iter(trial_rows.values()))
            trials.append(
                TrialResult(
                    trial_id=trial_id,
                    arm=first["arm"],
                    seed=first["seed"],
                    status=COMPLETE,
                    error="",
                    strategy="",
                    overrides={},
                    dropped={},
                    scores=compute_scores(trial_rows.values()),
                )
            )
    return trials


def _trial(folder: Path, rows: Mapping[str, Answers]) -> TrialResult:
    record = read_trial_record(folder)
    assert record, "the trial has a record"
    digest = record.get("adapter_digest")
    if any(row["adapter_digest"] != digest for row in rows.get(record["trial_id"], {}).values()):
        raise UserError(
            f"{folder}: the kept answers are those of an earlier adapter, because the student was trained again; "
            "evaluate it again with `raykd evaluate`"
        )
    curve = read_loss_curve(TrialPaths(folder).metrics)
    losses = [(point["step"], loss) for point in curve if (loss := point["loss"]) is not None]
    return TrialResult(
        trial_id=record["trial_id"],
        arm=record["arm"],
        seed=record["seed"],
        status=record["status"],
        error=record.get("error") or "",
        strategy=record.get("strategy") or "",
        overrides=record.get("overrides") or {},
        dropped=record.get("dropped") or {},
        scores=compute_scores(rows.get(record["trial_id"], {}).values()),
        train_rows=record.get("rows"),
        train_steps=record.get("steps"),
        target_tokens=record.get("target_tokens"),
        train_seconds=record.get("seconds"),
        loss_first=record.get("loss_first"),
        loss_last=record.get("loss_last"),
        losses=losses,
        hparams=record.get("hparams") or {},
        validation=record.get("validation"),
        num_workers=record.get("num_workers"),
        accelerator=record.get("accelerator") or "",
        adapter=record.get("adapter") or "",
    )
