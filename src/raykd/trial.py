"""Trial: what a trial, or the untouched student, came to, as read from its folder and its predictions, with n."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raykd import location
from raykd.comparison import Answers
from raykd.faults import UserError
from raykd.measured import Measured, Row, measure
from raykd.records import PREDICTION
from raykd.storage import read_json, read_rows


@dataclass(frozen=True)
class Trial:
    """A trial, or the untouched student: what trial.json says, and what its predictions do."""

    trial_id: str
    arm: str
    seed: int
    status: str
    error: str
    strategy: str
    overrides: Mapping[str, Any]
    dropped: Mapping[str, int]
    measured: Measured
    train_rows: int | None = None
    train_steps: int | None = None
    target_tokens: int | None = None
    train_seconds: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)
    """The searched fields by dotted path."""
    validation: Mapping[str, Any] | None = None
    """What was last measured on the validation problems."""
    num_workers: int | None = None
    accelerator: str = ""
    """`gpu` or `cpu`."""
    adapter: str = ""

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds of training times its GPUs; None where it had none, or that is not known."""
        if self.accelerator != "gpu" or self.train_seconds is None or not self.num_workers:
            return None
        return self.train_seconds * self.num_workers


def finite(value: Any) -> float | None:
    """The number, or None where there is none or it is not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def read_predictions(folder: Path) -> dict[str, dict[tuple[str, int], Row]]:
    """Prediction rows by trial, problem and sample; an answer replaces the error that an earlier attempt left."""
    rows: dict[str, dict[tuple[str, int], Row]] = {}
    if not folder.is_dir():
        return rows
    for row in read_rows(folder, PREDICTION).to_pylist():
        of_trial = rows.setdefault(row["trial_id"], {})
        answer = (row["problem_id"], row["sample_index"])
        earlier = of_trial.get(answer)
        if earlier is None or (earlier["error"] and not row["error"]):
            of_trial[answer] = row
    return rows


def read_trials(folder: Path, rows: Mapping[str, Answers]) -> list[Trial]:
    """All trials that have come to an end, and the untouched student.

    Args:
        folder: of the trials.
        rows: prediction rows by trial.
    """
    trials = [_trial(file.parent, rows) for file in location.in_each(folder, "trial.json")]
    with_folder = {trial.trial_id for trial in trials}
    for trial_id, of_trial in rows.items():
        if trial_id not in with_folder:
            first = next(iter(of_trial.values()))
            trials.append(
                Trial(
                    trial_id=trial_id,
                    arm=first["arm"],
                    seed=first["seed"],
                    status="complete",
                    error="",
                    strategy="",
                    overrides={},
                    dropped={},
                    measured=measure(of_trial.values()),
                )
            )
    return trials


def _trial(folder: Path, rows: Mapping[str, Answers]) -> Trial:
    told = read_json(folder / "trial.json")
    return Trial(
        trial_id=told["trial_id"],
        arm=told["arm"],
        seed=told["seed"],
        status=told["status"],
        error=told.get("error") or "",
        strategy=told.get("strategy") or "",
        overrides=told.get("overrides") or {},
        dropped=told.get("dropped") or {},
        measured=measure(rows.get(told["trial_id"], {}).values()),
        train_rows=told.get("rows"),
        train_steps=told.get("steps"),
        target_tokens=told.get("target_tokens"),
        train_seconds=finite(told.get("seconds")),
        loss_first=finite(told.get("loss_first")),
        loss_last=finite(told.get("loss_last")),
        losses=_losses(folder / "metrics.jsonl"),
        values=told.get("values") or {},
        validation=told.get("validation"),
        num_workers=told.get("num_workers"),
        accelerator=told.get("accelerator") or "",
        adapter=told.get("adapter") or "",
    )


def _losses(file: Path) -> list[tuple[int, float]]:
    """Loss by step. A trial that resumed wrote some steps twice: the later ones count."""
    by_step: dict[int, float] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # A trial that was killed may leave its last line half written.
            raise UserError(f"{file}, line {number} is not JSON: {line[:80]!r}") from None
        if finite(point.get("loss")) is not None:
            by_step[point["step"]] = point["loss"]
    return sorted(by_step.items())
