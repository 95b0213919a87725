"""Early stopping: the trials of a sweep that each scheduler stops."""

from dataclasses import dataclass

import pytest
from ray.tune.schedulers import TrialScheduler

from raykd.config.sections import Sweep
from raykd.tuning import schedulers


@dataclass(eq=False)
class Trial:
    """A Tune trial with the attributes that schedulers read."""

    trial_id: str
    config: dict[str, str]


def stopping_validations(sweep: Sweep, metrics: dict[str, list[float]]) -> dict[str, int]:
    """Return the number of the validation that stops each trial; trials are validated in turns."""
    scheduler = schedulers.PerArmScheduler(sweep)
    trials = {name: Trial(name, {"trial_id": name, "arm": name[0]}) for name in metrics}
    found: dict[str, int] = {}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    for number in range(max(map(len, metrics.values()))):
        for name, trial in trials.items():
            if name not in found and number < len(metrics[name]):
                result = {"validation/number": number + 1, f"validation/{sweep.metric}": metrics[name][number]}
                if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                    found[name] = number + 1
    return found


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_trial_is_stopped_if_worse_than_others_of_its_arm(scheduler: str, metric: str):
    sweep = Sweep.model_validate({"scheduler": scheduler, "metric": metric})
    good = [[0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.9], [0.4, 0.6, 0.7, 0.9]]
    bad = [[0.01, 0.02, 0.02, 0.03], [0.01, 0.02, 0.03, 0.04], [0.0, 0.02, 0.03, 0.04]]
    metrics = {f"g{number}": each for number, each in enumerate(good)} | {"g9": [0.1, 0.1, 0.1, 0.1]}
    # The other arm is worse, but trials are compared only within an arm.
    metrics |= {f"b{number}": each for number, each in enumerate(bad)}
    if metric == "loss":
        metrics = {name: [1 - value for value in each] for name, each in metrics.items()}
    stopped = stopping_validations(sweep, metrics)
    assert "g9" in stopped and stopped["g9"] < 4
    assert {"b0", "b1"}.isdisjoint(stopped)


def test_no_trial_is_stopped_at_its_end_or_without_scheduler():
    metrics = {"a0": [0.9, 0.9], "a1": [0.9, 0.1], "a2": [0.9, 0.05]}
    assert stopping_validations(Sweep(num_validations=2), metrics) == {}
    metrics = {"a0": [0.9, 0.9], "a1": [0.1, 0.1]}
    assert stopping_validations(Sweep(num_validations=2), metrics) == {"a1": 1}
    assert stopping_validations(Sweep(num_validations=2, scheduler="none"), metrics) == {}
