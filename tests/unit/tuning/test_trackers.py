"""Experiment trackers: their selection, and the trials that they log."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from ray import tune

from raykd.storage import filesystem
from raykd.training.trial import TrialSpec
from raykd.tuning import trackers


@dataclass
class Trial:
    config: dict[str, str]


class RecordedEvents(tune.Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.events.append(("start", trial.config["trial_id"]))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.events.append(("result", trial.config["trial_id"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.events.append(("complete", trial.config["trial_id"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.events.append(("error", trial.config["trial_id"]))


def test_replayed_trials_are_not_logged_again():
    recorded, trials = RecordedEvents(), {"new": cast(TrialSpec, None)}
    forwarding = trackers.OnlyTrials(recorded, trials)
    for name in ("new", "earlier"):
        trial = Trial({"trial_id": name})
        forwarding.on_trial_start(1, [], trial)
        forwarding.on_trial_result(1, [], trial, {"loss": 1})
        forwarding.on_trial_complete(1, [], trial)
        forwarding.on_trial_error(1, [], trial)
    assert recorded.events == [(event, "new") for event in ("start", "result", "complete", "error")]


def test_missing_tracker_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch):
    trackers.check_tracker(None, Path("mine"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking=mlflow.*pip install mlflow"):
        trackers.check_tracker("mlflow", Path("mine"))


def test_tensorboard_is_always_used(tmp_path: Path):
    names = [type(each._inner).__name__ for each in trackers.tracker_callbacks(None, tmp_path, {})]
    assert names == ["JsonLoggerCallback", "TBXLoggerCallback"]


@pytest.mark.parametrize(("tracker", "server"), [("mlflow", "MLFLOW_TRACKING_URI"), ("wandb", "WANDB_API_KEY")])
def test_local_tracker_files_are_refused_in_a_bucket(
    tracker: Any, server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(server, raising=False)
    with pytest.raises(ValueError, match=f"is in a bucket: set {server}"):
        trackers.check_tracker(tracker, filesystem.resolve(f"{bucket}/mine"))
