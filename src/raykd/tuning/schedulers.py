"""Early stopping that compares a trial with trials of its own arm only."""

import math
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from raykd.config.sections import Sweep

# The number of the validation, which schedulers use as time. Tune flattens the names of reported dictionaries.
TIME_ATTR = "validation/number"


class PerArmScheduler(FIFOScheduler):
    """Stops trials early by comparing each with the trials of its own arm.

    A scheduler for all arms would stop the weaker arms, the unprimed baseline first, and leave nothing to compare the
    other arms with.

    Args:
        sweep: the section `sweep`, which names the scheduler.
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._by_arm: dict[str, FIFOScheduler] = {}

    def _scheduler_of(self, trial: Any) -> Any:
        arm = trial.config["arm"]
        if arm not in self._by_arm:
            self._by_arm[arm] = _build_scheduler(self._sweep)
        return self._by_arm[arm]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler_of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler_of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._scheduler_of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._scheduler_of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler_of(trial).on_trial_remove(tune_controller, trial)


def _build_scheduler(sweep: Sweep) -> FIFOScheduler:
    metric = f"validation/{sweep.metric}"
    if sweep.scheduler == "asha":
        return ASHAScheduler(
            time_attr=TIME_ATTR,
            metric=metric,
            mode=sweep.mode,
            # The last validation takes place at a trial's end, where stopping it saves nothing.
            max_t=sweep.num_validations - 1,
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,
        )
    if sweep.scheduler == "median":
        return MedianStoppingRule(
            time_attr=TIME_ATTR,
            metric=metric,
            mode=sweep.mode,
            # Else Tune pauses a trial that it cannot compare yet, and a paused trial loses its workers.
            min_time_slice=math.inf,  # pyright: ignore[reportArgumentType]
            grace_period=1,
            min_samples_required=2,
        )
    return FIFOScheduler()
