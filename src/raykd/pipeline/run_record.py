"""The run record: `experiment.yaml` and `run.json` with a run's versions, models, seeds and times."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raykd import identity
from raykd.cluster.resources import Accelerator
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.config.run_record import RunRecord, read_run
from raykd.data.datasets import split_size
from raykd.errors import UserError
from raykd.models.builtin import MODELS
from raykd.storage import files, row_store
from raykd.storage.paths import SPLITS, ExperimentPaths
from raykd.storage.provenance import provenance
from raykd.teacher.completion_set import CompletionSet

MANIFEST_COUNTS = ("rows", "errors", "correct", "completion_tokens", "truncated", "answer_first", "seconds")

# The stages whose processor time `run.json` holds; `trial.json` holds that of training.
# What reserves processors, by the sections of the configuration. `evaluate`: the students' engine.
TEACHER_ROLE, EVALUATE_ROLE, ATTENTION_ROLE = "teacher", "evaluate", "attention"


def check_compatible(experiment: Experiment, folder: Path) -> None:
    """Raise UserError if a folder holds another experiment of the same name.

    Arms and seeds may be added to an experiment. Any other change that affects its results makes it another one.

    Args:
        experiment: the experiment.
        folder: its folder.
    """
    file = ExperimentPaths(folder).config
    if not file.exists():
        return
    try:
        earlier = load_experiment(file)
    except UserError as error:
        raise UserError(f"{error}; {folder} was written by another version of raykd: set another name=...") from None
    old_fields, new_fields = identity.experiment_fields(earlier), identity.experiment_fields(experiment)
    changed = []
    for path in sorted(old_fields.keys() | new_fields.keys()):
        old, new = old_fields.get(path), new_fields.get(path)
        # Fields of `evaluate` affect training only with a search or with on-policy arms. If one of these was added or
        # removed, the fields exist on one side only, and nothing has changed.
        is_comparable = not path.startswith("evaluate.") or (path in old_fields and path in new_fields)
        if old != new and is_comparable:
            changed.append(f"{path} was {old!r}, is {new!r}")
    changed += [
        f"arm {arm} was {overrides}, is {experiment.arms[arm]}"
        for arm, overrides in earlier.arms.items()
        if arm in experiment.arms and overrides != experiment.arms[arm]
    ]
    if changed:
        raise UserError(
            f"{folder} holds another experiment named {experiment.name!r}: {'; '.join(changed)}. Give this experiment "
            "a name of its own (name=...); completions that both need are shared"
        )


def check_contents(folder: Path, identities: Mapping[str, Mapping[str, str]], problems: Path) -> None:
    """Raise UserError if a folder was started with other weights or problems of the same names.

    Args:
        folder: the experiment's folder.
        identities: the identities of the teacher's and the student's weights.
        problems: the folder of the splits.
    """
    earlier = _read_earlier(folder)
    if earlier is None:
        return
    contents = [(f"the {role}", earlier.models.get(role), dict(each)) for role, each in identities.items()]
    for what, old, new in [*contents, ("the problems' key", earlier.problems.key or None, problems.name)]:
        # The content of a name changes if a branch on the hub moves or a file is edited.
        if old is not None and old != new:
            raise UserError(
                f"{folder} was started with other content: {what} was {old}, is {new}. Give this experiment a name of "
                "its own (name=...), or set the revision that it was started with"
            )


def start(
    experiment: Experiment,
    folder: Path,
    problems: Path,
    predictions: Path,
    attention: Path | None,
    identities: Mapping[str, Mapping[str, str]],
    trials: list[str],
    command: str,
    *,
    has_work: bool,
) -> None:
    """Write `run.json` before any other work; keep the times of earlier runs.

    Args:
        experiment: the experiment.
        folder: its folder.
        problems: the folder of the splits.
        predictions: the folder of the students' test answers.
        attention: the folder of the attention measurements; None if attention is not measured.
        identities: the identities of the teacher's and the student's weights.
        trials: the ids of the trials; other trials in the folder belong to an earlier configuration.
        command: the command line.
        has_work: whether the command has something left to do. One without is only recorded if it is the first.
    """
    earlier = _read_earlier(folder)
    kept = earlier.model_dump(mode="json") if earlier else {}
    commands = kept.get("commands", [])
    if command not in commands and (has_work or not commands):
        commands = [*commands, command]
    # What made the results is recorded by the command that made them, not by one that finds them complete.
    made_with = provenance() if has_work or not kept else {name: kept[name] for name in provenance()}
    built_in = {experiment.teacher.model, experiment.student.model} & set(MODELS)
    files.write_json(
        ExperimentPaths(folder).run_record,
        {
            "name": experiment.name,
            "commands": commands,
            "started": kept.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            **made_with,
            "seeds": list(experiment.seeds),
            "trials": trials,
            "predictions": str(predictions.relative_to(folder)),
            "attention": str(attention.relative_to(folder)) if attention else None,
            "demonstration": bool(built_in) or experiment.dataset.source == "demo",
            "models": {role: dict(each) for role, each in identities.items()},
            "problems": {
                "source": experiment.dataset.source,
                "key": problems.name,
                **{f"num_{split}": split_size(problems, split) for split in SPLITS},
            },
            "completions": kept.get("completions", []),
            "stages": kept.get("stages", {}),
            "processor_seconds": kept.get("processor_seconds", {}),
            "harness": kept.get("harness", ""),
        },
    )


def _read_earlier(folder: Path) -> RunRecord | None:
    """Return the run record of an experiment that was started; None for a new one.

    Raises:
        UserError: if the record is damaged, or missing although the experiment was started.
    """
    paths = ExperimentPaths(folder)
    if paths.run_record.exists():
        return read_run(folder)
    if paths.config.exists():
        raise UserError(
            f"{paths.run_record} is missing, which names the models and problems of the results in {folder}: restore "
            "it, or give this experiment a name of its own (name=...)"
        )
    return None


@dataclass(frozen=True)
class TeacherUsage:
    """A completion set, and the arms that use it."""

    completion_set: CompletionSet
    arms: list[str]
    folders: list[Path]
    """The folders of the rows: one for each round of on-policy students, else one."""


def record_completions(folder: Path, teacher: str, teacher_usages: list[TeacherUsage]) -> None:
    """Write the counts of the teacher's completions to `run.json`.

    Args:
        folder: the experiment's folder.
        teacher: the teacher's name.
        teacher_usages: the completion sets of the experiment.
    """
    entries = []
    for usage in teacher_usages:
        manifests = [manifest for path in usage.folders if (manifest := row_store.read_manifest(path))]
        if not manifests:
            continue
        completion_set = usage.completion_set
        entries.append(
            {
                "strategy": completion_set.strategy_name,
                "source": completion_set.source,
                "teacher": teacher,
                "content_keys": [path.name for path in usage.folders] if completion_set.source != "student" else [],
                "arms": usage.arms,
                "num_samples": completion_set.num_samples,
                **{name: sum(manifest[name] for manifest in manifests) for name in MANIFEST_COUNTS},
            }
        )
    set_entry(folder, "completions", entries)


def set_entry(folder: Path, name: str, value: Any) -> None:
    """Set one entry of `run.json`."""
    file = ExperimentPaths(folder).run_record
    files.write_json(file, {**files.read_json(file), name: value})


@contextmanager
def track_processors(folder: Path, role: str, accelerator: Accelerator, num_processors: int) -> Iterator[None]:
    """Add the processor time of a `with` block to `run.json`: seconds times processors, idle ones included.

    Args:
        folder: the experiment's folder.
        role: what reserves them, such as `TEACHER_ROLE`.
        accelerator: the kind of processor.
        num_processors: the most that are reserved at a time; for 0 nothing is recorded.
    """
    if not num_processors:
        yield
        return
    started = time.monotonic()
    try:
        yield
    finally:
        by_role = files.read_json(ExperimentPaths(folder).run_record).get("processor_seconds") or {}
        by_accelerator = by_role.get(role, {})
        seconds = by_accelerator.get(accelerator, 0) + num_processors * (time.monotonic() - started)
        updated = {**by_accelerator, accelerator: round(seconds, 1)}
        set_entry(folder, "processor_seconds", {**by_role, role: updated})


@contextmanager
def track_time(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds of a `with` block to a stage in `run.json`, which sums over all runs."""
    started = time.monotonic()
    try:
        yield
    finally:
        stages = files.read_json(ExperimentPaths(folder).run_record)["stages"]
        seconds = stages.get(stage, 0) + time.monotonic() - started
        set_entry(folder, "stages", {**stages, stage: round(seconds, 1)})
