"""Completions: what determines a set of them, and so its key and its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd import records, storage
from raykd.config import Experiment, Prompt, Targets
from raykd.strategies import Strategy


@dataclass(frozen=True)
class Request:
    """The completions of one strategy: what determines them, and where they lie."""

    strategy_name: str
    strategy: Strategy
    folder: Path
    content: dict[str, Any]


def requests(experiment: Experiment, problems: Path, root: Path, model: Mapping[str, Any]) -> list[Request]:
    """The distinct sets of completions that an experiment's arms train on.

    Args:
        experiment: the experiment.
        problems: the folder of the splits.
        root: the storage folder; the rows lie in `root/completions/<content key>`, for every experiment
            that asks the same of the same teacher.
        model: what identifies the teacher's weights and tokenizer.
    """
    wanted: dict[str, Request] = {}
    for name in experiment.arms:
        arm = experiment.arm(name)
        if arm.targets.sequence != "teacher":
            continue
        request = _request(experiment, arm.prompt, arm.targets, problems, root, model)
        wanted[request.folder.name] = request
    return list(wanted.values())


def request_of(
    experiment: Experiment, arm: str, problems: Path, root: Path, model: Mapping[str, Any]
) -> Request | None:
    """The completions that one arm trains on; None where it trains on the reference solutions."""
    resolved = experiment.arm(arm)
    if resolved.targets.sequence != "teacher":
        return None
    return _request(experiment, resolved.prompt, resolved.targets, problems, root, model)


def _request(
    experiment: Experiment,
    prompt: Prompt,
    targets: Targets,
    problems: Path,
    root: Path,
    model: Mapping[str, Any],
) -> Request:
    strategy = experiment.strategies[prompt.strategy]
    sampling = experiment.teacher.sampling.model_dump()
    content = {
        "problems": problems.name,
        # Not the name: two names for the same words are the same question.
        "strategy": strategy.model_dump(),
        "instruction": prompt.instruction,
        "teacher": dict(model),
        "engine_kwargs": experiment.teacher.engine.arguments_of_answers,
        "sampling": sampling if sampling["temperature"] else {"max_tokens": sampling["max_tokens"]},
        "top_k": targets.top_k if targets.kind == "top_k" else 0,
        "schema": records.COMPLETION.names,
    }
    folder = root / "completions" / storage.content_key(content)
    return Request(prompt.strategy, strategy, folder, content)


def missing(wanted: list[Request]) -> list[Request]:
    """Those that are not complete yet."""
    return [request for request in wanted if storage.read_manifest(request.folder) is None]


def completion_id(request: Request, problem_id: str, sample_index: int = 0) -> str:
    """The name of one completion: the same for the same question, in every experiment."""
    return storage.content_key({"key": request.folder.name, "problem_id": problem_id, "sample_index": sample_index})
