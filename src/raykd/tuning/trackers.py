"""Experiment trackers: the trials' curves in TensorBoard, and optionally in MLflow or Weights & Biases."""

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
    """Raise UserError if a tracker is not installed, or would write its files into a bucket.

    Args:
        tracker: the tracker to log to in addition to TensorBoard; None for none.
        folder: the experiment's folder.
    """
    server_variables = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_API_KEY"}
    if tracker and filesystem.is_remote(folder) and not os.environ.get(server_variables[tracker]):
        raise UserError(
            f"tracking={tracker}: without a server it writes local files, but {folder} is in a bucket: set "
            f"{server_variables[tracker]}, or remove tracking"
        )
    if tracker and importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracking={tracker}: {tracker} is not installed: pip install {tracker}, or remove tracking")


def tracker_callbacks(tracker: Tracker | None, folder: Path, trials: Mapping[str, TrialSpec]) -> list[tune.Callback]:
    """Return Tune's callbacks that log the trials.

    All logs stay below the experiment's folder unless MLFLOW_TRACKING_URI or WANDB_API_KEY names a server.

    Args:
        tracker: the tracker to log to in addition to TensorBoard; None for none.
        folder: the experiment's folder, whose name is the experiment's.
        trials: the trials to log, by id; replayed trials are not among them, as an earlier run logged them.
    """
    callbacks: list[tune.Callback] = [JsonLoggerCallback(), TBXLoggerCallback()]
    if tracker == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{ExperimentPaths(folder).mlflow_db}"
        callbacks.append(MLflowLoggerCallback(uri, experiment_name=folder.name))
    if tracker == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        local = filesystem.scratch(folder)
        local.mkdir(parents=True, exist_ok=True)
        # Ray's callback requires an API key unless WANDB_MODE is offline.
        mode = os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        project = os.environ.get("WANDB_PROJECT") or "raykd"
        callbacks.append(WandbLoggerCallback(project, group=folder.name, mode=mode, dir=str(local)))
    return [OnlyTrials(callback, trials) for callback in callbacks]


class OnlyTrials(tune.Callback):
    """Forwards the events of some trials to another callback.

    Args:
        inner: the callback that receives the events.
        trials: the trials whose events are forwarded, by id.
    """

    def __init__(self, inner: tune.Callback, trials: Mapping[str, TrialSpec]) -> None:
        self._inner, self._trials = inner, trials

    def setup(self, *args: Any, **info: Any) -> None:
        self._inner.setup(*args, **info)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._trials:
            self._inner.on_trial_start(iteration, trials, trial, **info)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if trial.config["trial_id"] in self._trials:
            self._inner.on_trial_result(iteration, trials, trial, result, **info)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._trials:
            self._inner.on_trial_complete(iteration, trials, trial, **info)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["trial_id"] in self._trials:
            self._inner.on_trial_error(iteration, trials, trial, **info)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._inner.on_experiment_end(trials, **info)
