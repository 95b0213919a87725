"""Selection of the trials that answer the test problems."""

from pathlib import Path

from raykd.config.sections import Sweep
from raykd.report.results import read_results
from raykd.storage.schemas import FAILED, STOPPED
from raykd.training.trial import TrialSpec
from raykd.tuning import selection
from sweep_plans import TREE, sweep_plan, write_validations


def test_selected_trials_are_the_best_points_of_each_arm(tmp_path: Path):
    some = sweep_plan(tmp_path, seeds=[0, 1], sweep=TREE["sweep"] | {"test_top_n": 1})
    by_arm: dict[str, dict[str, list[TrialSpec]]] = {}
    for trial in some.trials:
        by_arm.setdefault(trial.arm_name, {}).setdefault(trial.config_id, []).append(trial)
    for of_arm in by_arm.values():
        steady, lucky, halved, failed = of_arm.values()
        for trial, reached in zip([*steady, *lucky], (0.6, 0.6, 0.9, 0.2), strict=True):
            write_validations(trial, 0.0, reached)
        # Of two seeds one was stopped: what is left is no match for points that both seeds came through.
        write_validations(halved[0], 0.0, 0.95)
        write_validations(halved[1], 0.0, status=STOPPED)
        for trial in failed:
            write_validations(trial, 0.99, status=FAILED)
    chosen = {trial.config_id for trial in selection.selected_trials(some.trials, some.experiment.sweep)}
    assert chosen == {next(iter(of_arm)) for of_arm in by_arm.values()}
    assert len(some.eval_models()) == 1 + 2 * 2
    everyone = selection.selected_trials(some.trials, Sweep())
    assert len(everyone) == 2 * 5


def test_tied_points_are_selected_and_reported_alike(tmp_path: Path):
    rates = {"train.learning_rate": {"grid": [0.001 * number for number in range(1, 13)]}}
    some = sweep_plan(tmp_path, sweep={"space": rates, "num_samples": 1, "test_top_n": 1})
    for trial in some.trials:
        write_validations(trial, 0.2, 0.5)
    chosen = [trial.trial_id for trial in selection.selected_trials(some.trials, some.experiment.sweep)]
    best = {trial.trial_id for arm in read_results(some.folder).arms for trial in arm.trials}
    assert len(chosen) == 2 and best == set(chosen)
