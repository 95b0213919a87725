"""Effects: what training changed in each attention head, and what that has to do with being right.

P problems, F heads (layers x heads) by one statistic, R resamples, A arms.

Heads are many, and some differ by chance. Intervals are of each head by itself, from problems drawn anew. Every p is
corrected for the number of heads: it is the share of randomisations, under which there is no effect, whose *largest*
head is at least as far out (Westfall & Young 1993). Heads that move together are randomised together, so that no more
is taken off than their number really costs, as Bonferroni's correction would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# With fewer problems the spread over resamples says little of that over problems; with fewer arms there are not enough
# orders of them for any to be rare.
FEWEST_PROBLEMS, FEWEST_ARMS = 10, 5


@dataclass(frozen=True)
class Effect:
    """One number for each head, F of each: NaN where it is not defined."""

    value: np.ndarray
    low: np.ndarray
    """Of the 95 % percentile interval over problems, for the head by itself."""
    high: np.ndarray
    p: np.ndarray
    """Of no effect, corrected for the number of heads."""

    @property
    def is_clear(self) -> np.ndarray:
        """Whether it is told from chance at 5 %, all heads counted."""
        return self.p < 0.05


def difference(values_PF: np.ndarray, others_PF: np.ndarray, seed: int = 0) -> Effect:
    """What an arm's heads do more than those of the base student, on the same problems.

    p is that of a randomisation test: were the arm's student and the base one alike, a problem's differences,
    those of all heads together, might as well have had the other sign. Heads are compared by their t, computed anew for
    each draw of signs.

    Args:
        values_PF: of the arm, in the mean over its seeds; NaN where a problem has none.
        others_PF: of the base student.
        seed: of the draws.
    """
    difference_PF = values_PF - others_PF
    is_there_PF = np.isfinite(difference_PF)
    filled_PF, count_F = np.where(is_there_PF, difference_PF, 0.0), is_there_PF.sum(0)
    squares_F, num_problems = (filled_PF**2).sum(0), len(difference_PF)

    def t_values(signs_RP: np.ndarray) -> np.ndarray:
        # A sum of squares does not change with signs.
        means_RF = signs_RP @ filled_PF / np.maximum(count_F, 1)
        variance_RF = (squares_F - count_F * means_RF**2) / np.maximum(count_F - 1, 1)
        smallest_F = 1e-12 * squares_F + 1e-300
        return np.abs(means_RF) / np.sqrt(np.maximum(variance_RF, smallest_F) / np.maximum(count_F, 1))

    def means(weights_RP: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights_RP @ filled_PF) / (weights_RP @ is_there_PF.astype(np.float64))

    value_F = means(np.ones((1, num_problems)))[0]
    if num_problems < FEWEST_PROBLEMS:
        return _without_p(value_F)
    signs_RP = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(RESAMPLES, num_problems))
    p_F = _corrected(t_values(np.ones((1, num_problems)))[0], t_values(signs_RP), value_F)
    return Effect(value_F, *_interval(means, value_F, num_problems, seed), p_F)


def correlation(values_PF: Sequence[np.ndarray], right_P: Sequence[np.ndarray], seed: int = 0) -> Effect:
    """How what a head does goes with being right, from problem to problem: the mean of the students' own Pearson's r.

    So it is not told what one student does more than another, and how much better that is. A student counts for as much
    as there is to be explained, the variance of its being right: one that has nothing right has no say. p is that of a
    permutation test: which problems were had right, by all students together.

    Args:
        values_PF: of each student, on the same problems; NaN where a problem has none.
        right_P: whether it had each problem right, or how often; NaN where it has no answer.
        seed: of the draws.
    """
    students = [_Correctness(each_PF, own_P) for each_PF, own_P in zip(values_PF, right_P, strict=True)]
    num_problems = len(right_P[0]) if right_P else 0

    def drawn(weights_RP: np.ndarray) -> np.ndarray:
        return _pooled([each.drawn(weights_RP) for each in students])

    value_F = drawn(np.ones((1, num_problems)))[0]
    if num_problems < FEWEST_PROBLEMS:
        return _without_p(value_F)
    rng = np.random.default_rng([seed, 1])
    orders_RP = np.stack([rng.permutation(num_problems) for _ in range(RESAMPLES)])
    in_order_1P = np.arange(num_problems)[None]
    found_F = np.abs(_pooled([each.permuted(in_order_1P) for each in students]))[0]
    permuted_RF = np.abs(_pooled([each.permuted(orders_RP) for each in students]))
    return Effect(value_F, *_interval(drawn, value_F, num_problems, seed), _corrected(found_F, permuted_RF, value_F))


class _Correctness:
    """A student's values and how often it was right, with what does not change from draw to draw.

    `drawn` and `permuted` give its r for each head, and how much there was to explain: (R, F) both.
    """

    def __init__(self, values_PF: np.ndarray, right_P: np.ndarray) -> None:
        is_there_PF = np.isfinite(values_PF) & np.isfinite(right_P)[:, None]
        # Near zero, so that sums of squares keep their digits.
        centre_F = np.where(is_there_PF, values_PF, 0).sum(0) / np.maximum(is_there_PF.sum(0), 1)
        self._there_PF = is_there_PF.astype(np.float64)
        self._x_PF = np.where(is_there_PF, values_PF - centre_F, 0.0)
        self._right_P = np.nan_to_num(right_P)
        # A problem without an answer is one that is had right as often as any, in whatever order.
        answered = np.isfinite(right_P)
        self._filled_P = np.where(answered, self._right_P, self._right_P[answered].mean() if answered.any() else 0.0)

    def drawn(self, weights_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y_PF = self._right_P[:, None] * self._there_PF
        n, x, y = (weights_RP @ each for each in (self._there_PF, self._x_PF, y_PF))
        xy, xx, yy = (weights_RP @ each for each in (self._x_PF * y_PF, self._x_PF**2, y_PF**2))
        n = np.maximum(n, 1)
        return _r(xy - x * y / n, xx - x * x / n, yy - y * y / n)

    def permuted(self, orders_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y_RP = self._filled_P[orders_RP]
        n_F = np.maximum(self._there_PF.sum(0), 1)
        yy_RF = y_RP**2 @ self._there_PF - (y_RP @ self._there_PF) ** 2 / n_F
        # The values' own mean is zero.
        return _r(y_RP @ self._x_PF, np.broadcast_to((self._x_PF**2).sum(0), yy_RF.shape), yy_RF)


def _r(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r, and the sum of squares that there was to explain; 0 where nothing varies but by rounding."""
    varies = (xx > 1e-14) & (yy > 1e-9)
    return np.where(varies, xy / np.sqrt(np.where(varies, xx * yy, 1.0)), 0.0), np.where(varies, yy, 0.0)


def _pooled(students: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The students' r in the mean, by what each had to explain: (R, F); NaN where that is nothing."""
    if not students:
        return np.full((1, 0), np.nan)
    total = np.sum([weight for _, weight in students], axis=0)
    weighted = np.sum([r * weight for r, weight in students], axis=0)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1.0), np.nan)


def across_arms(values_AF: np.ndarray, accuracy_A: np.ndarray, seed: int = 0) -> Effect:
    """How what a head does goes with accuracy from arm to arm: Pearson's r, with Fisher's interval.

    p is that of a permutation test: which arm has which accuracy. Seeds are averaged before, for those of an arm are
    not independent of each other.

    Args:
        values_AF: of each arm, in the mean over problems and seeds.
        accuracy_A: how many of the test problems it had right, as a share.
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
    p_F = _corrected(np.abs(value_F), np.abs(r_RF[1:]), value_F)
    return Effect(value_F, np.tanh(z_F - error), np.tanh(z_F + error), p_F)


def _interval(
    statistic: Callable[[np.ndarray], np.ndarray], value_F: np.ndarray, num_problems: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of a statistic of weighted problems, from (R, P) to (R, F): they are drawn anew."""
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=RESAMPLES)
    drawn_RF = statistic(weights_RP.astype(np.float64))
    # Where a draw holds no problem that has a value it says nothing.
    is_there_F = np.isfinite(value_F)
    drawn_RF = np.where(np.isfinite(drawn_RF) | ~is_there_F, drawn_RF, value_F)
    low_F, high_F = np.quantile(np.where(is_there_F, drawn_RF, 0.0), [0.025, 0.975], axis=0)
    return np.where(is_there_F, low_F, np.nan), np.where(is_there_F, high_F, np.nan)


def _corrected(found_F: np.ndarray, randomised_RF: np.ndarray, value_F: np.ndarray) -> np.ndarray:
    """The share of randomisations, the one that was found among them, whose largest head is as far out."""
    largest_R = np.nanmax(np.where(np.isfinite(randomised_RF), randomised_RF, 0.0), axis=1, initial=0.0)
    with np.errstate(invalid="ignore"):
        p_F = (1 + (largest_R[:, None] >= found_F * (1 - 1e-9)).sum(0)) / (1 + len(largest_R))
    return np.where(np.isfinite(value_F), p_F, np.nan)


def _without_p(value_F: np.ndarray) -> Effect:
    nothing_F = np.full_like(value_F, np.nan)
    return Effect(value_F, nothing_F, nothing_F, nothing_F)
