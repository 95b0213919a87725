"""Results of a sweep that are read from its trials: points, baselines, and a search without points."""

from pathlib import Path

import pytest

from raykd.report.results import read_results
from raykd.report.sweep import best_points
from sweep_plans import TREE, sweep_plan, write_validations


def test_points_with_close_values_stay_separate(tmp_path: Path):
    rates = {"train.learning_rate": {"grid": [0.00100001, 0.00100002, 0.00100003]}}
    plan = sweep_plan(tmp_path, sweep={"space": rates, "num_samples": 1})
    for trial in plan.trials:
        write_validations(trial, 0.2, 0.5)
    results = read_results(plan.folder)
    assert [len(arm.trials) for arm in results.arms] == [1, 1]
    assert {row[3] for row in best_points(results).rows} == {"3"}


def test_searched_strategy_does_not_make_an_arm_the_baseline(tmp_path: Path):
    """The strategy of an arm's last trial has no effect."""
    space = {"prompt.strategy": {"grid": ["none", "teacher", "confidence"]}}
    arms = {"hard": {}, "soft": {"targets.kind": "top_k"}}
    plan = sweep_plan(tmp_path, arms=arms, sweep={"space": space, "num_samples": 1})
    for number in range(3):
        for trial in plan.trials:
            good = trial.hparams["prompt.strategy"] == ("none", "teacher", "confidence")[number]
            write_validations(trial, 0.1, 0.9 if good else 0.2)
        kinds = {arm.name: arm.kind for arm in read_results(plan.folder).arms}
        assert kinds["hard"] == "baseline" and kinds["soft"] != "baseline"


def test_search_without_points_has_nothing_to_report(tmp_path: Path):
    plan = sweep_plan(tmp_path)
    for trial in plan.trials:
        write_validations(trial, 0.2, 0.5)
    searched = sweep_plan(tmp_path, sweep=TREE["sweep"] | {"search": "optuna", "metric": "loss"})
    with pytest.raises(ValueError, match="nothing to report yet"):
        read_results(searched.folder)
