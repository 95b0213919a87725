"""Statistics: confidence intervals, paired tests, and scores over several samples of a problem."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927), which is valid near 0 and 1 too.

    Args:
        correct: number of successes; a fraction where it is a mean over seeds.
        n: number of trials.
        confidence: the nominal coverage, between 0 and 1.

    Returns:
        The lower and upper bound, as fractions.

    Raises:
        ValueError: `n` is not positive, `correct` lies outside 0..n, or `confidence` outside 0..1.
    """
    if n <= 0:
        raise ValueError(f"a confidence interval needs at least one row, got n={n}")
    if not 0 <= correct <= n:
        raise ValueError(f"correct must lie between 0 and n={n}, got {correct}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = correct / n
    center = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is exactly 0 or 1: without this, rounding could put it on the wrong side of the proportion.
    low = 0.0 if correct == 0 else (center - half_width) / scale
    high = 1.0 if correct == n else (center + half_width) / scale
    return low, high


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the normal confidence interval of a mean.

    Args:
        values: one for each problem, at least two; the normal approximation suffices from a few dozen on.
        confidence: the nominal coverage, between 0 and 1.

    Raises:
        ValueError: there are fewer than two values, or `confidence` lies outside 0..1.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.size < 2:
        raise ValueError(f"the interval of a mean needs at least two values, got {values_P.size}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    mean, error = values_P.mean(), values_P.std(ddof=1) / math.sqrt(values_P.size)
    return float(mean - z * error), float(mean + z * error)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Only discordant pairs count. Under the null hypothesis either arm is the correct one with probability 1/2, so p is
    twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1. Without discordant pairs p is 1.

    Args:
        only_a: number of pairs in which only the first arm is correct.
        only_b: number of pairs in which only the second arm is correct.

    Raises:
        ValueError: a count is negative.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of pairs cannot be negative, got {only_a} and {only_b}")
    n = only_a + only_b
    # Integers: a float would underflow in the tail of a large sample.
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences: ArrayLike, num_draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip randomization test of paired differences.

    Under the null hypothesis the sign of each problem's difference is random. Where all differences are -1, 0 or 1,
    this is a Monte Carlo version of McNemar's test. A problem with several pairs has one difference, their mean, so
    its pairs are not treated as independent.

    Args:
        differences: one for each problem.
        num_draws: number of random sign assignments.
        seed: of the random signs.
    """
    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=np.float64)), return_counts=True)
    observed = abs(float(np.sum(differences)))
    rng = np.random.default_rng(seed)
    # The number of positive signs among differences of one size is binomial.
    drawn = np.abs((2 * rng.binomial(counts, 0.5, size=(num_draws, len(counts))) - counts) @ sizes)
    return float((1 + np.sum(drawn >= observed - 1e-9)) / (1 + num_draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's correction for multiple comparisons (Holm 1979), in the order given."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of a - b, with a percentile bootstrap confidence interval over problems.

    Args:
        a: one value for each problem: correct (1) or not (0), or the mean of that over seeds.
        b: the other arm's values, for the same problems in the same order.
        confidence: the nominal coverage, between 0 and 1.
        num_resamples: number of bootstrap resamples of the problems.
        seed: of the resamples; the same seed gives the same interval.

    Returns:
        The difference of the means, and the lower and upper bound, in the unit of the values.

    Raises:
        ValueError: there are no problems, the two differ in length, or a value is not finite.
    """
    a_P, b_P = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_P.ndim != 1 or a_P.shape != b_P.shape:
        raise ValueError(
            f"a paired difference needs one value a problem on each side, got shapes {a_P.shape} and {b_P.shape}"
        )
    if a_P.size == 0:
        raise ValueError("a paired difference needs at least one problem that both arms answered")
    difference_P = a_P - b_P
    if not np.isfinite(difference_P).all():
        raise ValueError("a paired difference needs finite values; leave out problems that one side did not answer")
    # Differences take few distinct values: a multinomial draw of their counts has the same distribution as drawing
    # n problems with replacement, and is much faster.
    values, counts = np.unique(difference_P, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(a_P.size, counts / a_P.size, size=num_resamples)
    means = draws @ values / a_P.size
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(difference_P.mean()), float(low), float(high)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return pass@k, the probability that one of k samples is correct: 1 - C(n - correct, k) / C(n, k).

    The estimate is unbiased, where 1 - (1 - c/n)^k is not (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    Samples without an answer are not counted. Of equally frequent answers the first one wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
