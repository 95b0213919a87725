"""Selection of the trials that answer the test problems."""

from pathlib import Path

from raykd.config.sections import Sweep
from raykd.report.results import read_results
from raykd.storage.schemas import FAILED, STOPPED
from raykd.training.trial import TrialSpec
from raykd.tuning import selection
from sweep_plans import TREE, sweep_plan, write_validations


def test_selected_trials_are_the_best_points_of_each_arm(tmp_path: Path):
    plan = sweep_plan(tmp_path, seeds=[0, 1], sweep=TREE["sweep"] | {"test_top_n": 1})
    by_arm: dict[str, dict[str, list[TrialSpec]]] = {}
    for trial in plan.trials:
        by_arm.setdefault(trial.arm_name, {}).setdefault(trial.config_id, []).append(trial)
    for points in by_arm.values():
        best, uneven, half_stopped, failed = points.values()
        for trial, accuracy in zip([*best, *uneven], (0.6, 0.6, 0.9, 0.2), strict=True):
            write_validations(trial, 0.0, accuracy)
        # A point with a stopped seed ranks below points whose seeds all completed.
        write_validations(half_stopped[0], 0.0, 0.95)
        write_validations(half_stopped[1], 0.0, status=STOPPED)
        for trial in failed:
            write_validations(trial, 0.99, status=FAILED)
    selected = {trial.config_id for trial in selection.selected_trials(plan.trials, plan.experiment.sweep)}
    assert selected == {next(iter(points)) for points in by_arm.values()}
    assert len(plan.eval_models()) == 1 + 2 * 2
    unlimited = selection.selected_trials(plan.trials, Sweep())
    assert len(unlimited) == 2 * 5


def test_tied_points_are_selected_and_reported_alike(tmp_path: Path):
    rates = {"train.learning_rate": {"grid": [0.001 * number for number in range(1, 13)]}}
    plan = sweep_plan(tmp_path, sweep={"space": rates, "num_samples": 1, "test_top_n": 1})
    for trial in plan.trials:
        write_validations(trial, 0.2, 0.5)
    selected = [trial.trial_id for trial in selection.selected_trials(plan.trials, plan.experiment.sweep)]
    best = {trial.trial_id for arm in read_results(plan.folder).arms for trial in arm.trials}
    assert len(selected) == 2 and best == set(selected)
