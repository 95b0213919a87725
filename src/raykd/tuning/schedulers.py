"""Early stopping that compares a trial with trials of its own arm only."""

import math
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from raykd.config.sections import Sweep

# What a scheduler takes for time, as Tune flattens what a trial reports: how often it was measured.
TIME_ATTR = "validation/number"


class PerArmScheduler(FIFOScheduler):
    """Stops trials early by comparing each with those of its own arm.

    One scheduler for all would stop the arms that are worse, the one without a prime above all, and leave nothing to
    compare the others with.
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._by_arm: dict[str, FIFOScheduler] = {}

    def _of(self, trial: Any) -> Any:
        arm = trial.config["arm"]
        if arm not in self._by_arm:
            self._by_arm[arm] = _build_scheduler(self._sweep)
        return self._by_arm[arm]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if math.isnan(result.get(f"validation/{self._sweep.metric}", 0)):
            # It compares with nothing, and does not come back.
            return self.STOP
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


def _build_scheduler(sweep: Sweep) -> FIFOScheduler:
    told: dict[str, Any] = {
        "time_attr": TIME_ATTR,
        "metric": f"validation/{sweep.metric}",
        "mode": sweep.mode,
    }
    if sweep.scheduler == "asha":
        # What is measured at its end needs no stopping any more.
        max_t = sweep.num_validations - 1
        return ASHAScheduler(**told, max_t=max_t, reduction_factor=sweep.reduction_factor, stop_last_trials=False)
    if sweep.scheduler == "median":
        # It would rather pause a trial than judge it by too few, and what is paused loses its workers.
        told["min_time_slice"] = math.inf
        return MedianStoppingRule(**told, grace_period=1, min_samples_required=2)
    return FIFOScheduler()
