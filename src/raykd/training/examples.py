"""Training examples: select completions and align targets with tokens.

T completion tokens, K top-k.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raykd.config.experiment import Arm
from raykd.config.sections import Targets
from raykd.data import prompts
from raykd.errors import UserError
from raykd.models import tokenization
from raykd.storage import files, row_store, schemas
from raykd.storage.paths import split_file

Row = Mapping[str, Any]


def select_completions(completions: Sequence[Row], targets: Targets) -> tuple[list[Row], Counter[str]]:
    """Picks among the completions of one problem.

    Args:
        completions: rows of `schemas.COMPLETION`, in the order of their samples.
        targets: what is kept.

    Returns:
        The rows to train on, in the same order, and how many were dropped for which reason: `error`, `empty`,
        `duplicate`, `incorrect`, `not_best`.
    """
    dropped: Counter[str] = Counter()
    kept: list[Row] = []
    seen: set[tuple[int, ...] | str] = set()
    for row in completions:
        words = _content(row)
        reason = ""
        if row["error"]:
            reason = "error"
        elif not words:
            reason = "empty"
        elif targets.deduplicate and words in seen:
            reason = "duplicate"
        elif targets.filter == "correct" and not row["is_correct"]:
            reason = "incorrect"
        seen.add(words)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    if targets.filter == "best" and len(kept) > 1:
        dropped["not_best"] += len(kept) - 1
        kept = [min(kept, key=_preference)]
    return kept, dropped


def _preference(row: Row) -> tuple[bool, bool, int]:
    return not row["is_correct"], row["finish_reason"] != "stop", len(_content(row))


def _content(row: Row) -> tuple[int, ...] | str:
    """What a completion says: its tokens, or the text where that is all that the teacher gave."""
    return tuple(row["completion_token_ids"]) or row["completion"]


@dataclass(frozen=True)
class Example:
    """One row to train on. Target t belongs to the student's logit that predicts completion token t."""

    problem_id: str
    prompt_token_ids: list[int]
    """The student's prompt, which never holds a prime."""
    completion_token_ids: list[int]
    topk_ids_TK: np.ndarray | None = None
    """int64; None where the targets are the tokens themselves."""
    topk_logprobs_TK: np.ndarray | None = None
    """float32, the teacher's log-probabilities at temperature 1."""

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


def soft_targets(completion: Mapping[str, Any], top_k: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's top-k of one completion as arrays.

    Args:
        completion: a row of `schemas.COMPLETION`, with K log-probabilities for each token or more.
        top_k: K.
        vocabulary: how many tokens there are.

    Returns:
        ids (T, K) int64 and log-probabilities (T, K) float32.

    Raises:
        UserError: where tokens, ids and log-probabilities are not aligned, or an id is none of the tokens'.
    """
    tokens = completion["completion_token_ids"]
    ids, logprobs = completion["topk_ids"], completion["topk_logprobs"]
    lengths = {len(tokens), len(ids), len(logprobs)}
    if len(lengths) > 1 or any(len(row) < top_k for row in [*ids, *logprobs]):
        raise UserError(
            f"completion {completion['completion_id']}: {len(tokens)} tokens, {len(ids)} and {len(logprobs)} rows "
            f"of targets, which should be as many, of {top_k} or more each; delete its folder, and it is asked again"
        )
    shape = (len(tokens), top_k)
    ids_TK = np.asarray([row[:top_k] for row in ids], dtype=np.int64).reshape(shape)
    # A teacher may have more outputs than there are tokens, for padding, and a student fewer of those.
    if ids_TK.size and ids_TK.max() >= vocabulary:
        raise UserError(
            f"completion {completion['completion_id']}: among the teacher's {top_k} best is token {ids_TK.max()}, and "
            f"the tokenizer has {vocabulary}; lower targets.top_k, or set targets.kind=hard"
        )
    return (
        ids_TK,
        np.asarray([row[:top_k] for row in logprobs], dtype=np.float32).reshape(shape),
    )


_TOPK_COLUMNS = ("topk_ids", "topk_logprobs")


def build_examples(
    arm: Arm,
    problems: Path,
    completions: Path | None,
    tokenizer: Any,
    same_as_teacher: bool,
    wanted: frozenset[str] | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """The rows that an arm trains on, in the order of the problems and their samples, and what was dropped and why.

    Args:
        arm: the arm.
        problems: the folder of the splits; only `train` is read.
        completions: the folder of the completions; None where targets are the reference solutions.
        tokenizer: the student's.
        same_as_teacher: whether the teacher's token ids are the student's.
        wanted: ids of the problems whose rows are wanted; None for all.
    """
    dropped: Counter[str] = Counter()
    by_problem = _completions_by_problem(arm, completions) if completions else {}
    targets = []
    for problem in files.read_table(split_file(problems, "train")).to_pylist():
        if wanted is not None and problem["problem_id"] not in wanted:
            continue
        if completions is None:
            found = [reference_example(problem, tokenizer, arm.prompt.instruction)]
        else:
            prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problem, arm.prompt.instruction))
            kept, reasons = select_completions(by_problem.get(problem["problem_id"], []), arm.targets)
            dropped += reasons
            found = [_completion_example(arm, prompt, row, tokenizer, same_as_teacher) for row in kept]
        fitting = [target for target in found if len(target) <= arm.train.max_length]
        dropped["too_long"] += len(found) - len(fitting)
        targets += fitting
    return targets, {reason: count for reason, count in dropped.items() if count}


def reference_example(problem: Mapping[str, Any], tokenizer: Any, instruction: str) -> Example:
    """The tokens of a problem's reference solution as targets.

    Args:
        problem: a row of `schemas.PROBLEM`.
        tokenizer: the student's.
        instruction: what is said about the form of the answer.
    """
    prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problem, instruction))
    tokens = tokenization.answer_token_ids(tokenizer, problem["reference_solution"], is_whole=True)
    return Example(problem["problem_id"], prompt, tokens)


def _completions_by_problem(arm: Arm, completions: Path) -> dict[str, list[dict[str, Any]]]:
    columns = ["problem_id", "completion_id", "sample_index", "completion", "completion_token_ids", "finish_reason"]
    columns += ["is_correct", "error"]
    soft = _TOPK_COLUMNS if arm.targets.kind == "top_k" else ()
    found: dict[str, list[dict[str, Any]]] = {}
    for part in row_store.stream_rows(completions, schemas.COMPLETION, [*columns, *soft]):
        # As Python's objects log-probabilities take ten times the room; only those of chosen rows become some.
        arrays = {name: part[name].combine_chunks() for name in soft}
        for number, row in enumerate(part.select(columns).to_pylist()):
            row |= {name: array[number].values for name, array in arrays.items()}
            found.setdefault(row["problem_id"], []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row["sample_index"])
    return found


def _completion_example(
    arm: Arm, prompt: list[int], completion: Mapping[str, Any], tokenizer: Any, same: bool
) -> Example:
    problem_id, tokens = completion["problem_id"], completion["completion_token_ids"]
    if arm.targets.kind == "top_k":
        whole = {**completion, **{name: completion[name].to_pylist() for name in _TOPK_COLUMNS}}
        return Example(problem_id, prompt, tokens, *soft_targets(whole, arm.targets.top_k, len(tokenizer)))
    if not same:
        is_whole = completion["finish_reason"] == "stop"
        tokens = tokenization.answer_token_ids(tokenizer, completion["completion"], is_whole)
    return Example(problem_id, prompt, tokens)
