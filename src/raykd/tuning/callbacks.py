"""Ray Tune callback that records the final status of each trial."""

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
from raykd.training.trial import TrialSpec, has_adapter, trial_status, write_trial_status


class RecordTrialStatus(tune.Callback):
    """Records the status of each trial as it ends.

    Args:
        trials: the trials that this run trains, by id.
        folder: the experiment's folder.
    """

    def __init__(self, trials: Mapping[str, TrialSpec], folder: Path) -> None:
        self._trials, self._folder = trials, folder

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        spec = self._trials.get(trial.config["trial_id"])
        if spec is None:
            return
        if not has_adapter(spec):
            _record_early_end(spec)
        remove_checkpoints(spec, self._folder)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        spec = self._trials.get(trial.config["trial_id"])
        if spec is None or has_adapter(spec):
            return
        if isinstance(_trial_error(trial), RayActorError):
            # The node of the trial's driver is lost. Without a status the trial stays pending.
            print_status(f"lost {spec.trial_id} with its node; re-run to resume it")
            return
        # `trial.get_error` looks into the storage, where Tune has not copied the file yet.
        text = Path(trial.error_file).read_text().strip()
        if os_error := errors.os_error_message(text):
            # A full or read-only storage is no fault of this trial, and the next one would fail as well.
            raise StageError(f"{spec.trial_id}: {os_error}")
        write_trial_status(spec, FAILED, str(errors.error_in_traceback(text) or text.splitlines()[-1]))


def _record_early_end(spec: TrialSpec) -> None:
    """Record why a trial ended without an adapter."""
    if spec.sweep is not None and spec.sweep.scheduler != "none":
        write_trial_status(spec, STOPPED)
    else:
        # No known cause leads here.
        write_trial_status(spec, FAILED, "ended without an adapter")


def _trial_error(trial: Any) -> Exception | None:
    """Return the exception that ended a trial of Tune, if Tune has recorded one."""
    file = Path(trial.pickled_error_file or "")
    return cloudpickle.loads(file.read_bytes()) if file.is_file() else None


def remove_checkpoints(trial: TrialSpec, folder: Path) -> None:
    """Remove the training checkpoints of a finished trial; those of an on-policy round stay for the next round."""
    if trial.output_dir == trial.folder and trial_status(trial) in (COMPLETE, STOPPED):
        filesystem.remove(ExperimentPaths(folder).checkpoints / trial.trial_id, ignore_errors=True)
