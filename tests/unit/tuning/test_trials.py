"""Trials of a sweep: their ids, and those that are pending after a repeated command."""

from pathlib import Path

from raykd.storage import files
from raykd.storage.schemas import FAILED, STOPPED
from raykd.training.trial import write_trial_status
from sweep_plans import TREE, sweep_plan, write_validations


def test_ended_trials_are_not_pending(tmp_path: Path):
    first, second, third, *_ = trials = sweep_plan(tmp_path).trials
    write_validations(first, 0.5, 0.6)
    write_validations(second, 0.1, status=STOPPED)
    write_validations(third, 0.2, status=FAILED)
    assert [trial.trial_id for trial in sweep_plan(tmp_path).pending_trials()] == [
        trial.trial_id for trial in trials[3:]
    ]
    retried = sweep_plan(tmp_path, retry_failed=True).pending_trials()
    assert [trial.trial_id for trial in retried] == [third.trial_id, *(trial.trial_id for trial in trials[3:])]
    record = files.read_json(third.folder / "trial.json")
    assert (record["status"], record["error"], record["adapter"]) == (FAILED, "out of memory", None)
    assert record["validation"] == {"number": 1, "n": 10, "correct": 2.0, "accuracy": 0.2}
    assert list(record["hparams"]) == ["train.learning_rate"]


def test_max_tokens_changes_trial_ids_only_with_accuracy_metric(tmp_path: Path):
    def ids(metric: str, max_tokens: int) -> list[str]:
        fields = {"sweep": TREE["sweep"] | {"metric": metric}, "evaluate": {"sampling": {"max_tokens": max_tokens}}}
        return [trial.trial_id for trial in sweep_plan(tmp_path / metric / str(max_tokens), **fields).trials]

    assert ids("loss", 64) == ids("loss", 65)
    assert not set(ids("accuracy", 64)) & set(ids("accuracy", 65))


def test_failed_trial_without_sweep_is_pending(tmp_path: Path):
    trial, *_ = sweep_plan(tmp_path, sweep=None).trials
    write_trial_status(trial, FAILED, "out of memory")
    assert trial.trial_id in {each.trial_id for each in sweep_plan(tmp_path, sweep=None).pending_trials()}


def test_stopped_trial_is_pending_without_a_scheduler(tmp_path: Path):
    trial, *_ = sweep_plan(tmp_path).trials
    write_validations(trial, 0.1, status=STOPPED)
    assert trial.trial_id not in {each.trial_id for each in sweep_plan(tmp_path).pending_trials()}
    without_scheduler = TREE["sweep"] | {"scheduler": "none"}
    assert trial.trial_id in {each.trial_id for each in sweep_plan(tmp_path, sweep=without_scheduler).pending_trials()}
