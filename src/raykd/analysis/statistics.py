"""Statistics: intervals of shares and means, two arms on the same problems, several samples of one problem."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927), sound near 0 and 1 where the normal one fails.

    Args:
        correct: how many of `n` are right; a mean over seeds may be a fraction.
        n: how many were counted.
        confidence: the nominal coverage, between 0 and 1.

    Returns:
        The lower and upper bound, as fractions.

    Raises:
        ValueError: `n` is not positive, `correct` lies outside 0..n, or `confidence` outside 0..1.
    """
    if n <= 0:
        raise ValueError(f"an interval needs at least one counted row, got n={n}")
    if not 0 <= correct <= n:
        raise ValueError(f"correct must lie between 0 and n={n}, got {correct}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = correct / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bound is exactly 0 or 1; rounding must not push it past the share itself.
    low = 0.0 if correct == 0 else (centre - half_width) / scale
    high = 1.0 if correct == n else (centre + half_width) / scale
    return low, high


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The normal interval of a mean: the mean, plus and minus so many of its standard errors.

    Args:
        values: one for each problem, at least two; for a few dozen and more the normal form is good enough.
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
    """The exact two-sided McNemar test: is the one arm right where the other is wrong more often than chance?

    Only discordant pairs bear on it: under the null hypothesis each is a fair coin, so p is twice the smaller
    tail of Binomial(only_a + only_b, 1/2), at most 1. Without discordant pairs p is 1.

    Args:
        only_a: pairs that only the first arm has right.
        only_b: pairs that only the second arm has right.

    Raises:
        ValueError: a count is negative.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of pairs cannot be negative, got {only_a} and {only_b}")
    n = only_a + only_b
    # Whole numbers to the end: no tail is too small for them.
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences: ArrayLike, num_draws: int = 10_000, seed: int = 0) -> float:
    """The two-sided randomisation test of no difference: each problem's might as well have had the other sign.

    Where each is -1, 0 or 1, this is McNemar's test but for the draws; where a problem has several pairs, its
    difference is their mean, and pairs of one problem are not taken for independent.

    Args:
        differences: one for each problem.
        num_draws: how many times the signs are drawn.
        seed: of the draws.
    """
    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=np.float64)), return_counts=True)
    found = abs(float(np.sum(differences)))
    rng = np.random.default_rng(seed)
    # Of as many differences of one size, so many are positive.
    drawn = np.abs((2 * rng.binomial(counts, 0.5, size=(num_draws, len(counts))) - counts) @ sizes)
    return float((1 + np.sum(drawn >= found - 1e-9)) / (1 + num_draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many were computed (Holm 1979), in the order given."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of a - b, with a percentile bootstrap interval that resamples problems.

    Args:
        a: one value for each problem: right or wrong, or the mean of that over seeds.
        b: the other arm's values, for the same problems in the same order.
        confidence: the nominal coverage, between 0 and 1.
        num_resamples: how many times the problems are drawn anew, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        The difference of the means, and the lower and upper bound, in the unit of the values.

    Raises:
        ValueError: there are no problems, the two differ in length, or a value is not finite.
    """
    a_P, b_P = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_P.ndim != 1 or a_P.shape != b_P.shape:
        raise ValueError(f"pairs need one value a problem on each side, got shapes {a_P.shape} and {b_P.shape}")
    if a_P.size == 0:
        raise ValueError("a paired difference needs at least one problem that both arms answered")
    difference_P = a_P - b_P
    if not np.isfinite(difference_P).all():
        raise ValueError("a paired difference needs finite values; leave out problems that one side did not answer")
    # Drawing n problems with replacement is drawing how often each distinct difference occurs. They take few
    # values, so the same distribution costs a handful of counts instead of n indices.
    values, counts = np.unique(difference_P, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(a_P.size, counts / a_P.size, size=num_resamples)
    means = draws @ values / a_P.size
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(difference_P.mean()), float(low), float(high)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, from n of which `correct` are: 1 - C(n - c, k) / C(n, k).

    Unbiased, where 1 - (1 - c/n)^k is not (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that most samples give (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    Samples without an answer have no vote; of answers with as many votes the one that came first wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
