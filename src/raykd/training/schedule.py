"""The order of training: the rows of each optimizer step, round and worker."""

from collections.abc import Iterator, Sequence

import numpy as np


def training_order(num_rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the epoch and the row numbers of every optimizer step.

    The order depends on the arguments only, so that any number of workers, and a resumed run, use the same rows in the
    same steps. The last step of an epoch may be short.

    Args:
        num_rows: number of training rows.
        batch_size: rows of an optimizer step.
        epochs: number of passes over the rows, each in another order.
        seed: of the order.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        for start in range(0, num_rows, batch_size):
            yield epoch, order[start : start + batch_size]


def steps_of_round(num_steps: int, number: int, rounds: int) -> range:
    """Return the optimizer steps of one round; rounds differ by at most one step.

    Args:
        num_steps: steps of the whole training.
        number: the round, from 0.
        rounds: number of rounds.
    """
    return range(number * num_steps // rounds, (number + 1) * num_steps // rounds)


def shard_micro_batches(
    rows: Sequence[int], worker: int, num_workers: int, micro_batch_size: int, num_micro_batches: int
) -> list[list[int]]:
    """Return one worker's micro-batches of an optimizer step.

    Their number is the same for every worker and step, including short steps; some may be empty.

    Args:
        rows: the row numbers of the step.
        worker: this worker's rank.
        num_workers: number of workers.
        micro_batch_size: maximum number of rows of a forward pass.
        num_micro_batches: micro-batches of a worker; with `num_workers` and `micro_batch_size` enough for a full step.
    """
    own_rows = list(rows[worker::num_workers])
    starts = range(0, num_micro_batches * micro_batch_size, micro_batch_size)
    return [own_rows[start : start + micro_batch_size] for start in starts]
