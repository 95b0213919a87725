"""Trains one student for each variant, without Ray: `torchrun plain_loop.py FOLDER VARIANT...`.

A variant is words such as `zero2-micro4-packed-killed`: the ZeRO stage, the rows of a forward pass, whether they are
packed, whether activations are checkpointed, and whether the loop is broken off after its first checkpoint and then
goes on from there.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from raykd import config, problems, train

FOLDER = Path(sys.argv[1])


class Killed(Exception):
    """Stands for whatever ends a worker."""


def job(variant: str, workers: int) -> train.Job:
    """A trial on reference solutions, which need no teacher."""
    words = variant.split("-")
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
                "micro_batch_size": int(words[1].removeprefix("micro")),
                "learning_rate": 5e-3,
                "num_workers": workers,
                "zero_stage": int(words[0].removeprefix("zero")),
                "dtype": "float32",
                "packing": "packed" in words,
                "gradient_checkpointing": "checkpointed" in words,
                "checkpoint_every_steps": 3,
            },
        }
    )
    name = f"workers{workers}-{variant}"
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


def run(variant: str, workers: int) -> None:
    made = job(variant, workers)
    kept = FOLDER / f"checkpoint-of-{made.trial_id}-worker-{os.environ['RANK']}"

    def break_off(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint:
            shutil.copytree(checkpoint, kept)
            raise Killed

    if "killed" not in variant:
        train.loop(made, lambda metrics, checkpoint: None, None)
        return
    try:
        train.loop(made, break_off, None)
    except Killed:
        train.loop(made, lambda metrics, checkpoint: None, kept)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        run(each, int(os.environ["WORLD_SIZE"]))
