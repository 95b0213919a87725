"""The files of a trial's folder, `trial.json` and `metrics.jsonl`, as typed dictionaries for their readers."""

from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter

# Before Python 3.12 pydantic supports only the TypedDict of typing_extensions, which it depends on.
from typing_extensions import TypedDict

from raykd.config.errors import validated_dict
from raykd.storage import files
from raykd.storage.paths import RoundPaths, TrialPaths

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Validation(TypedDict):
    """The metrics of one validation of a sweep's trial."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]

    number: int
    """Number of the validation, from 1."""
    n: int
    """Number of validation problems."""
    loss: NotRequired[float]
    correct: NotRequired[int]
    accuracy: NotRequired[float]


class LossPoint(TypedDict):
    """One point of a loss curve: a line of `metrics.jsonl`."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]

    step: int
    """Number of optimizer steps so far."""
    loss: float | None
    """Mean loss per target token since the last point, in nats; None if no target token was in these steps."""
    epoch: NotRequired[int]
    learning_rate: NotRequired[float]
    target_tokens: NotRequired[int]
    """Number of target tokens so far."""
    seconds: NotRequired[float]
    """Time of training so far, in seconds."""
    steps: NotRequired[int]
    """Number of optimizer steps of the trial."""
    num_workers: NotRequired[int]
    accelerator: NotRequired[str]
    validation: NotRequired[Validation]


class TrialRecord(TypedDict):
    """The final status of a trial, and a summary of its training: `trial.json`."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]

    trial_id: str
    arm: str
    seed: int
    status: Literal["complete", "stopped", "failed"]
    error: NotRequired[str]
    strategy: NotRequired[str]
    overrides: NotRequired[dict[str, Any]]
    hparams: NotRequired[dict[str, Any]]
    rows: NotRequired[int]
    """Number of training examples."""
    dropped: NotRequired[dict[str, int]]
    """Number of rows that are no examples, by reason."""
    steps: NotRequired[int]
    target_tokens: NotRequired[int]
    seconds: NotRequired[float]
    num_workers: NotRequired[int]
    accelerator: NotRequired[str]
    loss_first: NotRequired[float | None]
    loss_last: NotRequired[float | None]
    validation: NotRequired[Validation | None]
    """The last validation's metrics."""
    adapter: NotRequired[str | None]
    adapter_digest: NotRequired[str]
    made_with: NotRequired[dict[str, Any]]
    """The software of the process that wrote the record (`raykd.storage.provenance`)."""


class RoundRecord(TypedDict):
    """The counts of a round of on-policy training: `round.json`."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]

    rows: int
    dropped: dict[str, int]
    adapter_digest: str


_LOSS_POINT, _TRIAL, _ROUND = TypeAdapter(LossPoint), TypeAdapter(TrialRecord), TypeAdapter(RoundRecord)


def read_loss_curve(file: Path) -> list[LossPoint]:
    """Return the points of a trial's loss curve so far; none if the file does not exist.

    Raises:
        UserError: if a line is damaged, with its number and the field.
    """
    if not file.exists():
        return []
    lines = files.read_json_lines(file)
    return [validated_dict(_LOSS_POINT, line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def read_trial_record(folder: Path) -> TrialRecord | None:
    """Return the record of a trial; None if the trial has not ended.

    Args:
        folder: the trial's folder.

    Raises:
        UserError: if the file is damaged, with the field.
    """
    file = TrialPaths(folder).record
    return validated_dict(_TRIAL, files.read_json(file), str(file)) if file.exists() else None


def read_round_record(folder: Path) -> RoundRecord:
    """Return the record of a completed round.

    Args:
        folder: the round's folder.

    Raises:
        UserError: if the file is damaged, with the field.
    """
    file = RoundPaths(folder).record
    return validated_dict(_ROUND, files.read_json(file), str(file))
