"""Completions: what determines a set of them, and so its key and its folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd import identity
from raykd.config.engine import Sampling
from raykd.config.experiment import Arm, Experiment
from raykd.config.strategies import Strategy
from raykd.errors import UserError
from raykd.storage import files, filesystem, hashing, row_store
from raykd.storage.paths import StoragePaths


@dataclass(frozen=True)
class CompletionSet:
    """The completions of one strategy: what determines them, and where they lie."""

    strategy_name: str
    strategy: Strategy
    folder: Path
    content: dict[str, Any]

    @property
    def source(self) -> str:
        """`teacher`: it answers; `reference`: it scores the reference solutions; `student`: a student's answers."""
        return self.content["source"]

    @property
    def top_k(self) -> int:
        """How many log-probabilities each token has; 0 for none."""
        return self.content["top_k"]

    @property
    def sampling(self) -> Sampling:
        """How the teacher answers, where it does."""
        return Sampling(**self.content.get("sampling", {}))

    @property
    def num_samples(self) -> int:
        """Completions of each problem."""
        return self.content["num_samples"]


def completion_sets_for(
    experiment: Experiment, arms: Mapping[str, Arm], problems: Mapping[str, Any], root: Path, model: Mapping[str, Any]
) -> dict[str, CompletionSet | None]:
    """For each arm the completions that it is about; None where nothing is asked of the teacher.

    What a student writes is not known beforehand: its request (`source` student) tells how it will be scored, and
    each of its rounds has a folder of its own.

    The same question is not asked twice. A set with more log-probabilities than an arm needs serves it too, be it
    complete from an earlier run or about to be made for another arm.

    Args:
        experiment: the experiment.
        arms: what is trained on, by name.
        problems: what determines the splits (`problems.Splits.content`).
        root: the storage folder; the rows lie in `root/completions/<content key>`, for every experiment
            that asks the same of the same teacher.
        model: what identifies the teacher's weights and tokenizer.
    """
    contents = {
        name: identity.completion_set(experiment, arm, problems, model)
        for name, arm in arms.items()
        if arm.needs_teacher
    }
    stored, wanted = _by_question(_stored_contents(root)), _by_question(contents.values())
    found: dict[str, CompletionSet | None] = dict.fromkeys(arms)
    for name, content in contents.items():
        question = identity.same_completions(content)
        there = [each for each in stored.get(question, []) if each["top_k"] >= content["top_k"]]
        chosen = min(there, key=_top_k) if there else max(wanted[question], key=_top_k)
        strategy = arms[name].prompt.strategy
        folder = StoragePaths(root).completions / hashing.content_key(chosen)
        found[name] = CompletionSet(strategy, experiment.strategies[strategy], folder, chosen)
    return found


def _stored_contents(root: Path) -> list[dict[str, Any]]:
    """What determines each complete set that is there."""
    found = []
    for manifest in filesystem.find_in_subdirs(StoragePaths(root).completions, row_store.MANIFEST):
        try:
            found.append(files.read_json(manifest)["content"])
        except (UserError, KeyError):
            # Whoever needs these rows is told so; for the others they are not there.
            continue
    return found


def _by_question(contents: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for each in contents:
        found.setdefault(identity.same_completions(each), []).append(each)
    return found


def _top_k(content: Mapping[str, Any]) -> int:
    return content["top_k"]


def missing_sets(wanted: list[CompletionSet]) -> list[CompletionSet]:
    """Those that are not complete yet."""
    return [request for request in wanted if row_store.read_manifest(request.folder) is None]


def completion_id(request: CompletionSet, problem_id: str, sample_index: int) -> str:
    """The name of one completion: the same for the same question, in every experiment."""
    return hashing.content_key({"key": request.folder.name, "problem_id": problem_id, "sample_index": sample_index})
