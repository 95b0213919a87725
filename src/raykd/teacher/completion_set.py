"""Completion sets: the settings that determine a set of completions, and so its content key and its folder."""

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
    """The completions of one strategy: the settings that determine them, and their folder."""

    strategy_name: str
    strategy: Strategy
    folder: Path
    content: dict[str, Any]
    """All settings that determine the rows (`raykd.identity.completion_set`)."""

    @property
    def source(self) -> str:
        """Who writes the text: `teacher`, or `reference` (gold solutions) or `student` (rollouts), which are scored."""
        return self.content["source"]

    @property
    def is_scored(self) -> bool:
        """Whether the teacher scores text that exists already, instead of generating it."""
        return self.source != "teacher"

    @property
    def top_k(self) -> int:
        """Log-probabilities of each token; 0 for none."""
        return self.content["top_k"]

    @property
    def sampling(self) -> Sampling:
        """How the teacher samples, where it generates."""
        return Sampling(**self.content.get("sampling", {}))

    @property
    def num_samples(self) -> int:
        """Completions of each problem."""
        return self.content["num_samples"]


def completion_sets_for(
    experiment: Experiment, arms: Mapping[str, Arm], problems: Mapping[str, Any], root: Path, model: Mapping[str, Any]
) -> dict[str, CompletionSet | None]:
    """Return the completion set of each arm; None for an arm that needs no teacher.

    A student's rollouts do not exist yet when this is called: their completion set (`source` student) says how they
    will be scored, and each round has a folder of its own.

    No completion is generated twice. A set with more log-probabilities than an arm needs serves that arm too, whether
    an earlier run completed it or another arm is about to generate it.

    Args:
        experiment: the experiment.
        arms: the arms to train, by `config_id`.
        problems: the settings that determine the splits (`datasets.Splits.content`).
        root: the storage folder; rows are in `root/completions/<content key>`, shared by all experiments.
        model: the identity of the teacher's weights and tokenizer.
    """
    contents = {
        name: identity.completion_set(experiment, arm, problems, model)
        for name, arm in arms.items()
        if arm.needs_teacher
    }
    stored, needed = _by_completions(_stored_contents(root)), _by_completions(contents.values())
    completion_sets: dict[str, CompletionSet | None] = dict.fromkeys(arms)
    for name, content in contents.items():
        key = identity.same_completions(content)
        sufficient = [other for other in stored.get(key, []) if other["top_k"] >= content["top_k"]]
        chosen = min(sufficient, key=_top_k) if sufficient else max(needed[key], key=_top_k)
        strategy = arms[name].prompt.strategy
        folder = StoragePaths(root).completions / hashing.content_key(chosen)
        completion_sets[name] = CompletionSet(strategy, experiment.strategies[strategy], folder, chosen)
    return completion_sets


def _stored_contents(root: Path) -> list[dict[str, Any]]:
    """Return the settings of each complete set in the storage folder."""
    contents = []
    for manifest in filesystem.find_in_subdirs(StoragePaths(root).completions, row_store.MANIFEST):
        try:
            content = files.read_json(manifest).get("content")
        except UserError:
            # A damaged manifest concerns only the runs that read this set, and these report it.
            continue
        # The name of a set's folder is the key of its settings.
        if isinstance(content, dict) and hashing.content_key(content) == manifest.parent.name and "top_k" in content:
            contents.append(content)
    return contents


def _by_completions(contents: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group settings that give the same completions and differ in the number of log-probabilities at most."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for content in contents:
        groups.setdefault(identity.same_completions(content), []).append(content)
    return groups


def _top_k(content: Mapping[str, Any]) -> int:
    return content["top_k"]


def missing_sets(completion_sets: list[CompletionSet]) -> list[CompletionSet]:
    """Return the sets that are not complete yet."""
    return [each for each in completion_sets if row_store.read_manifest(each.folder) is None]


def completion_id(completion_set: CompletionSet, problem_id: str, sample_index: int) -> str:
    """Return the id of one completion: the same for the same prompt and sampling, in every experiment."""
    return hashing.content_key(
        {"key": completion_set.folder.name, "problem_id": problem_id, "sample_index": sample_index}
    )
