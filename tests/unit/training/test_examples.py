"""Training examples: selection of completions, counts of the dropped ones, and soft targets as arrays."""

import numpy as np
import pytest

from raykd.config.training import Targets
from raykd.training import examples
from raykd.training.examples import select_completions


def row(tokens: list[int], correct: bool = True, finish: str = "stop", error: str = "", text: str = "") -> dict:
    content = {"completion_token_ids": tokens, "completion": text or "".join(map(chr, tokens))}
    return {**content, "is_correct": correct, "finish_reason": finish, "error": error}


ROWS = [
    row([1, 2, 3, 4], correct=True),
    row([1, 2], correct=False),
    row([], correct=False),
    row([1, 2, 3, 4], correct=True),
    row([9], correct=False, error="no answer"),
    row([5, 6, 7], correct=True),
    row([5], correct=True, finish="length"),
]


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({}, [0, 1, 3, 5, 6], {"empty": 1, "error": 1}),
        ({"deduplicate": True}, [0, 1, 5, 6], {"empty": 1, "error": 1, "duplicate": 1}),
        ({"filter": "correct"}, [0, 3, 5, 6], {"empty": 1, "error": 1, "incorrect": 1}),
        (
            {"filter": "correct", "deduplicate": True},
            [0, 5, 6],
            {"empty": 1, "error": 1, "incorrect": 1, "duplicate": 1},
        ),
        ({"filter": "best"}, [5], {"empty": 1, "error": 1, "not_best": 4}),
    ],
)
def test_selection_returns_rows_and_reasons_of_dropped_ones(settings: dict, kept: list[int], dropped: dict[str, int]):
    selected, reasons = select_completions(ROWS, Targets(**settings))
    assert [ROWS.index(each) if each is not ROWS[3] else 3 for each in selected] == kept
    assert dict(reasons) == dropped
    assert len(selected) + sum(reasons.values()) == len(ROWS), "a row is neither selected nor counted"


def test_best_of_incorrect_rows_is_the_shortest_untruncated():
    rows = [row([1], False, "length"), row([1, 2, 3], False), row([1, 2], False)]
    assert select_completions(rows, Targets(filter="best"))[0] == [rows[2]]


def test_rows_without_token_ids_are_compared_by_text():
    rows = [row([], text="It is 4."), row([], text="It is 4."), row([], text="4"), row([], text="")]
    selected, reasons = select_completions(rows, Targets(deduplicate=True))
    assert (selected, dict(reasons)) == ([rows[0], rows[2]], {"duplicate": 1, "empty": 1})
    assert select_completions(rows, Targets(filter="best"))[0] == [rows[2]]


def test_problem_without_completions_has_no_rows():
    assert select_completions([], Targets(filter="best")) == ([], {})


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
