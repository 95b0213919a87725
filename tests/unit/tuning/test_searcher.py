"""The search by Optuna: drawing points, resuming, repeated points, failures, and the order of trials."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from raykd.config.experiment import Experiment
from raykd.pipeline.plan import Plan
from raykd.storage import files, row_store
from raykd.storage.schemas import COMPLETE, FAILED
from raykd.training.trial import TrialSpec, write_trial_status
from raykd.tuning.searcher import ArmSearch, TrialSearcher
from raykd.tuning.trials import TrialRegistry
from runs import started_plan

BEST = 1e-3
TREE: dict[str, Any] = {
    "name": "searched",
    "dataset": {"source": "demo", "num_train": 20, "num_validation": 10, "num_test": 2},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {"none": {}, "soft": {"targets.kind": "top_k"}},
    "seeds": [0, 1],
}
RATES = {"train.learning_rate": {"loguniform": [1e-6, 1e-1]}}


def plan(folder: Path, space: dict[str, Any] = RATES, retry_failed: bool = False, **sweep: Any) -> Plan:
    tree = TREE | {"storage": str(folder), "sweep": {"search": "optuna", "metric": "loss", "space": space, **sweep}}
    return started_plan(Experiment.model_validate(tree), retry_failed)


def searches(plan: Plan) -> dict[str, ArmSearch]:
    sweep, pending = plan.experiment.sweep, {trial.trial_id for trial in plan.pending_trials()}
    assert sweep and plan.pending_search
    make = plan.pending_search.make_trials
    return {name: ArmSearch(name, sweep, plan.folder, make, pending) for name in plan.experiment.arms}


def write_result(trial: TrialSpec, loss: float | None, status: str = COMPLETE) -> float | None:
    """Write the result of a trial, and return its loss."""
    point: dict[str, Any] = {"step": 5, "loss": 1.0}
    if loss is not None:
        point["validation"] = {"number": 4, "n": 10, "loss": loss}
    files.write_text(trial.folder / "metrics.jsonl", json.dumps(point) + "\n")
    write_trial_status(trial, status, "out of memory" if status == FAILED else "")
    return loss


def decades_off(trial: TrialSpec) -> float:
    """Return a loss with its minimum at the best learning rate."""
    return abs(math.log10(trial.hparams["train.learning_rate"] / BEST))


@pytest.mark.parametrize(("metric", "least", "most"), [("loss", 0.0, 0.8), ("accuracy", 1.6, 3.0)])
def test_search_converges_to_the_best_learning_rate(metric: str, least: float, most: float, tmp_path: Path):
    search = searches(plan(tmp_path, num_samples=40, metric=metric))["none"]
    found = []
    for _ in range(40):
        trials = search.draw()
        assert [trial.seed for trial in trials] == [0, 1]
        found.append(decades_off(trials[0]))
        for trial in trials:
            search.record(trial, decades_off(trial))
    assert search.num_open == 0
    # Random draws are 1.3 decades away on average.
    assert least < sum(found[20:]) / 20 < most


def test_interrupted_search_resumes(tmp_path: Path):
    first_searches = searches(plan(tmp_path, num_samples=4))
    first, second = first_searches["none"].draw(), first_searches["none"].draw()
    for trial in first:
        write_result(trial, decades_off(trial))
    write_result(second[0], decades_off(second[0]))
    again = plan(tmp_path, num_samples=4)
    assert {trial.trial_id for trial in again.trials} == {trial.trial_id for trial in [*first, *second]}
    assert [trial.trial_id for trial in again.pending_trials()] == [second[1].trial_id]
    assert again.pending_search and again.pending_search.num_trials == 2 * (2 + 4)
    search = searches(again)["none"]
    states = [(trial.state.name, trial.params, trial.value) for trial in search._optuna._ot_study.trials]
    # A point is reported when its last seed ends, with the mean over its seeds.
    assert sorted(states, key=str) == [
        ("COMPLETE", first[0].hparams, pytest.approx(decades_off(first[0]))),
        ("RUNNING", second[0].hparams, None),
    ]
    search.record(second[1], 7.0)
    values = [trial.value for trial in search._optuna._ot_study.trials if trial.params == second[0].hparams]
    assert values == [pytest.approx((7.0 + decades_off(second[0])) / 2)]
    third = search.draw()
    assert third[0].hparams not in (first[0].hparams, second[0].hparams)
    assert [len(each) for each in (search.draw(), first_searches["soft"].draw())] == [2, 2]
    smaller = plan(tmp_path, num_samples=2)
    assert {trial.trial_id for trial in smaller.trials if trial.arm_name == "none"} == {
        trial.trial_id for trial in [*first, *second]
    }


def test_changed_search_settings_start_a_new_search(tmp_path: Path):
    searches(plan(tmp_path))["none"].draw()
    assert len(plan(tmp_path, num_samples=20, test_top_n=1).trials) == 2
    assert plan(tmp_path, seed=1).trials == []
    assert plan(tmp_path, space={"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}).trials == []


def test_repeated_point_is_not_trained_again(tmp_path: Path):
    # Optuna has no categories that are lists or null.
    space = {"student.lora.target_modules": {"choice": [["q_proj"], ["q_proj", "v_proj"]]}}
    search_plan = plan(tmp_path, space, num_samples=6)
    search = searches(search_plan)["none"]
    drawn = [search.draw() for _ in range(6)]
    new = [trials for trials in drawn if trials]
    assert sorted(trials[0].arm.student.lora.target_modules for trials in new) == [("q_proj",), ("q_proj", "v_proj")]
    for trials in new:
        for trial in trials:
            search.record(trial, write_result(trial, 0.25))
    assert [(trial.state.name, trial.value) for trial in search._optuna._ot_study.trials] == [("COMPLETE", 0.25)] * 6
    assert len(plan(tmp_path, space, num_samples=6).trials) == 4


def test_failed_seeds_are_excluded_from_the_mean(tmp_path: Path):
    search_plan = plan(tmp_path, num_samples=3)
    search = searches(search_plan)["none"]
    one_failed, both_failed = search.draw(), search.draw()
    search.record(one_failed[0], write_result(one_failed[0], 0.5))
    for trial in (one_failed[1], *both_failed):
        write_result(trial, 0.1, FAILED)
        search.record(trial, None)
    for each in (search, searches(plan(tmp_path, num_samples=3))["none"]):
        trials = each._optuna._ot_study.trials
        assert sorted((trial.state.name, trial.value) for trial in trials) == [("COMPLETE", 0.5), ("FAIL", None)]
    # Failed trials that are retried are running again.
    trials = searches(plan(tmp_path, num_samples=3, retry_failed=True))["none"]._optuna._ot_study.trials
    assert [trial.state.name for trial in trials] == ["RUNNING", "RUNNING"]


def test_invalid_points_are_skipped(tmp_path: Path):
    # `renormalize` is valid at any temperature, `bucket` only at 1.
    space = {
        "loss.missing_mass": {"choice": ["renormalize", "bucket"]},
        "loss.temperature": {"choice": [1.0, 2.0, 4.0]},
        **RATES,
    }
    search = searches(plan(tmp_path, space, num_samples=8))["soft"]
    drawn = [search.draw() for _ in range(8)]
    states = [trial.state.name for trial in search._optuna._ot_study.trials]
    assert "FAIL" in states, "no invalid point was drawn"
    assert all(
        trials[0].arm.loss.missing_mass == "renormalize" or trials[0].arm.loss.temperature == 1
        for trials in drawn
        if trials
    )
    assert len(plan(tmp_path, space, num_samples=8).trials) == 2 * len(
        {trials[0].config_id for trials in drawn if trials}
    )


def test_failed_trial_does_not_end_the_search(tmp_path: Path):
    search = searches(plan(tmp_path, num_samples=3))["none"]
    for trial in search.draw():
        search.record(trial, write_result(trial, None, FAILED))
    again = searches(plan(tmp_path, num_samples=3))["none"]
    for each in (search, again):
        assert [trial.state.name for trial in each._optuna._ot_study.trials] == ["FAIL"]


def test_known_trials_come_first_then_new_points_of_each_arm(tmp_path: Path):
    search_plan = plan(tmp_path, num_samples=2)
    known = searches(search_plan)["soft"].draw()
    search_plan = plan(tmp_path, num_samples=2)
    registry = TrialRegistry(search_plan.pending_trials())
    num_slots = 0
    searcher = TrialSearcher(
        search_plan.pending_trials(), registry, lambda num_unfinished: num_slots, list(searches(search_plan).values())
    )
    assert searcher.suggest("0") is None
    num_slots = 1
    suggested = []
    while (config := searcher.suggest(str(len(suggested)))) != Searcher.FINISHED:
        assert config and searcher.suggest("not yet") in (None, Searcher.FINISHED)
        suggested.append(config)
        write_result(registry[config["trial_id"]], 0.5)
        searcher.on_trial_complete(str(len(suggested) - 1), {"loss": 0.1})
    num_slots = 0
    assert searcher.suggest("none is left") == Searcher.FINISHED, "a finished search must not wait for slots"
    assert [each["trial_id"] for each in suggested[:2]] == [trial.trial_id for trial in known]
    assert [each["arm"] for each in suggested] == ["soft", "soft", "none", "none", "none", "none", "soft", "soft"]
    assert [each["seed"] for each in suggested] == [0, 1] * 4
    assert all(1e-6 <= each["train.learning_rate"] <= 1e-1 for each in suggested)
    finished = plan(tmp_path, num_samples=2)
    assert finished.pending_search is None and not finished.pending_trials() and len(finished.trials) == 8


def test_slots_are_requested_for_unfinished_trials_only(tmp_path: Path):
    search_plan = plan(tmp_path, num_samples=2)
    registry = TrialRegistry(search_plan.pending_trials())
    requested: list[float] = []

    def update_slots(num_unfinished: float) -> int:
        requested.append(num_unfinished)
        return 3

    searcher = TrialSearcher(searches(search_plan)["soft"].draw() * 2, registry, update_slots)
    assert [bool(searcher.suggest(str(number))) for number in range(4)] == [True, True, True, False]
    for number in range(3):
        searcher.on_trial_complete(str(number), {"loss": 0.1})
    assert searcher.suggest("3") and searcher.suggest("4") == Searcher.FINISHED
    searcher.on_trial_complete("3", {"loss": 0.1})
    # The request shrinks with the last trials, although the queue is empty by then.
    assert requested == [4, 4, 4, 4, 3, 2, 1, 1]


def test_completion_sets_cover_every_point_of_the_search(tmp_path: Path):
    space = {
        "prompt.strategy": {"choice": ["none", "teacher", "confidence"]},
        "targets.top_k": {"randint": [2, 5]},
        **RATES,
    }
    search_plan = plan(tmp_path, space, num_samples=1)
    assert {(each.strategy_name, each.top_k) for each in search_plan.required_sets} == {
        ("none", 4),
        ("teacher", 4),
        ("confidence", 4),
    }
    for each in search_plan.required_sets:
        files.write_json(each.folder / row_store.MANIFEST, {"content": each.content})
    folders = {each.folder for each in search_plan.required_sets}
    assert all(trial.completions in folders for search in searches(search_plan).values() for trial in search.draw())


def test_on_policy_arm_cannot_be_searched_with_optuna(tmp_path: Path):
    tree = TREE | {"arms": {"own": {"targets.source": "student"}}}
    with pytest.raises(ValueError, match=r"arm 'own' has targets\.source=student.*sweep\.search=random"):
        Experiment.model_validate(tree | {"sweep": {"search": "optuna", "scheduler": "none", "space": RATES}})
