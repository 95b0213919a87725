"""Effects: what training changed in each attention head, and what that has to do with being right.

P problems, F heads (layers x heads) by one statistic, R resamples, N students.

Heads are many, and some differ by chance. Every p here is corrected for their number by the largest studentised
deviation among them in each resample (Westfall & Young 1993; Romano & Wolf 2005), which takes into account that heads
move together, as Bonferroni's does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# With fewer the spread over resamples says little of that over problems.
FEWEST_PROBLEMS = 10


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
    """What an arm's heads do more than those of the untouched student, on the same problems.

    Args:
        values_PF: of the arm, in the mean over its seeds; NaN where a problem has none.
        others_PF: of the untouched student.
        seed: of the resampling.
    """
    difference_PF = values_PF - others_PF
    is_there_PF = np.isfinite(difference_PF)
    filled_PF = np.where(is_there_PF, difference_PF, 0.0)

    def means(weights_RP: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights_RP @ filled_PF) / (weights_RP @ is_there_PF.astype(np.float64))

    return _effect(means, len(difference_PF), seed)


def correlation(values_PF: Sequence[np.ndarray], right_P: Sequence[np.ndarray], seed: int = 0) -> Effect:
    """How what a head does goes with being right, from problem to problem: the mean of the students' own Pearson's r.

    So it is not told what one student does more than another, and how much better that is. A student counts for as much
    as there is to be explained, the variance of its being right: one that has nothing right has no say.

    Args:
        values_PF: of each student, on the same problems; NaN where a problem has none.
        right_P: whether it had each problem right, or how often; NaN where it has no answer.
        seed: of the resampling.
    """
    parts = []
    for each_PF, own_P in zip(values_PF, right_P, strict=True):
        is_there_PF = np.isfinite(each_PF) & np.isfinite(own_P)[:, None]
        # Near zero, so that sums of squares keep their digits.
        centre_F = np.where(is_there_PF, each_PF, 0).sum(0) / np.maximum(is_there_PF.sum(0), 1)
        x_PF = np.where(is_there_PF, each_PF - centre_F, 0.0)
        y_PF = np.where(is_there_PF, np.nan_to_num(own_P)[:, None], 0.0)
        parts.append((is_there_PF.astype(np.float64), x_PF, y_PF))

    def correlations(weights_RP: np.ndarray) -> np.ndarray:
        weighted_RF, total_RF = 0.0, 0.0
        for there_PF, x_PF, y_PF in parts:
            n, x, y = (weights_RP @ each for each in (there_PF, x_PF, y_PF))
            n = np.maximum(n, 1)
            xy = weights_RP @ (x_PF * y_PF) - x * y / n
            xx, yy = (weights_RP @ each**2 - total**2 / n for each, total in ((x_PF, x), (y_PF, y)))
            # What does not vary goes with nothing; rounding leaves a trace of it.
            varies = (xx > 1e-14) & (yy > 1e-9)
            r = np.where(varies, xy / np.sqrt(np.where(varies, xx * yy, 1.0)), 0.0)
            weighted_RF, total_RF = weighted_RF + r * yy, total_RF + np.where(varies, yy, 0.0)
        is_there_RF = np.asarray(total_RF) > 0
        return np.where(is_there_RF, weighted_RF / np.where(is_there_RF, total_RF, 1.0), np.nan)

    return _effect(correlations, len(right_P[0]) if right_P else 0, seed)


def across_students(values_NF: np.ndarray, accuracy_N: np.ndarray, seed: int = 0) -> Effect:
    """How what a head does goes with accuracy from student to student: Pearson's r, with Fisher's interval.

    p is that of a permutation test: which student has which accuracy. Seeds of an arm are not independent of each
    other, which neither knows.

    Args:
        values_NF: of each student, in the mean over problems.
        accuracy_N: how many of the test problems it had right, as a share.
        seed: of the permutations.
    """
    n = len(accuracy_N)
    rng = np.random.default_rng(seed)
    orders = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(RESAMPLES))])
    x_NF, y_N = values_NF - values_NF.mean(0), accuracy_N - accuracy_N.mean()
    lengths_F = np.linalg.norm(x_NF, axis=0) * np.linalg.norm(y_N)
    with np.errstate(invalid="ignore", divide="ignore"):
        r_RF = np.where(lengths_F > 1e-12, (y_N[orders] @ x_NF) / lengths_F, np.nan)
    value_F, nothing_F = r_RF[0], np.full(values_NF.shape[1], np.nan)
    if n < 4:
        return Effect(value_F, nothing_F, nothing_F, nothing_F)
    largest_R = np.nanmax(np.where(np.isfinite(r_RF), np.abs(r_RF), -1), axis=1)
    p_F = (largest_R[:, None] >= np.abs(value_F) - 1e-12).mean(0)
    z_F, error = np.arctanh(np.clip(value_F, -1 + 1e-12, 1 - 1e-12)), 1.959963984540054 / np.sqrt(n - 3)
    is_there_F = np.isfinite(value_F)
    return Effect(value_F, np.tanh(z_F - error), np.tanh(z_F + error), np.where(is_there_F, p_F, np.nan))


def _effect(statistic: Callable[[np.ndarray], np.ndarray], num_problems: int, seed: int) -> Effect:
    """A statistic of weighted problems, with what it does when problems are drawn anew.

    Args:
        statistic: from weights (R, P) to (R, F).
        num_problems: P.
        seed: of the draws.
    """
    value_F = statistic(np.ones((1, num_problems)))[0]
    nothing_F = np.full_like(value_F, np.nan)
    if num_problems < FEWEST_PROBLEMS:
        return Effect(value_F, nothing_F, nothing_F, nothing_F)
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=RESAMPLES)
    drawn_RF = statistic(weights_RP.astype(np.float64))
    is_there_F = np.isfinite(value_F)
    drawn_RF = np.where(np.isfinite(drawn_RF), drawn_RF, value_F)
    low_F, high_F = np.quantile(drawn_RF, [0.025, 0.975], axis=0)
    spread_F = drawn_RF.std(axis=0)
    # A head that is the same on every problem deviates by rounding alone.
    moves_F = is_there_F & (spread_F > 1e-9 * np.maximum(np.abs(value_F), 1e-3))
    spread_F = np.where(moves_F, spread_F, np.inf)
    largest_R = np.max(np.where(moves_F, np.abs(drawn_RF - value_F) / spread_F, 0.0), axis=1, initial=0.0)
    p_F = (1 + (largest_R[:, None] >= np.abs(value_F) / spread_F).sum(0)) / (1 + RESAMPLES)
    return Effect(*(np.where(is_there_F, each, np.nan) for each in (value_F, low_F, high_F, p_F)))
