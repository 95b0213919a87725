"""Who is told of trials, and of which."""

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


class Noted(tune.Callback):
    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.told.append(("start", trial.config["trial_id"]))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.told.append(("result", trial.config["trial_id"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.told.append(("complete", trial.config["trial_id"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.told.append(("error", trial.config["trial_id"]))


def test_what_is_only_told_again_is_not_tracked_again():
    noted, jobs = Noted(), {"new": cast(TrialSpec, None)}
    passed_on = trackers._WithTrialSpecs(noted, jobs)
    for name in ("new", "earlier"):
        trial = Trial({"trial_id": name})
        passed_on.on_trial_start(1, [], trial)
        passed_on.on_trial_result(1, [], trial, {"loss": 1})
        passed_on.on_trial_complete(1, [], trial)
        passed_on.on_trial_error(1, [], trial)
    assert noted.told == [(what, "new") for what in ("start", "result", "complete", "error")]


def test_what_is_not_installed_is_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch):
    trackers.check_tracker(None, Path("mine"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking=mlflow.*pip install mlflow"):
        trackers.check_tracker("mlflow", Path("mine"))


def test_tensorboard_is_always_told(tmp_path: Path):
    names = [type(each._inner).__name__ for each in trackers.tracker_callbacks(None, tmp_path, {})]
    assert names == ["JsonLoggerCallback", "TBXLoggerCallback"]


@pytest.mark.parametrize(("tracker", "server"), [("mlflow", "MLFLOW_TRACKING_URI"), ("wandb", "WANDB_API_KEY")])
def test_what_writes_files_bit_by_bit_is_refused_for_a_bucket(
    tracker: Any, server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(server, raising=False)
    with pytest.raises(ValueError, match=f"is in a bucket: set {server}"):
        trackers.check_tracker(tracker, filesystem.resolve(f"{bucket}/mine"))
