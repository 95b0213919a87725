"""Schedule of training: the order of rows, their distribution over workers, and the steps of rounds."""

import math

from hypothesis import given
from hypothesis import strategies as st

from raykd.training import schedule


def test_each_epoch_uses_every_row_once_in_another_order():
    steps = list(schedule.training_order(num_rows=10, batch_size=4, epochs=2, seed=3))
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    first, second = ([row for epoch, batch in steps for row in batch if epoch == e] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert steps == list(schedule.training_order(10, 4, 2, 3))
    assert steps != list(schedule.training_order(10, 4, 2, 4))


@given(
    rows=st.integers(0, 40),
    workers=st.integers(1, 5),
    rows_per_worker=st.integers(1, 12),
    micro=st.integers(1, 12),
)
def test_workers_share_rows_of_a_step_in_equal_micro_batches(rows: int, workers: int, rows_per_worker: int, micro: int):
    num_micro_batches = math.ceil(rows_per_worker / micro)
    batch = list(range(min(rows, workers * rows_per_worker)))
    shares = [
        schedule.shard_micro_batches(batch, worker, workers, micro, num_micro_batches) for worker in range(workers)
    ]
    assert sorted(row for share in shares for part in share for row in part) == batch
    assert {len(share) for share in shares} == {num_micro_batches}
    assert all(len(part) <= micro for share in shares for part in share)


@given(steps=st.integers(0, 200), rounds=st.integers(1, 12))
def test_rounds_divide_the_steps_evenly_in_order(steps: int, rounds: int):
    rounds_steps = [schedule.steps_of_round(steps, number, rounds) for number in range(rounds)]
    assert [step for round_steps in rounds_steps for step in round_steps] == list(range(steps))
    assert max(map(len, rounds_steps)) - min(map(len, rounds_steps)) <= 1
