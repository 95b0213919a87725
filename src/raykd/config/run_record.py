"""The run record, `run.json`, as pydantic models for its readers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Before Python 3.12 pydantic supports only the TypedDict of typing_extensions, which it depends on.
from typing_extensions import TypedDict

from raykd.config.errors import validated
from raykd.display import summary
from raykd.errors import UserError
from raykd.storage import files, filesystem
from raykd.storage.paths import ExperimentPaths


class TeacherCounts(TypedDict, total=False):
    """Counts of the completions that the teacher wrote or scored for some arms.

    `rows` includes the `errors`; all other counts leave them out.
    """

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
    """The source and the number of problems of a run."""

    model_config = ConfigDict(frozen=True)

    source: str = ""
    key: str = ""
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None


class RunRecord(BaseModel):
    """The run record. A field that has not been recorded yet has its default."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    raykd_version: str = ""
    commands: tuple[str, ...]
    """The different commands that did the work, in the order of their first use."""
    started: str
    """Time of the first start, in ISO 8601."""
    versions: Mapping[str, str]
    """Versions of the main dependencies by package."""
    python: str = ""
    platform: str = ""
    seeds: tuple[int, ...] = ()
    trials: tuple[str, ...] | None = None
    """Ids of the trials. None: all that have a folder."""
    predictions: str = "predictions"
    """The folder of the students' answers, relative to the experiment's folder."""
    attention: str | None = None
    """The folder of the attention statistics, relative to the experiment's folder. None: not measured."""
    demonstration: bool = False
    models: Mapping[str, Mapping[str, str]] = Field(default_factory=dict)
    """The identity of the teacher's and the student's weights, by role."""
    problems: ProblemCounts = ProblemCounts()
    completions: tuple[TeacherCounts, ...] = ()
    stages: Mapping[str, float] = Field(default_factory=dict)
    """Seconds of each stage, by its command: `generate`, `train`, `evaluate`, `attention`."""
    processor_seconds: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    """Processor-seconds by what reserved them (`teacher`, `evaluate`, `attention`), and by accelerator."""
    harness: str = ""
    """The command that evaluates a student with lm-evaluation-harness."""


def read_run(folder: Path) -> RunRecord:
    """Return the run record of an experiment's folder.

    Raises:
        UserError: if the file is missing, cannot be read or is not valid, with the field.
    """
    file = ExperimentPaths(folder).run_record
    try:
        is_there = file.is_file()
    except Exception as error:
        if not filesystem.is_remote(folder):
            raise
        # Each bucket library raises its own exceptions for wrong keys, names and networks.
        raise UserError(f"{file} cannot be read ({summary(error)})") from error
    if not is_there:
        raise UserError(f"{folder} has no {file.name}: give the folder of an experiment that `raykd run` made")
    tree: dict[str, Any] = files.read_json(file)
    return validated(RunRecord, {name: value for name, value in tree.items() if value is not None}, str(file))
