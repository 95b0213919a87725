"""Decisions of a sweep: early stopping, the trials to test, and the status of each trial."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from raykd.config.experiment import Experiment
from raykd.config.sections import Sweep
from raykd.pipeline.plan import Plan
from raykd.report.results import read_results
from raykd.report.sweep import best_points
from raykd.storage import files
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED
from raykd.training.trial import TrialSpec, write_trial_status
from raykd.tuning import schedulers, selection
from runs import started_plan

TREE: dict[str, Any] = {
    "name": "swept",
    "dataset": {"source": "demo", "num_train": 20, "num_validation": 10, "num_test": 2},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {"none": {}, "teacher": {"prompt.strategy": "teacher"}},
    "sweep": {"space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "num_samples": 4},
}


def plan(folder: Path, retry_failed: bool = False, **tree: Any) -> Plan:
    experiment = Experiment.model_validate(TREE | {"storage": str(folder)} | tree)
    return started_plan(experiment, retry_failed)


def measured(trial: TrialSpec, *reached: float, status: str = COMPLETE) -> None:
    """Write a trial's validations."""
    points = [
        {"step": 5 * number, "loss": 1.0, "validation": {"number": number, "n": 10, "correct": 10 * r, "accuracy": r}}
        for number, r in enumerate(reached, start=1)
    ]
    files.write_text(trial.folder / "metrics.jsonl", "".join(json.dumps(point) + "\n" for point in points))
    write_trial_status(trial, status, "out of memory" if status == FAILED else "")


@dataclass(eq=False)
class Trial:
    """A Tune trial with the attributes that schedulers read."""

    trial_id: str
    config: dict[str, str]


def stopped(sweep: Sweep, reached: dict[str, list[float]]) -> dict[str, int]:
    """Return the validation at which each trial is stopped; trials are validated in turns."""
    scheduler = schedulers.PerArmScheduler(sweep)
    trials = {name: Trial(name, {"trial_id": name, "arm": name[0]}) for name in reached}
    found: dict[str, int] = {}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    for number in range(max(map(len, reached.values()))):
        for name, trial in trials.items():
            if name not in found and number < len(reached[name]):
                result = {"validation/number": number + 1, f"validation/{sweep.metric}": reached[name][number]}
                if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                    found[name] = number + 1
    return found


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_trial_is_stopped_if_worse_than_others_of_its_arm(scheduler: str, metric: str):
    sweep = Sweep.model_validate({"scheduler": scheduler, "metric": metric})
    good = [[0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.9], [0.4, 0.6, 0.7, 0.9]]
    bad = [[0.01, 0.02, 0.02, 0.03], [0.01, 0.02, 0.03, 0.04], [0.0, 0.02, 0.03, 0.04]]
    reached = {f"g{number}": each for number, each in enumerate(good)} | {"g9": [0.1, 0.1, 0.1, 0.1]}
    # The other arm is worse altogether, which is no reason to stop it.
    reached |= {f"b{number}": each for number, each in enumerate(bad)}
    if metric == "loss":
        reached = {name: [1 - value for value in each] for name, each in reached.items()}
    over = stopped(sweep, reached)
    assert "g9" in over and over["g9"] < 4
    assert {"b0", "b1"}.isdisjoint(over)


def test_no_trial_is_stopped_at_its_end_or_without_scheduler():
    reached = {"a0": [0.9, 0.9], "a1": [0.9, 0.1], "a2": [0.9, 0.05]}
    assert stopped(Sweep(num_validations=2), reached) == {}
    reached = {"a0": [0.9, 0.9], "a1": [0.1, 0.1]}
    assert stopped(Sweep(num_validations=2), reached) == {"a1": 1}
    assert stopped(Sweep(num_validations=2, scheduler="none"), reached) == {}


def test_ended_trials_are_not_pending(tmp_path: Path):
    first, second, third, *_ = trials = plan(tmp_path).trials
    measured(first, 0.5, 0.6)
    measured(second, 0.1, status=STOPPED)
    measured(third, 0.2, status=FAILED)
    assert [trial.trial_id for trial in plan(tmp_path).pending_trials()] == [trial.trial_id for trial in trials[3:]]
    again = plan(tmp_path, retry_failed=True).pending_trials()
    assert [trial.trial_id for trial in again] == [third.trial_id, *(trial.trial_id for trial in trials[3:])]
    record = files.read_json(third.folder / "trial.json")
    assert (record["status"], record["error"], record["adapter"]) == (FAILED, "out of memory", None)
    assert record["validation"] == {"number": 1, "n": 10, "correct": 2.0, "accuracy": 0.2}
    assert list(record["hparams"]) == ["train.learning_rate"]


def test_max_tokens_changes_trial_ids_only_with_accuracy_metric(tmp_path: Path):
    def ids(metric: str, max_tokens: int) -> list[str]:
        fields = {"sweep": TREE["sweep"] | {"metric": metric}, "evaluate": {"sampling": {"max_tokens": max_tokens}}}
        return [trial.trial_id for trial in plan(tmp_path / metric / str(max_tokens), **fields).trials]

    assert ids("loss", 64) == ids("loss", 65)
    assert not set(ids("accuracy", 64)) & set(ids("accuracy", 65))


def test_failed_trial_without_sweep_is_pending(tmp_path: Path):
    trial, *_ = plan(tmp_path, sweep=None).trials
    write_trial_status(trial, FAILED, "out of memory")
    assert trial.trial_id in {each.trial_id for each in plan(tmp_path, sweep=None).pending_trials()}


def test_selected_trials_are_the_best_points_of_each_arm(tmp_path: Path):
    some = plan(tmp_path, seeds=[0, 1], sweep=TREE["sweep"] | {"test_top_n": 1})
    by_arm: dict[str, dict[str, list[TrialSpec]]] = {}
    for trial in some.trials:
        by_arm.setdefault(trial.arm_name, {}).setdefault(trial.config_id, []).append(trial)
    for of_arm in by_arm.values():
        steady, lucky, halved, failed = of_arm.values()
        for trial, reached in zip([*steady, *lucky], (0.6, 0.6, 0.9, 0.2), strict=True):
            measured(trial, 0.0, reached)
        # Of two seeds one was stopped: what is left is no match for points that both seeds came through.
        measured(halved[0], 0.0, 0.95)
        measured(halved[1], 0.0, status=STOPPED)
        for trial in failed:
            measured(trial, 0.99, status=FAILED)
    chosen = {trial.config_id for trial in selection.selected_trials(some.trials, some.experiment.sweep)}
    assert chosen == {next(iter(of_arm)) for of_arm in by_arm.values()}
    assert len(some.eval_models()) == 1 + 2 * 2
    everyone = selection.selected_trials(some.trials, Sweep())
    assert len(everyone) == 2 * 5


def test_completion_sets_cover_all_points(tmp_path: Path):
    space = {
        "prompt.strategy": {"grid": ["teacher", "confidence"]},
        "targets.top_k": {"grid": [4, 8]},
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    }
    arms = {"soft": {"targets.kind": "top_k"}, "hard": {}}
    some = plan(tmp_path, arms=arms, sweep={"space": space, "num_samples": 3})
    assert len(some.trials) == 3 * 4 + 3 * 2
    assert [(each.strategy_name, each.top_k) for each in some.required_sets] == [
        ("teacher", 8),
        ("confidence", 8),
    ]
    assert {trial.completions for trial in some.trials} == {each.folder for each in some.required_sets}
    assert [usage.arms for usage in some.teacher_usages] == [["soft", "hard"], ["soft", "hard"]]


def test_tied_points_are_selected_and_reported_alike(tmp_path: Path):
    rates = {"train.learning_rate": {"grid": [0.001 * number for number in range(1, 13)]}}
    some = plan(tmp_path, sweep={"space": rates, "num_samples": 1, "test_top_n": 1})
    for trial in some.trials:
        measured(trial, 0.2, 0.5)
    chosen = [trial.trial_id for trial in selection.selected_trials(some.trials, some.experiment.sweep)]
    best = {trial.trial_id for arm in read_results(some.folder).arms for trial in arm.trials}
    assert len(chosen) == 2 and best == set(chosen)


def test_points_with_close_values_stay_separate(tmp_path: Path):
    rates = {"train.learning_rate": {"grid": [0.00100001, 0.00100002, 0.00100003]}}
    some = plan(tmp_path, sweep={"space": rates, "num_samples": 1})
    for trial in some.trials:
        measured(trial, 0.2, 0.5)
    results = read_results(some.folder)
    assert [len(arm.trials) for arm in results.arms] == [1, 1]
    assert {row[3] for row in best_points(results).rows} == {"3"}


def test_stopped_trial_is_pending_without_a_scheduler(tmp_path: Path):
    trial, *_ = plan(tmp_path).trials
    measured(trial, 0.1, status=STOPPED)
    assert trial.trial_id not in {each.trial_id for each in plan(tmp_path).pending_trials()}
    unstopped = TREE["sweep"] | {"scheduler": "none"}
    assert trial.trial_id in {each.trial_id for each in plan(tmp_path, sweep=unstopped).pending_trials()}


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_diverged_trial_is_stopped(scheduler: str):
    sweep = Sweep.model_validate({"scheduler": scheduler, "metric": "loss"})
    reached = {"a0": [2.0, 1.5, 1.2, 1.0], "a1": [1.9, float("nan"), float("nan")]}
    assert stopped(sweep, reached) == {"a1": 2}


def test_searched_strategy_does_not_make_an_arm_the_baseline(tmp_path: Path):
    """The strategy of an arm's last trial has no effect."""
    space = {"prompt.strategy": {"grid": ["none", "teacher", "confidence"]}}
    arms = {"hard": {}, "soft": {"targets.kind": "top_k"}}
    some = plan(tmp_path, arms=arms, sweep={"space": space, "num_samples": 1})
    for number in range(3):
        for trial in some.trials:
            good = trial.hparams["prompt.strategy"] == ("none", "teacher", "confidence")[number]
            measured(trial, 0.1, 0.9 if good else 0.2)
        kinds = {arm.name: arm.kind for arm in read_results(some.folder).arms}
        assert kinds["hard"] == "baseline" and kinds["soft"] != "baseline"


def test_search_without_points_has_nothing_to_report(tmp_path: Path):
    some = plan(tmp_path)
    for trial in some.trials:
        measured(trial, 0.2, 0.5)
    searched = plan(tmp_path, sweep=TREE["sweep"] | {"search": "optuna", "metric": "loss"})
    with pytest.raises(ValueError, match="nothing to report yet"):
        read_results(searched.folder)
