"""Targets: what the student is trained toward at each completion token, aligned token for token.

T completion tokens, K top-k.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykd.faults import UserError


@dataclass(frozen=True)
class Target:
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
        completion: a row of `records.COMPLETION`, with K log-probabilities for each token or more.
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


def batches(num_rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """The order of training: epoch and row numbers of every optimizer step.

    It depends on nothing but its arguments, so that any number of workers, and a run that resumes, see the same
    rows in the same steps. The last step of an epoch may be short.

    Yields:
        epoch, row numbers.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        for start in range(0, num_rows, batch_size):
            yield epoch, order[start : start + batch_size]


def segment(num_steps: int, number: int, rounds: int) -> range:
    """The optimizer steps of one of so many rounds, which share them out as evenly as can be.

    Args:
        num_steps: steps of the whole training.
        number: the round, from 0.
        rounds: how many there are.
    """
    return range(number * num_steps // rounds, (number + 1) * num_steps // rounds)


def share(rows: Sequence[int], worker: int, num_workers: int, micro_batch_size: int, number: int) -> list[list[int]]:
    """One worker's micro-batches of an optimizer step.

    Their number is the same for every worker and step, short steps included; some may be empty.

    Args:
        rows: the row numbers of the step.
        worker: this worker's rank.
        num_workers: how many there are.
        micro_batch_size: rows in a forward pass at most.
        number: how many micro-batches there are; with the workers and their size they hold a full step.
    """
    mine = list(rows[worker::num_workers])
    return [mine[start : start + micro_batch_size] for start in range(0, number * micro_batch_size, micro_batch_size)]
