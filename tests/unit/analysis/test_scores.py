"""Scores: proportions and means over seeds and samples, compared with counts by hand."""

import pytest

from raykd.analysis.scores import Proportion, compute_scores
from raykd.analysis.statistics import wilson_interval
from synthetic import prediction


def answer(number: int, extracted: str | None, seed: int = 0, sample: int = 0, **more) -> dict:
    """Return a prediction for the problem whose answer is `number`."""
    is_right = extracted == str(number)
    row = prediction("none", seed, number, is_right, is_right, extracted is not None)
    return row | {"sample_index": sample, "answer_strict": extracted, "answer_flexible": extracted or "7"} | more


def test_no_rows_have_no_scores():
    found = compute_scores([])
    assert (found.n, found.errors, found.num_problems) == (0, 0, 0)
    assert found.strict == found.majority_strict == Proportion()
    assert found.tokens.value is None


def test_majority_and_pass_at_k_are_per_problem_and_seed():
    rows = [
        *(answer(1, extracted, sample=n) for n, extracted in enumerate(["1", "1", "2", None])),
        *(answer(2, extracted, sample=n) for n, extracted in enumerate(["3", "2", "3", "2"])),
        *(answer(3, extracted, sample=n) for n, extracted in enumerate([None, None, "3", None])),
        *(answer(4, extracted, sample=n) for n, extracted in enumerate(["5", "5", "6", "4"])),
        # Answers of another seed do not vote for this one.
        *(answer(1, extracted, seed=1, sample=n) for n, extracted in enumerate(["9", "9", "9", "1"])),
    ]
    found = compute_scores(rows)
    assert (found.num_samples, found.n, found.num_problems) == (4, 20, 4)
    assert found.strict.value == pytest.approx((2 + 2 + 1 + 1 + 1) / 20)
    # The majority is correct for problems 1 and 3. With equal votes, as for problem 2, the earlier answer counts.
    assert found.majority_strict.value == pytest.approx(2 / 5)
    # All five have a correct answer among four. The shares of pairs with one are 5/6, 5/6, 3/6, 3/6 and 3/6.
    assert list(found.pass_strict) == [2, 4]
    assert found.pass_strict[4].value == 1
    assert found.pass_strict[2].value == pytest.approx((5 / 6 + 5 / 6 + 3 / 6 + 3 / 6 + 3 / 6) / 5)
    assert (found.majority_strict.low, found.majority_strict.high) == pytest.approx(wilson_interval(4 * 2 / 5, 4))
    # Flexible extract finds 7 in answers without the format.
    assert found.majority_flexible.value == pytest.approx(1 / 5)


def test_failed_rows_count_as_errors_only():
    rows = [
        answer(1, "1", num_tokens=10),
        answer(1, "2", sample=1, num_tokens=1000, error="timed out"),
        answer(2, "3", num_tokens=30, finish_reason="length", completion="a b c d a b c d a b c d"),
    ]
    found = compute_scores(rows)
    assert (found.n, found.errors, found.num_samples) == (2, 1, 1)
    assert found.tokens.value == 20
    assert found.truncated.value == 0.5
    # Four of nine sequences of four words are different.
    assert found.repetition.value == pytest.approx((0 + 5 / 9) / 2)


def test_accuracy_given_format_counts_formatted_answers_only():
    found = compute_scores([answer(1, "1"), answer(2, None), answer(3, "4"), answer(4, "4", seed=1)])
    assert found.format_rate.value == pytest.approx(3 / 4)
    assert found.accuracy_given_format.value == pytest.approx(2 / 3)
    assert (found.accuracy_given_format.low, found.accuracy_given_format.high) == pytest.approx(wilson_interval(2, 3))


def test_mean_interval_is_over_problems():
    once = [answer(n, str(n), num_tokens=10 * n) for n in range(1, 9)]
    again = [answer(n, str(n), seed=1, num_tokens=10 * n) for n in range(1, 9)]
    # Answers of another seed do not add problems.
    assert compute_scores([*once, *again]).tokens == compute_scores(once).tokens
    low, high = compute_scores(once).tokens.low, compute_scores(once).tokens.high
    assert low == pytest.approx(45 - 1.959963984540054 * (600**0.5) / 8**0.5)
    assert high == pytest.approx(45 + 1.959963984540054 * (600**0.5) / 8**0.5)
