"""Training: the student's loop against TRL's SFTTrainer, same model, LoRA, rows, order and cores.

    python benchmarks/training.py [--train-file gsm8k/train.jsonl] [--millions 33] [--steps 24] [--rounds 3]

Each side is a process of its own, so that its peak memory is its own; the first steps are left out. Then one and two
Ray Train workers, a core each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import random_llama

from raykd.config.loading import load_experiment
from raykd.config.sections import Student
from raykd.data import datasets, demo_problems
from raykd.models import loading, tokenization
from raykd.storage import row_store, schemas

HERE = Path(__file__).parent
TOP_K = 16
SIDES = ("hard", "top_k", "padded", "trl", "trl_packed", "one_worker", "two_workers")


def main() -> int:
    parser = bench.parser(__doc__, "training", rounds=3)
    parser.add_argument("--millions", type=int, default=33, choices=sorted(random_llama.SHAPES), help="of parameters")
    parser.add_argument("--steps", type=int, default=24, help="of a batch each")
    parser.add_argument("--batch-size", type=int, default=8, help="rows")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--train-file", help="JSON lines of GSM8K's form; left out: the built-in problems")
    parser.add_argument("--sides", default=",".join(SIDES), help="which, separated by commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as made:
        folder = Path(made)
        prepare(folder, options)
        sides = {name: lambda name=name: measure(folder, name, losses) for name in options.sides.split(",")}
        losses: dict[str, list[float]] = {}
        measured = bench.by_turns(sides, options.rounds)
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    for name in rows:
        rows[name]["last loss"] = losses[name][-1]
    ratios = {}
    for ours, peer in (
        ("hard", "trl"),
        ("hard", "trl_packed"),
        ("hard", "padded"),
        ("top_k", "hard"),
        ("two_workers", "one_worker"),
    ):
        if {ours, peer} <= set(measured):
            ratios[f"{ours} / {peer}"] = ratio = bench.ratios(measured, ours, peer, "tokens/s")
            rows[f"{ours} / {peer}"] = {"tokens/s": f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"}
    bench.table(f"{options.millions}M parameters, {options.dtype}, {options.batch_size} rows a step", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratios=ratios, losses=losses)
    return 0


def prepare(folder: Path, options: Any) -> None:
    """Writes the model, the problems, an experiment with an arm for each of our sides, and scored completions."""
    num_rows = options.steps * options.batch_size
    if options.train_file:
        told = list(datasets.read_jsonl(Path(options.train_file)))[:num_rows]
        source = {"source": "jsonl", "train_file": options.train_file, "test_file": options.train_file}
    else:
        told, source = list(demo_problems.generate("train", num_rows, seed=0)), {"source": "demo"}
    texts = (f"{each['question']}\n{each['answer']}" for each in told)
    model = random_llama.write(folder / "model", options.millions, texts)
    experiment = {
        "name": "training",
        "storage": str(folder),
        "problems": {**source, "num_train": num_rows, "num_test": 1},
        "teacher": {"model": str(model)},
        "student": {
            "model": str(model),
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        },
        "train": {
            "epochs": 1,
            "batch_size": options.batch_size,
            "micro_batch_size": options.batch_size,
            "dtype": options.dtype,
            "zero_stage": 2 if options.dtype == "bfloat16" else 0,
            "checkpoint_every_steps": 1_000_000,
        },
        "arms": {
            "hard": {},
            "top_k": {"targets.kind": "top_k", "targets.top_k": TOP_K},
            "padded": {"train.packing": False},
            "one_worker": {"train.num_workers": 1},
            "two_workers": {"train.num_workers": 2},
        },
    }
    (folder / "experiment.yaml").write_text(json.dumps(experiment))
    splits = datasets.write_splits(load_experiment(folder / "experiment.yaml", []).problems, folder)
    _complete(splits / "train.parquet", folder / "completions", Student(model=str(model)))


def _complete(file: Path, folder: Path, student: Student) -> None:
    """Rows as a teacher would have left them: the reference solutions, with drawn log-probabilities."""
    draw, tokenizer = np.random.default_rng(0), loading.load_tokenizer(student)
    rows = []
    for problem in pq.read_table(file).to_pylist():
        tokens = tokenization.answer_token_ids(tokenizer, problem["reference_solution"], is_whole=True)
        rows.append(
            {
                **dict.fromkeys(schemas.COMPLETION.names, ""),
                "problem_id": problem["problem_id"],
                "completion_id": problem["problem_id"],
                "sample_index": 0,
                "prompt_token_ids": [],
                "completion": problem["reference_solution"],
                "completion_token_ids": tokens,
                "finish_reason": "stop",
                "is_correct": True,
                "topk_ids": [draw.choice(len(tokenizer), TOP_K, replace=False).tolist() for _ in tokens],
                "topk_logprobs": np.log(draw.dirichlet(np.ones(TOP_K + 1), len(tokens))[:, :TOP_K]).tolist(),
            }
        )
    row_store.write_part(folder, pa.Table.from_pylist(rows, schema=schemas.COMPLETION))


def measure(folder: Path, side: str, losses: dict[str, list[float]]) -> dict[str, float]:
    """One side once; its losses go into `losses`."""
    command = [sys.executable, str(HERE / "training_side.py"), str(folder), side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-3000:]}")
    figures = json.loads(done.stdout)
    losses[side] = figures.pop("losses")
    return figures


if __name__ == "__main__":
    sys.exit(main())
