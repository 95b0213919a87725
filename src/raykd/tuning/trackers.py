"""Tracking: the trials' curves for TensorBoard, and for MLflow or Weights & Biases where that is asked for."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback

from raykd.config.experiment import Tracker
from raykd.errors import UserError
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths
from raykd.training.trial import TrialSpec


def check_tracker(tracker: Tracker | None, folder: Path) -> None:
    """Raises UserError where what trials are to be told to is not installed, or would write into a bucket.

    Args:
        tracker: who is told.
        folder: the experiment's folder.
    """
    needed = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_API_KEY"}
    if tracker and filesystem.is_remote(folder) and not os.environ.get(needed[tracker]):
        raise UserError(
            f"tracking={tracker}: without a server it writes into a folder, and {folder} is in a bucket: set "
            f"{needed[tracker]}, or leave tracking out"
        )
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracking={tracker}: {tracker} is not installed: pip install {tracker}, or leave tracking out")


def tracker_callbacks(tracker: Tracker | None, folder: Path, jobs: Mapping[str, TrialSpec]) -> list[tune.Callback]:
    """What tells others of trials.

    Without a word of where to, all stays below the experiment's folder: nothing goes over the network unless
    MLFLOW_TRACKING_URI or WANDB_API_KEY says so.

    Args:
        tracker: who is told besides TensorBoard.
        folder: the experiment's folder, whose name is the experiment's.
        jobs: the trials that are told of, by id; those that only tell again what they reached were told before.
    """
    told: list[tune.Callback] = [JsonLoggerCallback(), TBXLoggerCallback()]
    if tracker == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{ExperimentPaths(folder).mlflow_db}"
        told.append(MLflowLoggerCallback(uri, experiment_name=folder.name))
    if tracker == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        local = filesystem.scratch(folder)
        local.mkdir(parents=True, exist_ok=True)
        # Ray asks for a key unless the environment says that it needs none.
        mode = os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        project = os.environ.get("WANDB_PROJECT") or "raykd"
        told.append(WandbLoggerCallback(project, group=folder.name, mode=mode, dir=str(local)))
    return [_WithTrialSpecs(each, jobs) for each in told]


class _WithTrialSpecs(tune.Callback):
    """Passes on what concerns some trials."""

    def __init__(self, inner: tune.Callback, jobs: Mapping[str, TrialSpec]) -> None:
        self._inner, self._jobs = inner, jobs

    def setup(self, *told: Any, **info: Any) -> None:
        self._inner.setup(*told, **info)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._jobs:
            self._inner.on_trial_start(iteration, trials, trial, **info)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if trial.config["trial_id"] in self._jobs:
            self._inner.on_trial_result(iteration, trials, trial, result, **info)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._jobs:
            self._inner.on_trial_complete(iteration, trials, trial, **info)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._jobs:
            self._inner.on_trial_error(iteration, trials, trial, **info)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._inner.on_experiment_end(trials, **info)
