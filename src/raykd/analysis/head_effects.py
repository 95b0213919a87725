"""Head effects: the change of each attention head by training, and its correlation with correct answers.

P problems, F heads (layers x heads) by one statistic, R resamples, A arms.

Some of many heads differ by chance. Confidence intervals are for each head by itself and resample problems. Every p is
corrected for the number of heads by the maximum statistic (Westfall & Young 1993): it is the share of randomizations
whose largest effect over all heads is at least as large as the observed one. All heads are randomized together, so that
correlated heads are not corrected for more than once, as Bonferroni's correction would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# With fewer problems the bootstrap underestimates the variation between problems. With fewer arms there are too few
# permutations for a small p.
FEWEST_PROBLEMS, FEWEST_ARMS = 10, 5


@dataclass(frozen=True)
class Effect:
    """An effect for each head, F each: NaN where it is not defined."""

    value: np.ndarray
    low: np.ndarray
    """Lower end of the 95 % confidence interval over problems, for the single head."""
    high: np.ndarray
    p: np.ndarray
    """p-value of no effect, corrected for the number of heads."""

    @property
    def is_significant(self) -> np.ndarray:
        """Whether the corrected p is below 0.05."""
        return self.p < 0.05


def difference(values_PF: np.ndarray, base_PF: np.ndarray, seed: int = 0) -> Effect:
    """Return the paired difference of an arm's heads from the base student's.

    p is from a sign-flip randomization test: under the null hypothesis the sign of a problem's differences, flipped for
    all heads together, is random. The test statistic of a head is |t|, computed for each random sign assignment.

    Args:
        values_PF: of the arm, averaged over its seeds; NaN where a problem has no value.
        base_PF: of the base student.
        seed: of the random signs and resamples.
    """
    difference_PF = values_PF - base_PF
    is_defined_PF = np.isfinite(difference_PF)
    filled_PF, count_F = np.where(is_defined_PF, difference_PF, 0.0), is_defined_PF.sum(0)
    squares_F, num_problems = (filled_PF**2).sum(0), len(difference_PF)

    def t_values(signs_RP: np.ndarray) -> np.ndarray:
        # Signs do not change the sum of squares.
        means_RF = signs_RP @ filled_PF / np.maximum(count_F, 1)
        variance_RF = (squares_F - count_F * means_RF**2) / np.maximum(count_F - 1, 1)
        smallest_F = 1e-12 * squares_F + 1e-300
        return np.abs(means_RF) / np.sqrt(np.maximum(variance_RF, smallest_F) / np.maximum(count_F, 1))

    def means(weights_RP: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights_RP @ filled_PF) / (weights_RP @ is_defined_PF.astype(np.float64))

    value_F = means(np.ones((1, num_problems)))[0]
    if num_problems < FEWEST_PROBLEMS:
        return _without_p(value_F)
    signs_RP = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(RESAMPLES, num_problems))
    p_F = _corrected_p(t_values(np.ones((1, num_problems)))[0], t_values(signs_RP), value_F)
    low_F, high_F = _bootstrap_interval(means, value_F, num_problems, seed)
    return Effect(value_F, low_F, high_F, p_F)


def correlation(values_PF: Sequence[np.ndarray], accuracy_P: Sequence[np.ndarray], seed: int = 0) -> Effect:
    """Return the correlation of each head with correctness across problems: the weighted mean of the students' r.

    Pearson's r is computed within each student, so differences between students do not count. The weight of a student
    is the variance of its correctness: a student that answers every problem wrong has weight 0. p is from a permutation
    test over problems, with the same permutation for all students.

    Args:
        values_PF: of each student, on the same problems; NaN where a problem has no value.
        accuracy_P: of each student, whether each answer is correct, or the share of correct samples; NaN where the
            student has no answer.
        seed: of the permutations and resamples.
    """
    students = [_StudentCorrelation(x_PF, y_P) for x_PF, y_P in zip(values_PF, accuracy_P, strict=True)]
    num_problems = len(accuracy_P[0]) if accuracy_P else 0

    def resampled(weights_RP: np.ndarray) -> np.ndarray:
        return _weighted_mean([student.resampled(weights_RP) for student in students])

    value_F = resampled(np.ones((1, num_problems)))[0]
    if num_problems < FEWEST_PROBLEMS:
        return _without_p(value_F)
    rng = np.random.default_rng([seed, 1])
    orders_RP = np.stack([rng.permutation(num_problems) for _ in range(RESAMPLES)])
    identity_1P = np.arange(num_problems)[None]
    observed_F = np.abs(_weighted_mean([student.permuted(identity_1P) for student in students]))[0]
    permuted_RF = np.abs(_weighted_mean([student.permuted(orders_RP) for student in students]))
    p_F = _corrected_p(observed_F, permuted_RF, value_F)
    low_F, high_F = _bootstrap_interval(resampled, value_F, num_problems, seed)
    return Effect(value_F, low_F, high_F, p_F)


class _StudentCorrelation:
    """The correlation of a student's heads with its correctness, for resampled or permuted problems.

    `resampled` and `permuted` return r for each head, and the sum of squares of correctness as its weight: (R, F) both.
    """

    def __init__(self, values_PF: np.ndarray, accuracy_P: np.ndarray) -> None:
        is_defined_PF = np.isfinite(values_PF) & np.isfinite(accuracy_P)[:, None]
        # Centered, so that sums of squares keep their digits.
        center_F = np.where(is_defined_PF, values_PF, 0).sum(0) / np.maximum(is_defined_PF.sum(0), 1)
        self._defined_PF = is_defined_PF.astype(np.float64)
        self._x_PF = np.where(is_defined_PF, values_PF - center_F, 0.0)
        self._accuracy_P = np.nan_to_num(accuracy_P)
        # A problem without an answer gets the mean, which no permutation changes.
        answered = np.isfinite(accuracy_P)
        mean = self._accuracy_P[answered].mean() if answered.any() else 0.0
        self._filled_P = np.where(answered, self._accuracy_P, mean)

    def resampled(self, weights_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y_PF = self._accuracy_P[:, None] * self._defined_PF
        n, x, y = (weights_RP @ terms_PF for terms_PF in (self._defined_PF, self._x_PF, y_PF))
        xy, xx, yy = (weights_RP @ terms_PF for terms_PF in (self._x_PF * y_PF, self._x_PF**2, y_PF**2))
        n = np.maximum(n, 1)
        return _pearson_r(xy - x * y / n, xx - x * x / n, yy - y * y / n)

    def permuted(self, orders_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y_RP = self._filled_P[orders_RP]
        n_F = np.maximum(self._defined_PF.sum(0), 1)
        yy_RF = y_RP**2 @ self._defined_PF - (y_RP @ self._defined_PF) ** 2 / n_F
        # x is centered, so that the cross term with the mean of y is 0.
        return _pearson_r(y_RP @ self._x_PF, np.broadcast_to((self._x_PF**2).sum(0), yy_RF.shape), yy_RF)


def _pearson_r(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Pearson's r and the sum of squares of y; both 0 where x or y is constant up to rounding."""
    varies = (xx > 1e-14) & (yy > 1e-9)
    return np.where(varies, xy / np.sqrt(np.where(varies, xx * yy, 1.0)), 0.0), np.where(varies, yy, 0.0)


def _weighted_mean(students: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the mean of the students' r by their weights: (R, F); NaN where all weights are 0."""
    if not students:
        return np.full((1, 0), np.nan)
    total = np.sum([weight for _, weight in students], axis=0)
    weighted = np.sum([r * weight for r, weight in students], axis=0)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1.0), np.nan)


def across_arms(values_AF: np.ndarray, accuracy_A: np.ndarray, seed: int = 0) -> Effect:
    """Return the correlation of each head with accuracy across arms: Pearson's r with Fisher's confidence interval.

    p is from a permutation test over arms. The seeds of an arm are not independent of each other, so the caller
    averages them.

    Args:
        values_AF: of each arm, averaged over problems and seeds.
        accuracy_A: of each arm, as a fraction of the test problems.
        seed: of the permutations.
    """
    n, rng = len(accuracy_A), np.random.default_rng([seed, 1])
    orders_RA = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(RESAMPLES))])
    x_AF, y_A = values_AF - values_AF.mean(0), accuracy_A - accuracy_A.mean()
    lengths_F = np.linalg.norm(x_AF, axis=0) * np.linalg.norm(y_A)
    with np.errstate(invalid="ignore", divide="ignore"):
        r_RF = np.where(lengths_F > 1e-12, (y_A[orders_RA] @ x_AF) / lengths_F, np.nan)
    value_F = r_RF[0]
    if n < FEWEST_ARMS:
        return _without_p(value_F)
    z_F, error = np.arctanh(np.clip(value_F, -1 + 1e-12, 1 - 1e-12)), 1.959963984540054 / np.sqrt(n - 3)
    p_F = _corrected_p(np.abs(value_F), np.abs(r_RF[1:]), value_F)
    return Effect(value_F, np.tanh(z_F - error), np.tanh(z_F + error), p_F)


def _bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], value_F: np.ndarray, num_problems: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % percentile bootstrap interval of a function from problem weights (R, P) to a statistic (R, F)."""
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=RESAMPLES)
    resampled_RF = statistic(weights_RP.astype(np.float64))
    # A resample without any problem that has a value gets the observed value.
    is_defined_F = np.isfinite(value_F)
    resampled_RF = np.where(np.isfinite(resampled_RF) | ~is_defined_F, resampled_RF, value_F)
    low_F, high_F = np.quantile(np.where(is_defined_F, resampled_RF, 0.0), [0.025, 0.975], axis=0)
    return np.where(is_defined_F, low_F, np.nan), np.where(is_defined_F, high_F, np.nan)


def _corrected_p(observed_F: np.ndarray, randomized_RF: np.ndarray, value_F: np.ndarray) -> np.ndarray:
    """Return the share of randomizations, the observed one included, whose largest head is at least as large."""
    largest_R = np.nanmax(np.where(np.isfinite(randomized_RF), randomized_RF, 0.0), axis=1, initial=0.0)
    with np.errstate(invalid="ignore"):
        p_F = (1 + (largest_R[:, None] >= observed_F * (1 - 1e-9)).sum(0)) / (1 + len(largest_R))
    return np.where(np.isfinite(value_F), p_F, np.nan)


def _without_p(value_F: np.ndarray) -> Effect:
    undefined_F = np.full_like(value_F, np.nan)
    return Effect(value_F, undefined_F, undefined_F, undefined_F)
