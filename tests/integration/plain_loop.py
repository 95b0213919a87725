"""Trains one student for each ZeRO stage, without Ray: `torchrun plain_loop.py FOLDER STAGE...`."""

import os
import sys
from pathlib import Path

from raykd import config, problems, train

FOLDER = Path(sys.argv[1])


def job(stage: int, workers: int) -> train.Job:
    """A trial on reference solutions, which need no teacher."""
    experiment = config.Experiment.model_validate(
        {
            "name": "plain",
            "storage": str(FOLDER),
            "problems": {"source": "demo", "num_train": 20, "num_test": 2},
            "teacher": {"model": "raykd/demo-teacher"},
            "student": {"model": "raykd/demo-student", "lora": {"rank": 4, "alpha": 8}},
            "prompt": {"instruction": ""},
            "targets": {"sequence": "reference"},
            "train": {
                "epochs": 2,
                "batch_size": 8,
                "micro_batch_size": 2,
                "learning_rate": 5e-3,
                "num_workers": workers,
                "zero_stage": stage,
                "dtype": "float32",
            },
        }
    )
    name = f"zero{stage}-workers{workers}"
    return train.Job(
        trial_id=name,
        arm_name="default",
        arm=experiment.arm("default"),
        seed=0,
        overrides={},
        problems=problems.prepare(experiment.problems, FOLDER),
        completions=None,
        same_tokens=True,
        folder=FOLDER / name,
    )


if __name__ == "__main__":
    for number in map(int, sys.argv[2:]):
        made = job(number, int(os.environ["WORLD_SIZE"]))
        train.loop(made, lambda metrics, checkpoint: None, None)
