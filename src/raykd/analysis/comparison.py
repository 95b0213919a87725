"""Comparison: every arm against its unprimed baseline, paired by problem and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raykd.analysis.scores import Row
from raykd.analysis.statistics import holm, mcnemar_exact, paired_bootstrap, sign_flip
from raykd.config.experiment import BASE
from raykd.config.overrides import flatten

BASELINE = "none"
"""The unprimed strategy, and the name of the arm that is the baseline where no closer one exists."""


@dataclass(frozen=True)
class Setting:
    """The seed and hyperparameters that two trials must share to be compared."""

    seed: int
    hparams: Mapping[str, Any] = field(default_factory=dict)
    """The searched fields that affect the trial; empty where arms are compared at any values of these."""

    def equals(self, other: "Setting") -> bool:
        """Return whether both have the same seed, and the same value of every field that affects both."""
        common = self.hparams.keys() & other.hparams.keys()
        return self.seed == other.seed and all(self.hparams[path] == other.hparams[path] for path in common)


Answers = Mapping[tuple[str, int], Row]
"""A student's prediction rows by problem and sample number."""
Trials = Sequence[tuple[Setting, Answers]]
"""The setting and the answers of each trial of an arm."""


@dataclass(frozen=True)
class Baseline:
    """The arm that another arm is compared with."""

    arm: str
    only_prompt_differs: bool
    """Whether only the teacher's prompt differs; else the difference is not the effect of the prompt."""


@dataclass(frozen=True)
class Comparison:
    """The paired comparison of an arm with its baseline: same problem, seed and sample; differences are fractions."""

    arm: str
    baseline: Baseline
    num_problems: int
    num_pairs: int
    """More than `num_problems` where there are several seeds or samples."""
    only_arm: int
    """Pairs in which only the arm is correct."""
    only_baseline: int
    """Pairs in which only the baseline is correct."""
    difference: float
    low: float
    """Lower end of the 95 % confidence interval over problems."""
    high: float
    p: float
    p_holm: float
    """p after Holm's correction for the number of arms compared."""

    @property
    def is_significant(self) -> bool:
        """Whether both the confidence interval and the corrected test reject no difference at the 5 % level."""
        return self.p_holm < 0.05 and (self.low > 0 or self.high < 0)


def baselines(arms: Mapping[str, Mapping[str, Any]], strategies: Mapping[str, str]) -> dict[str, Baseline]:
    """Return the baseline of each arm.

    The baseline of a primed arm is the unprimed arm with the same other settings. Where there is none, and for unprimed
    arms, it is the experiment's default baseline: the arm `none`, or else the first arm that overrides nothing but the
    strategy.

    Args:
        arms: the overrides of each arm, by dotted paths or nested.
        strategies: the teacher's prompt strategy in each arm; empty where the arm has no teacher prompt.

    Returns:
        Baselines by the arm's name; arms without a baseline are left out.
    """
    flat = {
        name: {path: value for path, value in flatten(dict(overrides), "") if path != "prompt.strategy"}
        for name, overrides in arms.items()
    }
    unprimed = {name: settings for name, settings in flat.items() if strategies[name] in ("", BASELINE)}
    if BASELINE in arms:
        default = BASELINE
    else:
        default = next((name for name, settings in unprimed.items() if not settings), None)
    baselines = {}
    for name, settings in flat.items():
        matching = next((other for other, other_settings in unprimed.items() if other_settings == settings), None)
        if name not in unprimed and matching is not None:
            baselines[name] = Baseline(matching, only_prompt_differs=True)
        elif default is not None and default != name:
            baselines[name] = Baseline(default, only_prompt_differs=False)
    if default is not None:
        baselines[BASE] = Baseline(default, only_prompt_differs=False)
    return baselines


def compare_arms(arms: Mapping[str, Trials], baselines: Mapping[str, Baseline], column: str) -> list[Comparison]:
    """Compare each arm with its baseline on the problems that both answered in the same setting.

    Args:
        arms: the trials of each arm.
        baselines: the baseline of each arm.
        column: `is_correct_strict` or `is_correct_flexible`.

    Returns:
        One comparison for each arm that has pairs, in the order of `arms`.
    """
    pairs = {
        name: _pairs(trials, arms[baselines[name].arm], column, any_setting=name == BASE)
        for name, trials in arms.items()
        if name in baselines and baselines[name].arm in arms
    }
    comparisons = [compare_pairs(name, baselines[name], arm_pairs) for name, arm_pairs in pairs.items() if arm_pairs]
    corrected = holm([comparison.p for comparison in comparisons])
    return [replace(comparison, p_holm=p) for comparison, p in zip(comparisons, corrected, strict=True)]


def _pairs(trials: Trials, baseline: Trials, column: str, any_setting: bool) -> dict[str, list[tuple[bool, bool]]]:
    """Return by problem (arm is correct, baseline is correct) for each setting and sample that both answered.

    The base student has no setting (`any_setting`): it is paired with every trial of the baseline.
    """
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for setting, arm_rows in trials:
        for baseline_setting, baseline_rows in baseline:
            if not (any_setting or setting.equals(baseline_setting)):
                continue
            for problem_id, sample in sorted(arm_rows.keys() & baseline_rows.keys()):
                arm_row, baseline_row = arm_rows[problem_id, sample], baseline_rows[problem_id, sample]
                if not arm_row["error"] and not baseline_row["error"]:
                    pairs.setdefault(problem_id, []).append((arm_row[column], baseline_row[column]))
    return pairs


def compare_pairs(arm: str, baseline: Baseline, pairs: Mapping[str, list[tuple[bool, bool]]]) -> Comparison:
    """Return the paired difference of an arm and its baseline, with its confidence interval and p-value.

    p is from the exact McNemar test where each problem has one pair. Pairs of one problem, from several seeds or
    samples, are not independent of each other: p is then from the sign-flip test of the problems' mean differences.

    Args:
        arm: the arm's name.
        baseline: the arm's baseline.
        pairs: by problem, at least one: (the arm is correct, the baseline is correct).
    """
    all_pairs = [pair for problem_pairs in pairs.values() for pair in problem_pairs]
    only_arm, only_baseline = all_pairs.count((True, False)), all_pairs.count((False, True))
    # Whole problems are resampled, because the seeds and samples of a problem are not independent of each other.
    arm_P = [sum(correct for correct, _ in problem_pairs) / len(problem_pairs) for problem_pairs in pairs.values()]
    baseline_P = [sum(correct for _, correct in problem_pairs) / len(problem_pairs) for problem_pairs in pairs.values()]
    difference, low, high = paired_bootstrap(arm_P, baseline_P)
    if len(all_pairs) == len(pairs):
        p = mcnemar_exact(only_arm, only_baseline)
    else:
        p = sign_flip([a - b for a, b in zip(arm_P, baseline_P, strict=True)])
    return Comparison(
        arm=arm,
        baseline=baseline,
        num_problems=len(pairs),
        num_pairs=len(all_pairs),
        only_arm=only_arm,
        only_baseline=only_baseline,
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
    )
