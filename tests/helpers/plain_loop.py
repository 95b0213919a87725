"""Train one student for each variant, without Ray: `torchrun plain_loop.py FOLDER VARIANT...`.

A variant is a list of words such as `zero2-micro4-packed-killed`: the ZeRO stage and the rows of a forward pass, then
any of `soft` (targets), `bf16`, `packed`, `checkpointed` (activations), `chunked` (many chunks in the loss), `loss` or
`answers` (validation by loss or by accuracy), `killed` and `elastic`. The last two end the process after its first
checkpoint. Another run of the same variant resumes from it; for `elastic` with a number of workers other than two.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch.distributed

from raykd.config.experiment import Experiment
from raykd.config.sections import Dataset, Sweep
from raykd.config.training import Student
from raykd.data import datasets
from raykd.models import loading, tokenization
from raykd.storage import row_store, schemas
from raykd.training import loop, student
from raykd.training.trial import TrialSpec

FOLDER = Path(sys.argv[1])


def trial_spec(variant: str, workers: int) -> TrialSpec:
    """Return a trial on reference solutions; soft targets are random."""
    words = variant.split("-")
    is_elastic = "elastic" in words
    workers = 2 if is_elastic else workers
    experiment = Experiment.model_validate(
        {
            "name": "plain",
            "storage": str(FOLDER),
            "dataset": {"source": "demo", "num_train": 20, "num_test": 5},
            "teacher": {"model": "raykd/demo-teacher"},
            "student": {"model": "raykd/demo-student", "lora": {"r": 4, "lora_alpha": 8}},
            "prompt": {"instruction": ""},
            "targets": {"source": "reference", "kind": "top_k" if "soft" in words else "hard", "top_k": 6},
            "train": {
                "epochs": 2,
                "batch_size": 8,
                "micro_batch_size": int(words[1].removeprefix("micro")),
                "learning_rate": 5e-3,
                "num_workers": workers,
                "min_workers": 1 if is_elastic else None,
                "zero_stage": int(words[0].removeprefix("zero")),
                "dtype": "bfloat16" if "bf16" in words else "float32",
                "packing": "packed" in words,
                "gradient_checkpointing": "checkpointed" in words,
                "checkpoint_every_steps": 3,
            },
        }
    )
    name = f"workers{workers}-{variant}"
    splits = write_problems(experiment.dataset)
    sweep = Sweep(metric="loss" if "loss" in words else "accuracy", num_validations=2, validation_batch_size=2)
    return TrialSpec(
        trial_id=name,
        arm_name="default",
        arm=experiment.arm("default"),
        seed=0,
        overrides={},
        problems=splits,
        completions=write_scored_solutions(splits) if "soft" in words else None,
        same_tokens=True,
        experiment=experiment.name,
        folder=FOLDER / name,
        config_id="default",
        sweep=sweep if {"loss", "answers"} & set(words) else None,
        max_tokens=16,
    )


def write_problems(dataset: Dataset) -> Path:
    """Write the splits of a dataset, with a validation split, and return their folder."""
    # Workers may write at the same time, so each has its own folder.
    folder = FOLDER / f"splits-{os.environ['RANK']}"
    shutil.copytree(datasets.write_splits(dataset, FOLDER), folder, dirs_exist_ok=True)
    # The test problems serve as the validation split.
    shutil.copyfile(folder / "test.parquet", folder / "validation.parquet")
    return folder


def write_scored_solutions(splits: Path) -> Path:
    """Write the reference solutions with six random log-probabilities for each token, and return their folder."""
    draw, tokenizer = np.random.default_rng(0), loading.load_tokenizer(Student(model="raykd/demo-student"))
    rows = []
    for problem in pyarrow.parquet.read_table(splits / "train.parquet").to_pylist():
        tokens = tokenization.answer_token_ids(tokenizer, problem["reference_solution"], is_whole=True)
        ids = [draw.choice(len(tokenizer), 6, replace=False).tolist() for _ in tokens]
        row = {
            **dict.fromkeys(schemas.COMPLETION.names, ""),
            "problem_id": problem["problem_id"],
            "completion_id": problem["problem_id"],
            "sample_index": 0,
            "prompt_token_ids": [],
            "completion_token_ids": tokens,
            "is_correct": True,
            "topk_ids": ids,
            "topk_logprobs": np.log(draw.dirichlet(np.ones(7), len(tokens))[:, :6]).tolist(),
        }
        rows.append(row)
    folder = FOLDER / f"scored-{os.environ['RANK']}"
    row_store.write_part(folder, pa.Table.from_pylist(rows, schema=schemas.COMPLETION))
    return folder


def run(variant: str, workers: int) -> None:
    trial = trial_spec(variant, workers)
    student.CHUNK_ELEMENTS = 1 << (13 if "chunked" in variant else 26)
    checkpoint_copy = FOLDER / f"checkpoint-of-{trial.trial_id}"

    def exit_at_checkpoint(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint:
            # Like Ray Train, merges the parts of all workers into one folder.
            shutil.copytree(checkpoint, checkpoint_copy, dirs_exist_ok=True)
            torch.distributed.barrier()
            os._exit(0)

    if checkpoint_copy.exists():
        loop.train_loop(trial, ignore, checkpoint_copy)
    elif {"killed", "elastic"} & set(variant.split("-")):
        loop.train_loop(trial, exit_at_checkpoint, None)
    else:
        loop.train_loop(trial, ignore, None)


def ignore(metrics: dict[str, Any], checkpoint: Path | None) -> None:
    """Report nothing."""


if __name__ == "__main__":
    for each in sys.argv[2:]:
        run(each, int(os.environ["WORLD_SIZE"]))
