"""The order of training: which rows each optimizer step, round and worker sees."""

from collections.abc import Iterator, Sequence

import numpy as np


def training_order(num_rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
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


def steps_of_round(num_steps: int, number: int, rounds: int) -> range:
    """The optimizer steps of one of so many rounds, which share them out as evenly as can be.

    Args:
        num_steps: steps of the whole training.
        number: the round, from 0.
        rounds: how many there are.
    """
    return range(number * num_steps // rounds, (number + 1) * num_steps // rounds)


def shard_micro_batches(
    rows: Sequence[int], worker: int, num_workers: int, micro_batch_size: int, number: int
) -> list[list[int]]:
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
