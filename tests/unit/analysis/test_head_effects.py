"""Head effects: compared with loops, numpy and scipy; the family-wise error of the corrected p."""

from itertools import permutations

import numpy as np
import pytest

from raykd.analysis.head_effects import FEWEST_PROBLEMS, across_arms, correlation, difference


def test_difference_is_mean_over_problems_with_bootstrap_interval():
    rng = np.random.default_rng(1)
    values, others = rng.normal(1, 1, (80, 3)), rng.normal(0, 1, (80, 3))
    found = difference(values, others)
    paired = values - others
    assert found.value == pytest.approx(paired.mean(0), abs=1e-12)
    draw = np.random.default_rng(99)
    drawn = np.array([paired[draw.integers(0, 80, 80)].mean(0) for _ in range(20_000)])
    for head in range(3):
        assert found.low[head] == pytest.approx(np.quantile(drawn[:, head], 0.025), abs=0.03)
        assert found.high[head] == pytest.approx(np.quantile(drawn[:, head], 0.975), abs=0.03)


def test_undefined_values_are_excluded_by_head():
    rng = np.random.default_rng(2)
    values, others = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    values[:20, 1] = np.nan
    others[30:, 2] = np.nan
    values[:, 3] = np.nan
    found = difference(values, others)
    for head, kept in ((0, slice(None)), (1, slice(20, None)), (2, slice(0, 30))):
        assert found.value[head] == pytest.approx((values[kept, head] - others[kept, head]).mean(), abs=1e-12)
        assert found.low[head] < found.value[head] < found.high[head]
    assert np.isnan([found.value[3], found.low[3], found.high[3], found.p[3]]).all()


# Seconds each. `make test` runs the case in which the plain bootstrap fails most.
@pytest.mark.parametrize(
    ("problems", "kind"),
    [
        (30, "skewed"),
        *(
            pytest.param(problems, kind, marks=pytest.mark.slow)
            for problems in (FEWEST_PROBLEMS, 30, 100)
            for kind in ("independent", "together", "skewed")
            if (problems, kind) != (30, "skewed")
        ),
    ],
)
def test_difference_controls_family_wise_error(problems: int, kind: str):
    rng = np.random.default_rng(3)
    significant = []
    for number in range(60):
        arm, base = rng.normal(size=(2, problems, 200))
        if kind == "together":
            arm += 2 * rng.normal(size=(problems, 1))
        if kind == "skewed":
            # Attention weights have long tails, which are equal for students without a difference.
            arm, base = rng.lognormal(sigma=1.5, size=(2, problems, 200))
        significant.append(difference(arm, base, seed=number).is_significant.any())
    # 3 of 60 are expected at 5 %; 9 or more have a probability of 1 in 500.
    assert sum(significant) < 9, sum(significant)


# Seconds each. `make test` runs one of the four cases.
@pytest.mark.parametrize("num_right", [5, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 20, 50))])
def test_correlation_controls_family_wise_error(num_right: int):
    rng = np.random.default_rng(4)
    significant = []
    for number in range(60):
        right = np.zeros(100)
        right[rng.permutation(100)[:num_right]] = 1
        # Problems that one student solves are easier for the other one, too.
        other = np.where(rng.random(100) < 0.8, right, rng.random(100) < 0.1).astype(float)
        values = [rng.normal(size=(100, 100)) for _ in range(2)]
        significant.append(correlation(values, [right, other], seed=number).is_significant.any())
    assert sum(significant) < 9, sum(significant)


def test_across_arms_controls_family_wise_error():
    rng = np.random.default_rng(5)
    significant = [
        across_arms(rng.normal(size=(7, 100)), rng.random(7), seed=n).is_significant.any() for n in range(60)
    ]
    assert sum(significant) < 9, sum(significant)


def test_difference_finds_one_head_among_many():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(100, 64))
    noise[:, 17] += 1.0
    found = difference(noise, np.zeros_like(noise))
    assert found.is_significant[17]
    assert found.p[17] == pytest.approx(1 / 2001)
    assert found.is_significant.sum() <= 2


def test_constant_head_is_not_significant():
    found = difference(np.full((30, 2), 0.25), np.full((30, 2), 0.25))
    assert (found.value == 0).all() and (found.p == 1).all()


def test_head_with_constant_difference_is_significant():
    found = difference(np.tile([0.75, 0.25], (30, 1)), np.full((30, 2), 0.25))
    assert found.is_significant.tolist() == [True, False]


def test_few_problems_have_no_interval_and_no_p():
    found = difference(np.ones((FEWEST_PROBLEMS - 1, 2)), np.zeros((FEWEST_PROBLEMS - 1, 2)))
    assert (found.value == 1).all() and np.isnan(found.p).all() and not found.is_significant.any()


def test_correlation_is_variance_weighted_mean_of_students():
    rng = np.random.default_rng(5)
    values = [rng.normal(size=(40, 3)) + 10 * student for student in range(3)]
    right = [(rng.random(40) < 0.1 + 0.2 * student).astype(float) for student in range(3)]
    values[2][:, 1] += right[2]
    found = correlation(values, right)
    for head in range(3):
        own = [np.corrcoef(x[:, head], y)[0, 1] for x, y in zip(values, right, strict=True)]
        assert found.value[head] == pytest.approx(np.average(own, weights=[y.var() for y in right]), abs=1e-9)
    alone = correlation(values[:1], right[:1])
    assert alone.value == pytest.approx([np.corrcoef(x, right[0])[0, 1] for x in values[0].T], abs=1e-9)


def test_correlation_excludes_undefined_and_constant_values():
    rng = np.random.default_rng(6)
    values, right = rng.normal(size=(60, 3)), (rng.random(60) < 0.5).astype(float)
    values[:25, 1] = np.nan
    values[:, 2] = 0.125
    right[50:] = np.nan
    # A student without a correct answer is excluded.
    found = correlation([values, rng.normal(size=(60, 3))], [right, np.zeros(60)])
    for head, kept in ((0, slice(0, 50)), (1, slice(25, 50))):
        assert found.value[head] == pytest.approx(np.corrcoef(values[kept, head], right[kept])[0, 1], abs=1e-9)
        assert found.low[head] < found.value[head] < found.high[head]
    assert np.isnan(found.value[2]) and np.isnan(found.p[2])


def test_correlation_finds_one_head_among_many():
    rng = np.random.default_rng(7)
    values = [rng.normal(size=(100, 50)) for _ in range(2)]
    right = [(each[:, 8] + 0.7 * rng.normal(size=100) > 0).astype(float) for each in values]
    found = correlation(values, right)
    assert found.is_significant[8] and found.low[8] > 0.4
    assert found.is_significant.sum() <= 2


def test_across_arms_matches_scipy_and_exact_permutations():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle of this test: pip install scipy")
    rng = np.random.default_rng(8)
    values, accuracy = rng.normal(size=(6, 2)), rng.random(6)
    accuracy += 0.5 * values[:, 0]
    found = across_arms(values, accuracy)
    for head in range(2):
        expected = stats.pearsonr(values[:, head], accuracy)
        bounds = expected.confidence_interval(0.95)
        assert found.value[head] == pytest.approx(expected.statistic, abs=1e-9)
        assert (found.low[head], found.high[head]) == pytest.approx((bounds.low, bounds.high), abs=1e-6)
    # For each of the 720 orders, the larger correlation of the two heads.
    largest = [
        max(abs(np.corrcoef(values[:, head], accuracy[list(order)])[0, 1]) for head in range(2))
        for order in permutations(range(6))
    ]
    for head in range(2):
        exact = np.mean(np.array(largest) >= abs(found.value[head]) - 1e-9)
        assert found.p[head] == pytest.approx(exact, abs=0.04)


def test_few_arms_have_no_interval_and_no_p():
    found = across_arms(np.array([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0], [4.0, 2.0]]), np.array([0.1, 0.2, 0.4, 0.5]))
    assert found.value[0] > 0.9 and np.isnan(found.value[1])
    assert np.isnan(found.p).all() and np.isnan(found.low).all()
