"""Comparison: every arm against the one that has no prime, paired by problem and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raykd.analysis.scores import Row
from raykd.analysis.statistics import holm, mcnemar_exact, paired_bootstrap, sign_flip
from raykd.config.experiment import BASE
from raykd.config.overrides import flatten

BASELINE = "none"
"""The strategy without a prime, and the arm that others are compared with where they have no closer one."""


@dataclass(frozen=True)
class Setting:
    """What two trials must have in common to be compared."""

    seed: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """The searched fields that bear on the trial; empty where arms are compared whatever these are."""

    def equals(self, other: "Setting") -> bool:
        """Whether both have one seed, and one value in every field that bears on both."""
        common = self.values.keys() & other.values.keys()
        return self.seed == other.seed and all(self.values[path] == other.values[path] for path in common)


Answers = Mapping[tuple[str, int], Row]
"""A student's prediction rows by problem and sample number."""
Trials = Sequence[tuple[Setting, Answers]]
"""An arm's trials: their setting, and their answers."""


@dataclass(frozen=True)
class Baseline:
    """What an arm is compared with."""

    arm: str
    prime_alone: bool
    """Whether the two differ in the prime alone; else their difference is not the prime's worth."""


@dataclass(frozen=True)
class Comparison:
    """An arm against its baseline, on the same problems with the same seed and sample; differences as fractions."""

    arm: str
    baseline: Baseline
    num_problems: int
    num_pairs: int
    """More than problems where there are several seeds or samples."""
    only_arm: int
    only_baseline: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    """p, corrected for the number of arms compared."""

    @property
    def is_clear(self) -> bool:
        """Both the interval over problems and the test, corrected, tell it from chance at 5 %."""
        return self.p_holm < 0.05 and (self.low > 0 or self.high < 0)


def baselines(arms: Mapping[str, Mapping[str, Any]], strategies: Mapping[str, str]) -> dict[str, Baseline]:
    """For each arm the one that it is compared with.

    That is the arm that differs from it in the prime alone, and has none. Failing that, and for what is itself without
    a prime, it is the experiment's own baseline: the arm `none`, or else one that overrides nothing but the strategy.

    Args:
        arms: what each arm overrides, by dotted paths or nested.
        strategies: how the teacher of each arm is primed; empty where none is asked.

    Returns:
        By the arm's name; arms that have nothing to be compared with are left out.
    """
    flat = {
        name: {path: value for path, value in flatten(dict(overrides), "") if path != "prompt.strategy"}
        for name, overrides in arms.items()
    }
    bare = {name: each for name, each in flat.items() if strategies[name] in ("", BASELINE)}
    own = BASELINE if BASELINE in arms else next((name for name, each in bare.items() if not each), None)
    found = {}
    for name, each in flat.items():
        twin = next((other for other, theirs in bare.items() if theirs == each), None)
        if name not in bare and twin is not None:
            found[name] = Baseline(twin, prime_alone=True)
        elif own is not None and own != name:
            found[name] = Baseline(own, prime_alone=False)
    if own is not None:
        found[BASE] = Baseline(own, prime_alone=False)
    return found


def compare_arms(arms: Mapping[str, Trials], baselines: Mapping[str, Baseline], column: str) -> list[Comparison]:
    """Each arm against its baseline, where both answered the same problems in the same setting.

    Args:
        arms: the trials of each arm.
        baselines: for each arm the one that it is compared with.
        column: `is_correct_strict` or `is_correct_flexible`.

    Returns:
        One for each arm that can be compared, in the order given.
    """
    pairs = {
        name: _pairs(trials, arms[baselines[name].arm], column, any_setting=name == BASE)
        for name, trials in arms.items()
        if name in baselines and baselines[name].arm in arms
    }
    found = [compare_pairs(name, baselines[name], of_arm) for name, of_arm in pairs.items() if of_arm]
    corrected = holm([comparison.p for comparison in found])
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, corrected, strict=True)]


def _pairs(trials: Trials, baseline: Trials, column: str, any_setting: bool) -> dict[str, list[tuple[bool, bool]]]:
    """By problem: (arm is right, baseline is right) for each setting and sample in which both answered it.

    The base student has no setting of its own (`any_setting`): it stands beside every one of the baseline.
    """
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for setting, rows in trials:
        for other, theirs in baseline:
            if not (any_setting or setting.equals(other)):
                continue
            for answer in sorted(rows.keys() & theirs.keys()):
                row, their_row = rows[answer], theirs[answer]
                if not row["error"] and not their_row["error"]:
                    pairs.setdefault(answer[0], []).append((row[column], their_row[column]))
    return pairs


def compare_pairs(arm: str, baseline: Baseline, pairs: Mapping[str, list[tuple[bool, bool]]]) -> Comparison:
    """One against another.

    p is that of the exact McNemar test where each problem has one pair; where it has several, by seeds or samples,
    which are not independent of each other, that of the sign-flip test of the problems' means.

    Args:
        arm: what it is called.
        baseline: the other.
        pairs: by problem, at least one: (the arm is right, the other is right).
    """
    every = [pair for of_problem in pairs.values() for pair in of_problem]
    only_arm, only_baseline = every.count((True, False)), every.count((False, True))
    # Whole problems are resampled, with all their seeds and samples, which are not independent of each other.
    arm_P = [sum(right for right, _ in of_problem) / len(of_problem) for of_problem in pairs.values()]
    baseline_P = [sum(right for _, right in of_problem) / len(of_problem) for of_problem in pairs.values()]
    difference, low, high = paired_bootstrap(arm_P, baseline_P)
    if len(every) == len(pairs):
        p = mcnemar_exact(only_arm, only_baseline)
    else:
        p = sign_flip([a - b for a, b in zip(arm_P, baseline_P, strict=True)])
    return Comparison(
        arm=arm,
        baseline=baseline,
        num_problems=len(pairs),
        num_pairs=len(every),
        only_arm=only_arm,
        only_baseline=only_baseline,
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
    )
