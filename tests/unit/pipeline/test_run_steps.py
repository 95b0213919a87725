"""Files that the steps of a run read and write, without engines."""

from pathlib import Path

from raykd.config.experiment import Experiment
from raykd.pipeline import run
from raykd.storage.paths import ExperimentPaths, split_file
from runs import started_plan


def test_recording_results_before_evaluation_reads_no_test_problem(tmp_path: Path):
    experiment = {
        "name": "small",
        "storage": str(tmp_path),
        "dataset": {"source": "demo", "num_train": 8, "num_test": 4},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
    }
    plan = started_plan(Experiment.model_validate(experiment))
    split_file(plan.problems, "test").unlink()
    run.record_results(plan)
    assert not ExperimentPaths(plan.folder).lm_eval.exists()
