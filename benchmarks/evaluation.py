"""Evaluation: many adapters in one engine, compared with one engine for each adapter.

    python benchmarks/evaluation.py [--adapters 16] [--problems 64] [--rounds 1]

The student is the built-in one with random adapters. raykd's time includes the start of Ray. The peer is offline vLLM
with a process for each adapter, one after another, start-up included.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lib import bench, peer
from raykd.cluster.connection import connected
from raykd.cluster.engine import engine_settings
from raykd.cluster.resources import resolve_accelerator
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.data import datasets, prompts
from raykd.evaluation import evaluate, student_batch
from raykd.models import loading
from raykd.models.builtin import resolve_model
from raykd.training import student

OURS, PEER = "one engine for all adapters", "one engine per adapter"


def main() -> int:
    parser = bench.parser(__doc__, "evaluation", rounds=1)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--problems", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as temporary:
        folder = Path(temporary)
        file = folder / "experiment.yaml"
        file.write_text(json.dumps(experiment_of(options)))
        experiment = load_experiment(file, [f"storage={folder}"])
        splits = datasets.write_splits(experiment.dataset, folder)
        eval_models = [random_student(experiment, number, folder) for number in range(options.adapters)]
        sides = {
            OURS: lambda: one_engine(eval_models, experiment, splits, folder),
            PEER: lambda: one_engine_each(eval_models, experiment, splits, folder),
        }
        measured = bench.alternate(sides, options.rounds)
    ratio = bench.ratios(measured, PEER, OURS, "seconds")
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    rows["speed-up"] = {"seconds": f"{ratio[0]:.1f}"}
    bench.table(f"{options.adapters} adapters, {options.problems} problems each", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratio=ratio)
    return 0


def experiment_of(options: Any) -> dict[str, Any]:
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 64}}
    return {
        "name": "evaluation",
        "dataset": {"source": "demo", "num_train": 1, "num_test": options.problems},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "evaluate": {"engine": engine, "sampling": {"max_tokens": 160}},
    }


def random_student(experiment: Experiment, number: int, folder: Path) -> student_batch.StudentModel:
    """Return a student with a random adapter."""
    model: Any = student.add_lora(
        loading.load_base_model(experiment.student, torch.float32), experiment.student, number
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    adapter = folder / f"adapter-{number}"
    student.save_adapter(model, adapter, experiment.student, write=True)
    return student_batch.StudentModel(f"student-{number}", "random", number, adapter, experiment.student.lora.r)


def one_engine(
    eval_models: list[student_batch.StudentModel], experiment: Experiment, splits: Path, folder: Path
) -> dict[str, float]:
    began = time.monotonic()
    with connected(folder / "log", "evaluation", "benchmark") as resources:
        kind = resolve_accelerator(experiment.evaluate.engine.accelerator, resources)
        evaluate.evaluate_students(
            eval_models,
            problems=splits,
            student=experiment.student,
            evaluation=experiment.evaluate,
            instruction=experiment.prompt.instruction,
            accelerator=kind,
            folder=Path(tempfile.mkdtemp(dir=folder)),
        )
    return {"seconds": time.monotonic() - began}


def one_engine_each(
    eval_models: list[student_batch.StudentModel], experiment: Experiment, splits: Path, folder: Path
) -> dict[str, float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(splits / "test.parquet").to_pylist()
    conversations = folder / "conversations.json"
    conversations.write_text(json.dumps([prompts.student_messages(row, "") for row in rows]))
    kwargs, env = engine_settings(experiment.evaluate.engine, "gpu" if torch.cuda.is_available() else "cpu")
    kwargs |= {
        "model": resolve_model(experiment.student.model),
        "enable_lora": True,
        "max_lora_rank": experiment.student.lora.r,
    }
    began = time.monotonic()
    for eval_model in eval_models:
        with peer.running(kwargs, env) as process:
            peer.generate(
                process,
                conversations=str(conversations),
                adapter=str(eval_model.adapter),
                max_tokens=experiment.evaluate.sampling.max_tokens,
            )
    return {"seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
