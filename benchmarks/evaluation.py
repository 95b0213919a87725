"""Evaluation: many adapters in one engine against an engine for each of them.

    python benchmarks/evaluation.py [--adapters 16] [--problems 64] [--rounds 1]

The built-in student with random adapters. Ours is raykd's evaluation, Ray's start included; the peer is offline vLLM,
a process for each adapter, one after another, with its start-up as users have it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import peer
import torch

from raykd import config, evaluate, placement, problems, prompts, student
from raykd.cluster import connected
from raykd.config import Experiment
from raykd.demo import resolve_model

OURS, PEER = "one engine", "an engine each"


def main() -> int:
    parser = bench.parser(__doc__, "evaluation", rounds=1)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--problems", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as made:
        folder = Path(made)
        file = folder / "experiment.yaml"
        file.write_text(json.dumps(experiment_of(options)))
        experiment = config.load(file, [f"storage={folder}"])
        splits = problems.prepare(experiment.problems, folder)
        contestants = [contestant(experiment, number, folder) for number in range(options.adapters)]
        sides = {
            OURS: lambda: one_engine(contestants, experiment, splits, folder),
            PEER: lambda: an_engine_each(contestants, experiment, splits, folder),
        }
        measured = bench.by_turns(sides, options.rounds)
    ratio = bench.ratios(measured, PEER, OURS, "seconds")
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    rows["times as fast"] = {"seconds": f"{ratio[0]:.1f}"}
    bench.table(f"{options.adapters} adapters, {options.problems} problems each", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratio=ratio)
    return 0


def experiment_of(options: Any) -> dict[str, Any]:
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 64}}
    return {
        "name": "evaluation",
        "problems": {"source": "demo", "num_train": 1, "num_test": options.problems},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "evaluate": {"engine": engine, "sampling": {"max_tokens": 160}},
    }


def contestant(experiment: Experiment, number: int, folder: Path) -> evaluate.Contestant:
    """A student with an adapter that nobody trained."""
    model: Any = student.add_lora(student.load_base(experiment.student, torch.float32), experiment.student, number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    adapter = folder / f"adapter-{number}"
    student.save_adapter(model, adapter, experiment.student, write=True)
    return evaluate.Contestant(f"student-{number}", "drawn", number, adapter, experiment.student.lora.rank)


def one_engine(
    contestants: list[evaluate.Contestant], experiment: Experiment, splits: Path, folder: Path
) -> dict[str, float]:
    began = time.monotonic()
    with connected(folder / "log", "evaluation", "benchmark") as resources:
        kind = placement.accelerator(experiment.evaluate.engine.accelerator, resources)
        told = (splits, experiment.student, experiment.evaluate, experiment.prompt.instruction)
        evaluate.evaluate(contestants, *told, kind, Path(tempfile.mkdtemp(dir=folder)))
    return {"seconds": time.monotonic() - began}


def an_engine_each(
    contestants: list[evaluate.Contestant], experiment: Experiment, splits: Path, folder: Path
) -> dict[str, float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(splits / "test.parquet").to_pylist()
    conversations = folder / "conversations.json"
    conversations.write_text(json.dumps([prompts.student_messages(row, "") for row in rows]))
    kwargs, env = placement.engine_settings(experiment.evaluate.engine, "gpu" if torch.cuda.is_available() else "cpu")
    kwargs |= {
        "model": resolve_model(experiment.student.model),
        "enable_lora": True,
        "max_lora_rank": experiment.student.lora.rank,
    }
    began = time.monotonic()
    for each in contestants:
        with peer.running(kwargs, env) as process:
            told = {"conversations": str(conversations), "adapter": str(each.adapter)}
            peer.ask(process, **told, max_tokens=experiment.evaluate.sampling.max_tokens)
    return {"seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
