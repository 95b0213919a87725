"""Statistics against their definitions written out, and against scipy where it is installed."""

from fractions import Fraction
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from raykd.analysis.statistics import (
    holm,
    majority,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    pass_at_k,
    sign_flip,
    wilson_interval,
)


@pytest.fixture
def stats():
    return pytest.importorskip("scipy.stats", reason="scipy is the oracle of this test: pip install scipy")


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1319])
def test_wilson_interval_matches_scipy(stats, n: int, confidence: float) -> None:
    for correct in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_contains_proportion_and_reaches_bounds() -> None:
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0
    low, high = wilson_interval(6.5, 20)
    assert low < 6.5 / 20 < high


@pytest.mark.parametrize("only_a", [0, 1, 2, 5, 40, 171])
@pytest.mark.parametrize("only_b", [0, 1, 3, 5, 60, 903])
def test_mcnemar_matches_scipy_binomial_test(stats, only_a: int, only_b: int) -> None:
    n = only_a + only_b
    expected = stats.binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (9, 3), (8, 8), (250, 199)])
def test_mcnemar_matches_enumeration(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    likely = comb(n, only_a)
    expected = sum(Fraction(comb(n, k), 2**n) for k in range(n + 1) if comb(n, k) <= likely)
    assert mcnemar_exact(only_a, only_b) == pytest.approx(float(expected), rel=1e-12)


def test_mcnemar_with_many_pairs_does_not_overflow() -> None:
    assert mcnemar_exact(20_000, 20_000) == 1.0
    assert 0 <= mcnemar_exact(0, 3_000) < 1e-300


@pytest.mark.parametrize(("correct", "n"), [(1, 3), (404, 1319), (635, 1319), (1318, 1319)])
def test_wilson_bounds_solve_the_score_equation(correct: int, n: int) -> None:
    for bound in wilson_interval(correct, n):
        assert abs(correct / n - bound) / (bound * (1 - bound) / n) ** 0.5 == pytest.approx(1.959964, abs=1e-6)


def test_holm_matches_hand_calculation() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_bootstrap_matches_plain_resampling() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.random(200) < 0.6, rng.random(200) < 0.45
    difference, low, high = paired_bootstrap(a, b, num_resamples=40_000)

    drawn = rng.integers(0, 200, size=(40_000, 200))
    means = (a.astype(float) - b.astype(float))[drawn].mean(axis=1)
    assert difference == pytest.approx(a.mean() - b.mean())
    # A resampled mean, and so its quantile, is a multiple of 1/200.
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.0051)


def test_bootstrap_matches_every_possible_resample() -> None:
    a, b = [1, 0, 1, 1, 0], [0, 0, 0, 1, 1]
    every = [sum(draw) / 5 for draw in product([1, 0, 1, 0, -1], repeat=5)]
    for confidence in (0.5, 0.8, 0.9):
        _, low, high = paired_bootstrap(a, b, confidence, num_resamples=100_000)
        tail = (1 - confidence) / 2
        assert (low, high) == pytest.approx(tuple(np.quantile(every, [tail, 1 - tail])))


def test_bootstrap_of_real_values_matches_scipy(stats) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.4, 1, 60), rng.normal(0, 1, 60)
    expected = stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    _, low, high = paired_bootstrap(a, b, num_resamples=20_000, seed=5)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_is_seeded_and_exact_without_variance() -> None:
    a, b = [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 0]
    assert paired_bootstrap(a, b, seed=1) == paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap([1, 1, 1], [0, 0, 0]) == (1.0, 1.0, 1.0)
    assert paired_bootstrap([True], [True]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: wilson_interval(0, 0), "n=0"),
        (lambda: wilson_interval(3, 2), "got 3"),
        (lambda: wilson_interval(1, 2, confidence=95), "got 95"),
        (lambda: mcnemar_exact(-1, 2), "-1"),
        (lambda: paired_bootstrap([], []), "at least one problem"),
        (lambda: paired_bootstrap([1, 0], [1]), r"\(2,\) and \(1,\)"),
        (lambda: paired_bootstrap([1, float("nan")], [1, 0]), "finite"),
    ],
)
def test_invalid_arguments_are_refused(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 2, 4), (6, 6, 2), (4, 1, 4)])
def test_pass_at_k_matches_enumeration(n: int, correct: int, k: int) -> None:
    draws = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_invalid_counts(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["1", "2", "2"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None), ([], None)],
)
def test_majority_is_most_frequent_then_earliest_answer(answers: list, expected: str | None) -> None:
    assert majority(answers) == expected


def test_mean_interval_has_nominal_coverage() -> None:
    rng = np.random.default_rng(5)
    intervals = [mean_interval(sample) for sample in rng.exponential(2.0, size=(2000, 200))]
    assert 0.93 < np.mean([low < 2 < high for low, high in intervals]) < 0.965
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (3, 9), (12, 14), (30, 12)])
def test_sign_flip_of_single_pairs_matches_mcnemar(only_a: int, only_b: int) -> None:
    differences = [1.0] * only_a + [-1.0] * only_b + [0.0] * 20
    assert sign_flip(differences) == pytest.approx(mcnemar_exact(only_a, only_b), abs=0.015)


def test_sign_flip_matches_enumeration() -> None:
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.5, -0.5, 0.25, 1.0, 0.0, 0.5])
    sums = [abs(np.dot(signs, differences)) for signs in product([1, -1], repeat=len(differences))]
    exact = np.mean([each >= abs(differences.sum()) - 1e-9 for each in sums])
    assert sign_flip(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip(-differences) == sign_flip(differences)
