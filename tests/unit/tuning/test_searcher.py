"""A search that is told what earlier points reached: what it draws, notes, and draws again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from raykd.config.experiment import Experiment
from raykd.pipeline.plan import Plan
from raykd.storage import files, row_store
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED
from raykd.training.trial import TrialSpec, write_trial_status
from raykd.tuning.searcher import ArmSearch, TrialSearcher
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


def studies(plan: Plan) -> dict[str, ArmSearch]:
    sweep, pending = plan.experiment.sweep, {job.trial_id for job in plan.pending}
    assert sweep and plan.pending_search
    make = plan.pending_search.make
    return {name: ArmSearch(name, sweep, plan.folder, make, pending) for name in plan.experiment.arms}


def trained(job: TrialSpec, loss: float, status: str = COMPLETE) -> float:
    """Writes what a trial came to."""
    point = {"step": 5, "loss": 1.0, "validation": {"number": 4, "n": 10, "loss": loss}}
    files.write_text(job.folder / "metrics.jsonl", json.dumps(point) + "\n")
    write_trial_status(job, status, "out of memory" if status == FAILED else "")
    return loss


def away(job: TrialSpec) -> float:
    """A loss that is least at the best learning rate."""
    return abs(math.log10(job.hparams["train.learning_rate"] / BEST))


@pytest.mark.parametrize(("metric", "least", "most"), [("loss", 0.0, 0.8), ("accuracy", 1.6, 3.0)])
def test_what_was_reached_draws_the_search_to_where_it_is_good(metric: str, least: float, most: float, tmp_path: Path):
    study = studies(plan(tmp_path, num_samples=40, metric=metric))["none"]
    found = []
    for _ in range(40):
        jobs = study.draw()
        assert [job.seed for job in jobs] == [0, 1]
        found.append(away(jobs[0]))
        for job in jobs:
            study.tell(job, away(job))
    assert study.num_open == 0
    # At random they are 1.3 decades away in the mean.
    assert least < sum(found[20:]) / 20 < most


def test_a_search_goes_on_where_it_was_broken_off(tmp_path: Path):
    begun = studies(plan(tmp_path, num_samples=4))
    first, second = begun["none"].draw(), begun["none"].draw()
    for job in first:
        trained(job, away(job))
    trained(second[0], away(second[0]))
    again = plan(tmp_path, num_samples=4)
    assert {job.trial_id for job in again.jobs} == {job.trial_id for job in [*first, *second]}
    assert [job.trial_id for job in again.pending] == [second[1].trial_id]
    assert again.pending_search and again.pending_search.num_trials == 2 * (2 + 4)
    study = studies(again)["none"]
    states = [(trial.state.name, trial.params, trial.value) for trial in study._optuna._ot_study.trials]
    # The point under way is told at its end, with what its other seed had reached before.
    assert sorted(states, key=str) == [
        ("COMPLETE", first[0].hparams, pytest.approx(away(first[0]))),
        ("RUNNING", second[0].hparams, None),
    ]
    study.tell(second[1], 7.0)
    told = [trial.value for trial in study._optuna._ot_study.trials if trial.params == second[0].hparams]
    assert told == [pytest.approx((7.0 + away(second[0])) / 2)]
    third = study.draw()
    assert third[0].hparams not in (first[0].hparams, second[0].hparams)
    assert [len(each) for each in (study.draw(), begun["soft"].draw())] == [2, 2]
    over = plan(tmp_path, num_samples=2)
    assert {job.trial_id for job in over.jobs if job.arm_name == "none"} == {job.trial_id for job in [*first, *second]}


def test_another_search_has_points_of_its_own(tmp_path: Path):
    studies(plan(tmp_path))["none"].draw()
    assert len(plan(tmp_path, num_samples=20, test_top_n=1).jobs) == 2
    assert plan(tmp_path, seed=1).jobs == []
    assert plan(tmp_path, space={"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}).jobs == []


def test_a_point_that_is_drawn_again_is_not_trained_again(tmp_path: Path):
    # Lists and null are no categories of Optuna's own.
    space = {"student.lora.target_modules": {"choice": [["q_proj"], ["q_proj", "v_proj"]]}}
    some = plan(tmp_path, space, num_samples=6)
    study = studies(some)["none"]
    drawn = [study.draw() for _ in range(6)]
    new = [jobs for jobs in drawn if jobs]
    assert sorted(jobs[0].arm.student.lora.target_modules for jobs in new) == [("q_proj",), ("q_proj", "v_proj")]
    for jobs in new:
        for job in jobs:
            study.tell(job, trained(job, 0.25))
    assert [(trial.state.name, trial.value) for trial in study._optuna._ot_study.trials] == [("COMPLETE", 0.25)] * 6
    assert len(plan(tmp_path, space, num_samples=6).jobs) == 4


def test_a_seed_that_failed_is_not_counted_and_a_point_that_failed_is_told_so(tmp_path: Path):
    some = plan(tmp_path, num_samples=3)
    study = studies(some)["none"]
    half, whole = study.draw(), study.draw()
    study.tell(half[0], trained(half[0], 0.5))
    for job in (half[1], *whole):
        trained(job, 0.1, FAILED)
        study.tell(job, None)
    for each in (study, studies(plan(tmp_path, num_samples=3))["none"]):
        trials = each._optuna._ot_study.trials
        assert sorted((trial.state.name, trial.value) for trial in trials) == [("COMPLETE", 0.5), ("FAIL", None)]
    # What is tried again is under way again.
    trials = studies(plan(tmp_path, num_samples=3, retry_failed=True))["none"]._optuna._ot_study.trials
    assert [trial.state.name for trial in trials] == ["RUNNING", "RUNNING"]


def test_a_point_that_no_arm_can_be_at_is_passed_over(tmp_path: Path):
    # Each goes with the first of the others: renormalised at any temperature, one bucket at 1.
    space = {
        "loss.missing_mass": {"choice": ["renormalize", "bucket"]},
        "loss.temperature": {"choice": [1.0, 2.0, 4.0]},
        **RATES,
    }
    study = studies(plan(tmp_path, space, num_samples=8))["soft"]
    drawn = [study.draw() for _ in range(8)]
    states = [trial.state.name for trial in study._optuna._ot_study.trials]
    assert "FAIL" in states, "none of them was drawn: the test shows nothing"
    assert all(
        jobs[0].arm.loss.missing_mass == "renormalize" or jobs[0].arm.loss.temperature == 1 for jobs in drawn if jobs
    )
    assert len(plan(tmp_path, space, num_samples=8).jobs) == 2 * len({jobs[0].config_id for jobs in drawn if jobs})


def test_a_trial_that_diverged_does_not_end_the_search(tmp_path: Path):
    study = studies(plan(tmp_path, num_samples=3))["none"]
    for job in study.draw():
        study.tell(job, trained(job, math.nan, STOPPED))
    again = studies(plan(tmp_path, num_samples=3))["none"]
    for each in (study, again):
        assert [trial.state.name for trial in each._optuna._ot_study.trials] == ["FAIL"]


def test_tune_is_handed_what_is_known_and_then_new_points_arm_by_arm(tmp_path: Path):
    some = plan(tmp_path, num_samples=2)
    known = studies(some)["soft"].draw()
    some = plan(tmp_path, num_samples=2)
    jobs = {job.trial_id: job for job in some.pending}
    room = 0
    search = TrialSearcher(some.pending, jobs, lambda left: room, list(studies(some).values()))
    assert search.suggest("0") is None
    room = 1
    handed = []
    while (config := search.suggest(str(len(handed)))) != Searcher.FINISHED:
        assert config and search.suggest("not yet") in (None, Searcher.FINISHED)
        handed.append(config)
        trained(jobs[config["trial_id"]], 0.5)
        search.on_trial_complete(str(len(handed) - 1), {"loss": 0.1})
    room = 0
    assert search.suggest("none is left") == Searcher.FINISHED, "a cluster that shrank is not waited for"
    assert [each["trial_id"] for each in handed[:2]] == [job.trial_id for job in known]
    assert [each["arm"] for each in handed] == ["soft", "soft", "none", "none", "none", "none", "soft", "soft"]
    assert [each["seed"] for each in handed] == [0, 1] * 4
    assert all(1e-6 <= each["train.learning_rate"] <= 1e-1 for each in handed)
    over = plan(tmp_path, num_samples=2)
    assert over.pending_search is None and not over.pending and len(over.jobs) == 8


def test_no_more_room_is_asked_for_than_trials_are_left(tmp_path: Path):
    some = plan(tmp_path, num_samples=2)
    jobs = {job.trial_id: job for job in some.pending}
    told: list[float] = []

    def room(left: float) -> int:
        told.append(left)
        return 3

    search = TrialSearcher(studies(some)["soft"].draw() * 2, jobs, room)
    assert [bool(search.suggest(str(number))) for number in range(4)] == [True, True, True, False]
    for number in range(3):
        search.on_trial_complete(str(number), {"loss": 0.1})
    assert search.suggest("3") and search.suggest("4") == Searcher.FINISHED
    search.on_trial_complete("3", {"loss": 0.1})
    # It falls with the last ones, when there is nothing more to hand on, too.
    assert told == [4, 4, 4, 4, 3, 2, 1, 1]


def test_the_teacher_is_asked_beforehand_for_whatever_may_be_drawn(tmp_path: Path):
    space = {
        "prompt.strategy": {"choice": ["none", "teacher", "confidence"]},
        "targets.top_k": {"randint": [2, 5]},
        **RATES,
    }
    some = plan(tmp_path, space, num_samples=1)
    assert {(request.strategy_name, request.top_k) for request in some.requests} == {
        ("none", 4),
        ("teacher", 4),
        ("confidence", 4),
    }
    for request in some.requests:
        files.write_json(request.folder / row_store.MANIFEST, {"content": request.content})
    folders = {request.folder for request in some.requests}
    assert all(job.completions in folders for study in studies(some).values() for job in study.draw())


def test_an_arm_in_rounds_cannot_be_searched_by_results(tmp_path: Path):
    tree = TREE | {"arms": {"own": {"targets.source": "student"}}}
    with pytest.raises(ValueError, match=r"arm 'own' has targets\.source=student.*sweep\.search=random"):
        Experiment.model_validate(tree | {"sweep": {"search": "optuna", "scheduler": "none", "space": RATES}})
