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
from raykd.config.training import Targets
from raykd.data import prompts
from raykd.errors import UserError
from raykd.models import tokenization
from raykd.storage import files, row_store, schemas
from raykd.storage.paths import split_file

Row = Mapping[str, Any]


def select_completions(completions: Sequence[Row], targets: Targets) -> tuple[list[Row], Counter[str]]:
    """Select the completions of one problem to train on.

    Args:
        completions: rows of `schemas.COMPLETION`, in the order of their samples.
        targets: the section `targets`, for `filter` and `deduplicate`.

    Returns:
        The selected rows, in the same order, and the number of dropped rows by reason: `error`, `empty`, `duplicate`,
        `incorrect` or `not_best`.
    """
    dropped: Counter[str] = Counter()
    kept: list[Row] = []
    seen: set[tuple[int, ...] | str] = set()
    for row in completions:
        content = _content(row)
        reason = ""
        if row["error"]:
            reason = "error"
        elif not content:
            reason = "empty"
        elif targets.deduplicate and content in seen:
            reason = "duplicate"
        elif targets.filter == "correct" and not row["is_correct"]:
            reason = "incorrect"
        seen.add(content)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    if targets.filter == "best" and len(kept) > 1:
        dropped["not_best"] += len(kept) - 1
        kept = [min(kept, key=_preference)]
    return kept, dropped


def _preference(row: Row) -> tuple[bool, bool, int]:
    """Return the sort key of `targets.filter: best`: correct, then not truncated, then shortest."""
    return not row["is_correct"], row["finish_reason"] != "stop", len(_content(row))


def _content(row: Row) -> tuple[int, ...] | str:
    """Return the token ids of a completion; its text if the teacher's endpoint returned no token ids."""
    return tuple(row["completion_token_ids"]) or row["completion"]


@dataclass(frozen=True)
class Example:
    """One example. Target t belongs to the student's logit that predicts completion token t."""

    problem_id: str
    prompt_token_ids: list[int]
    """The student's prompt, which has no prime."""
    completion_token_ids: list[int]
    topk_ids_TK: np.ndarray | None = None
    """int64; None for hard targets."""
    topk_logprobs_TK: np.ndarray | None = None
    """float32, the teacher's log-probabilities at temperature 1; None for hard targets."""

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


def soft_targets(completion: Mapping[str, Any], top_k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's top-k of one completion as arrays.

    Args:
        completion: a row of `schemas.COMPLETION`, with at least K log-probabilities for each token.
        top_k: K.
        vocab_size: number of tokens of the tokenizer.

    Returns:
        Token ids (T, K) int64 and log-probabilities (T, K) float32.

    Raises:
        UserError: tokens, ids and log-probabilities are not aligned, or an id exceeds the vocabulary.
    """
    tokens = completion["completion_token_ids"]
    ids, logprobs = completion["topk_ids"], completion["topk_logprobs"]
    lengths = {len(tokens), len(ids), len(logprobs)}
    if len(lengths) > 1 or any(len(row) < top_k for row in [*ids, *logprobs]):
        raise UserError(
            f"completion {completion['completion_id']}: {len(tokens)} tokens, but {len(ids)} rows of top-k ids and "
            f"{len(logprobs)} of log-probabilities, which must be as many, with {top_k} or more each; delete its "
            "folder to generate it again"
        )
    shape = (len(tokens), top_k)
    ids_TK = np.asarray([row[:top_k] for row in ids], dtype=np.int64).reshape(shape)
    # A teacher's output layer may be padded beyond the tokenizer's vocabulary, and a student's less so.
    if ids_TK.size and ids_TK.max() >= vocab_size:
        raise UserError(
            f"completion {completion['completion_id']}: the teacher's top {top_k} include token {ids_TK.max()}, but "
            f"the tokenizer has {vocab_size} tokens; lower targets.top_k, or set targets.kind=hard"
        )
    logprobs_TK = np.asarray([row[:top_k] for row in logprobs], dtype=np.float32).reshape(shape)
    return ids_TK, logprobs_TK


_TOPK_COLUMNS = ("topk_ids", "topk_logprobs")


def build_examples(
    arm: Arm,
    problems: Path,
    completions: Path | None,
    tokenizer: Any,
    same_tokens: bool,
    problem_ids: frozenset[str] | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Build the examples of an arm, ordered by problem and sample.

    Args:
        arm: the arm.
        problems: the folder of the splits; the `train` split is read.
        completions: the folder of the completions; None for reference solutions as hard targets.
        tokenizer: the student's.
        same_tokens: whether teacher and student have the same tokenizer.
        problem_ids: ids of the problems to use; None for all.

    Returns:
        The examples, and the number of dropped completions by reason.
    """
    dropped: Counter[str] = Counter()
    by_problem = _completions_by_problem(arm, completions) if completions else {}
    kept_examples = []
    for problem in files.read_table(split_file(problems, "train")).to_pylist():
        if problem_ids is not None and problem["problem_id"] not in problem_ids:
            continue
        if completions is None:
            examples = [reference_example(problem, tokenizer, arm.prompt.instruction)]
        else:
            prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problem, arm.prompt.instruction))
            selected, reasons = select_completions(by_problem.get(problem["problem_id"], []), arm.targets)
            dropped += reasons
            examples = [_completion_example(arm, prompt, row, tokenizer, same_tokens) for row in selected]
        fitting = [example for example in examples if len(example) <= arm.train.max_length]
        dropped["too_long"] += len(examples) - len(fitting)
        kept_examples += fitting
    return kept_examples, {reason: count for reason, count in dropped.items() if count}


def reference_example(problem: Mapping[str, Any], tokenizer: Any, instruction: str) -> Example:
    """Return an example with a problem's reference solution as hard targets.

    Args:
        problem: a row of `schemas.PROBLEM`.
        tokenizer: the student's.
        instruction: the sentence about the answer's form.
    """
    prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problem, instruction))
    tokens = tokenization.answer_token_ids(tokenizer, problem["reference_solution"], is_whole=True)
    return Example(problem["problem_id"], prompt, tokens)


def _completions_by_problem(arm: Arm, completions: Path) -> dict[str, list[dict[str, Any]]]:
    columns = ["problem_id", "completion_id", "sample_index", "completion", "completion_token_ids", "finish_reason"]
    columns += ["is_correct", "error"]
    topk_columns = _TOPK_COLUMNS if arm.targets.kind == "top_k" else ()
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for part in row_store.stream_rows(completions, schemas.COMPLETION, [*columns, *topk_columns]):
        # Kept as Arrow arrays until a row is selected: Python objects take ten times the memory.
        arrays = {name: part[name].combine_chunks() for name in topk_columns}
        for number, row in enumerate(part.select(columns).to_pylist()):
            row |= {name: array[number].values for name, array in arrays.items()}
            by_problem.setdefault(row["problem_id"], []).append(row)
    for rows in by_problem.values():
        rows.sort(key=lambda row: row["sample_index"])
    return by_problem


def _completion_example(
    arm: Arm, prompt: list[int], completion: Mapping[str, Any], tokenizer: Any, same_tokens: bool
) -> Example:
    problem_id, tokens = completion["problem_id"], completion["completion_token_ids"]
    if arm.targets.kind == "top_k":
        converted = {**completion, **{name: completion[name].to_pylist() for name in _TOPK_COLUMNS}}
        ids_TK, logprobs_TK = soft_targets(converted, arm.targets.top_k, len(tokenizer))
        return Example(problem_id, prompt, tokens, topk_ids_TK=ids_TK, topk_logprobs_TK=logprobs_TK)
    if not same_tokens:
        is_whole = completion["finish_reason"] == "stop"
        tokens = tokenization.answer_token_ids(tokenizer, completion["completion"], is_whole)
    return Example(problem_id, prompt, tokens)
