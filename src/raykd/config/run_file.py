"""The run record, `run.json`, as pydantic models for its readers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# pydantic needs this one on Python 3.11, and brings it.
from typing_extensions import TypedDict

from raykd.config.errors import validated
from raykd.errors import UserError
from raykd.storage import files, filesystem

FILE = "run.json"


class TeacherCounts(TypedDict, total=False):
    """What the teacher wrote or scored for some arms, in counts; errors are among the rows and in nothing else."""

    strategy: str
    teacher: str
    source: str
    content_keys: list[str]
    arms: list[str]
    num_samples: int
    rows: int
    errors: int
    correct: int | None
    completion_tokens: int | None
    truncated: int | None
    answer_first: int | None
    seconds: float | None


class ProblemCounts(BaseModel):
    """The problems of a run."""

    model_config = ConfigDict(frozen=True)

    source: str = ""
    key: str = ""
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None


class RunRecord(BaseModel):
    """What a run has recorded about itself so far; a field that it has not come to has its default."""

    model_config = ConfigDict(frozen=True)

    name: str = ""
    raykd_version: str = ""
    command: str = ""
    """What was typed to make it."""
    started: str = ""
    """When it was first begun, in ISO 8601."""
    versions: Mapping[str, str] = Field(default_factory=dict)
    """Of the packages that matter."""
    python: str = ""
    platform: str = ""
    seeds: tuple[int, ...] = ()
    trials: tuple[str, ...] | None = None
    """Ids of its trials; None for all that have a folder."""
    predictions: str = "predictions"
    """The folder of the students' answers, below the experiment's."""
    attention: str | None = None
    """The folder of the attention heads' rows, below the experiment's; None where they are not measured."""
    demonstration: bool = False
    models: Mapping[str, Mapping[str, str]] = Field(default_factory=dict)
    """What identifies the weights of the teacher and of the student."""
    problems: ProblemCounts = ProblemCounts()
    completions: tuple[TeacherCounts, ...] = ()
    stages: Mapping[str, float] = Field(default_factory=dict)
    """Seconds by stage."""
    processor_seconds: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    """By who held them, and by the kind of processor."""
    harness: str = ""
    """The command that has lm-evaluation-harness score a student."""


def read_run(folder: Path) -> RunRecord:
    """Read `run.json`.

    Args:
        folder: an experiment's folder.

    Raises:
        UserError: where it is not there, cannot be read or holds something else, with the field.
    """
    file = folder / FILE
    try:
        is_there = file.is_file()
    except Exception as error:
        if not filesystem.is_remote(folder):
            raise
        # Which errors a library has for a bucket's keys, names or networks is its own affair.
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:300]})") from error
    if not is_there:
        raise UserError(f"{folder} has no {FILE}: give the folder of an experiment, as `raykd run` makes it")
    found: dict[str, Any] = files.read_json(file)
    return validated(RunRecord, {name: value for name, value in found.items() if value is not None}, str(file))
