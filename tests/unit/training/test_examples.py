"""Targets: aligned or refused, and an order of training that depends on nothing but rows, seed and size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykd.training import examples, schedule


def completion(tokens: int = 3, k: int = 2) -> dict:
    return {
        "completion_id": "c1",
        "completion_token_ids": list(range(tokens)),
        "topk_ids": [[7, 8][:k]] * tokens,
        "topk_logprobs": [[-0.1, -3.0][:k]] * tokens,
    }


def test_soft_targets_become_arrays():
    ids, logprobs = examples.soft_targets(completion(), 2, 100)
    assert ids.shape == logprobs.shape == (3, 2)
    assert (ids.dtype, logprobs.dtype) == (np.int64, np.float32)
    assert logprobs[1].tolist() == pytest.approx([-0.1, -3.0])


@pytest.mark.parametrize("field", ["completion_token_ids", "topk_ids", "topk_logprobs"])
def test_what_is_not_aligned_is_refused(field: str):
    broken = completion()
    broken[field] = broken[field][:-1]
    with pytest.raises(ValueError, match="completion c1"):
        examples.soft_targets(broken, 2, 100)


def test_of_more_than_k_the_k_best_are_taken_and_fewer_are_refused():
    ids, logprobs = examples.soft_targets(completion(k=2), 1, 100)
    assert ids.tolist() == [[7]] * 3
    assert logprobs.shape == (3, 1)
    with pytest.raises(ValueError, match="completion c1"):
        examples.soft_targets(completion(k=1), 2, 100)


def test_an_id_that_is_no_token_is_refused():
    best = max(max(row) for row in completion()["topk_ids"])
    examples.soft_targets(completion(), 2, best + 1)
    with pytest.raises(ValueError, match=rf"completion c1: .* token {best}, but the tokenizer has {best} tokens;"):
        examples.soft_targets(completion(), 2, best)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
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
def test_workers_share_a_step_without_loss_and_keep_pace(rows: int, workers: int, rows_per_worker: int, micro: int):
    number = math.ceil(rows_per_worker / micro)
    batch = list(range(min(rows, workers * rows_per_worker)))
    shares = [schedule.shard_micro_batches(batch, worker, workers, micro, number) for worker in range(workers)]
    assert sorted(row for share in shares for part in share for row in part) == batch
    assert {len(share) for share in shares} == {number}
    assert all(len(part) <= micro for share in shares for part in share)


@given(steps=st.integers(0, 200), rounds=st.integers(1, 12))
def test_rounds_share_out_the_steps_in_order_and_evenly(steps: int, rounds: int):
    segments = [schedule.steps_of_round(steps, number, rounds) for number in range(rounds)]
    assert [step for segment in segments for step in segment] == list(range(steps))
    assert max(map(len, segments)) - min(map(len, segments)) <= 1
