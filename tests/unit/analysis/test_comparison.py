"""Comparison: the baseline of each arm."""

from collections.abc import Mapping
from typing import Any

from raykd.analysis.comparison import baselines


def baseline_names(arms: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Return the baseline of each arm, given (strategy, overrides); `+` marks baselines that differ in more fields."""
    # As in a file, an unprimed arm does not set its strategy.
    overrides = {
        name: {"prompt.strategy": strategy, **more} if strategy == "teacher" else more
        for name, (strategy, more) in arms.items()
    }
    found = baselines(overrides, {name: strategy for name, (strategy, _) in arms.items()})
    return {name: baseline.arm + ("" if baseline.only_prompt_differs else "+") for name, baseline in found.items()}


def test_baseline_is_unprimed_arm_with_same_settings():
    arms = {
        "none": ("none", {}),
        "primed": ("teacher", {}),
        "soft": ("teacher", {"targets.kind": "top_k"}),
        # Nested or dotted keys are equivalent.
        "bare_soft": ("none", {"targets": {"kind": "top_k"}}),
        "slow": ("teacher", {"train.epochs": 3}),
        # Without a teacher there is no prime.
        "reference": ("", {"targets.source": "reference"}),
    }
    assert baseline_names(arms) == {
        "primed": "none",
        "soft": "bare_soft",
        "bare_soft": "none+",
        "slow": "none+",
        "reference": "none+",
        "base": "none+",
    }


def test_default_baseline_has_any_name():
    more = {"train.epochs": 3}
    assert baseline_names({"a": ("none", {}), "b": ("teacher", {}), "c": ("none", more)}) == {
        "b": "a",
        "c": "a+",
        "base": "a+",
    }
    assert baseline_names({"a": ("teacher", {}), "b": ("teacher", more)}) == {}
