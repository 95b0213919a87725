"""Soft targets as arrays, and the order of training."""

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
def test_misaligned_targets_raise(field: str):
    broken = completion()
    broken[field] = broken[field][:-1]
    with pytest.raises(ValueError, match="completion c1"):
        examples.soft_targets(broken, 2, 100)


def test_top_k_is_cut_to_k_and_fewer_raise():
    ids, logprobs = examples.soft_targets(completion(k=2), 1, 100)
    assert ids.tolist() == [[7]] * 3
    assert logprobs.shape == (3, 1)
    with pytest.raises(ValueError, match="completion c1"):
        examples.soft_targets(completion(k=1), 2, 100)


def test_token_id_beyond_vocabulary_raises():
    best = max(max(row) for row in completion()["topk_ids"])
    examples.soft_targets(completion(), 2, best + 1)
    with pytest.raises(ValueError, match=rf"completion c1: .* token {best}, but the tokenizer has {best} tokens;"):
        examples.soft_targets(completion(), 2, best)


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
