"""Plans of a small sweep, and the validation results of its trials, without training."""

import json
from pathlib import Path
from typing import Any

from raykd.config.experiment import Experiment
from raykd.pipeline.plan import Plan
from raykd.storage import files
from raykd.storage.schemas import COMPLETE, FAILED
from raykd.training.trial import TrialSpec, write_trial_status
from runs import started_plan

TREE: dict[str, Any] = {
    "name": "swept",
    "dataset": {"source": "demo", "num_train": 20, "num_validation": 10, "num_test": 2},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {"none": {}, "teacher": {"prompt.strategy": "teacher"}},
    "sweep": {"space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "num_samples": 4},
}


def sweep_plan(folder: Path, retry_failed: bool = False, **sections: Any) -> Plan:
    """Return the plan of the sweep with other sections, with its problems written."""
    experiment = Experiment.model_validate(TREE | {"storage": str(folder)} | sections)
    return started_plan(experiment, retry_failed)


def write_validations(trial: TrialSpec, *accuracies: float, status: str = COMPLETE) -> None:
    """Write the accuracies of a trial's validations, and its status."""
    points = [
        {
            "step": 5 * number,
            "loss": 1.0,
            "validation": {"number": number, "n": 10, "correct": round(10 * a), "accuracy": a},
        }
        for number, a in enumerate(accuracies, start=1)
    ]
    files.write_text(trial.folder / "metrics.jsonl", "".join(json.dumps(point) + "\n" for point in points))
    write_trial_status(trial, status, "out of memory" if status == FAILED else "")
