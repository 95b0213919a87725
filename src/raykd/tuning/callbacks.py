"""Ray Tune callback that records the final status of each trial."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError

from raykd import errors
from raykd.errors import StageError
from raykd.runtime.console import print_status
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED
from raykd.training.trial import TrialSpec, has_adapter, last_validation_metric, trial_status, write_trial_status


class RecordTrialStatus(tune.Callback):
    """Records how a trial ends, as it ends."""

    def __init__(self, jobs: Mapping[str, TrialSpec], folder: Path) -> None:
        self._jobs, self._folder = jobs, folder

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._jobs.get(trial.config["trial_id"])
        if job is None:
            return
        last = last_validation_metric(job)
        if has_adapter(job):
            pass
        elif last is not None and math.isnan(last):
            write_trial_status(job, FAILED, "it diverged: its validation loss is not a number")
        elif job.sweep is not None and job.sweep.scheduler != "none":
            write_trial_status(job, STOPPED)
        else:
            # It should not.
            write_trial_status(job, FAILED, "ended without an adapter")
        remove_checkpoints(job, self._folder)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._jobs.get(trial.config["trial_id"])
        if job is None or has_adapter(job):
            return
        if isinstance(_trial_error(trial), RayActorError):
            # Its node is gone, with the process that watched over it: the same command goes on with it.
            print_status(f"lost {job.trial_id} with its node; the same command goes on with it")
        else:
            # Tune has not brought it to the storage yet, where `trial.get_error` looks for it.
            text = Path(trial.error_file).read_text().strip()
            if errors.os_error_message(text):
                # The next would fail as well, and this one has done no wrong.
                raise StageError(f"{job.trial_id}: {errors.os_error_message(text)}")
            write_trial_status(job, FAILED, str(errors.error_in_traceback(text) or text.splitlines()[-1]))


def _trial_error(trial: Any) -> Exception | None:
    """What ended a trial, as Tune was told."""
    file = Path(trial.pickled_error_file or "")
    return cloudpickle.loads(file.read_bytes()) if file.is_file() else None


def remove_checkpoints(job: TrialSpec, folder: Path) -> None:
    """Removes the optimizer's state of a trial that has come to its end, but for a round to come."""
    if job.output_dir == job.folder and trial_status(job) in (COMPLETE, STOPPED):
        filesystem.remove(ExperimentPaths(folder).checkpoints / job.trial_id, ignore_errors=True)
