"""Training: the student's loop compared with TRL's SFTTrainer on the same model, LoRA, rows, order and cores.

    python benchmarks/training.py [--train-file gsm8k/train.jsonl] [--millions 33] [--steps 24] [--rounds 3]

Each side runs in a separate process, so that peak memory is measured separately; the first steps are not timed. Two
more sides are one and two Ray Train workers with a core each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import bench, random_llama
from raykd.config.loading import load_experiment
from raykd.config.training import Student
from raykd.data import datasets, demo_problems
from raykd.models import loading, tokenization
from raykd.storage import row_store, schemas

SIDE = Path(__file__).parent / "lib" / "training_side.py"
TOP_K = 16
SIDES = ("hard", "top_k", "padded", "trl", "trl_packed", "one_worker", "two_workers")


def main() -> int:
    parser = bench.parser(__doc__, "training", rounds=3)
    parser.add_argument("--millions", type=int, default=33, choices=sorted(random_llama.SHAPES), help="of parameters")
    parser.add_argument("--steps", type=int, default=24, help="number of optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--train-file", help="JSON lines in GSM8K's format; default: the built-in problems")
    parser.add_argument("--sides", default=",".join(SIDES), help="sides to measure, comma-separated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as temporary:
        folder = Path(temporary)
        prepare(folder, options)
        sides = {name: lambda name=name: measure(folder, name, losses) for name in options.sides.split(",")}
        losses: dict[str, list[float]] = {}
        measured = bench.alternate(sides, options.rounds)
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
    bench.table(f"{options.millions}M parameters, {options.dtype}, {options.batch_size} rows per step", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratios=ratios, losses=losses)
    return 0


def prepare(folder: Path, options: Any) -> None:
    """Write the model, the problems, an experiment with an arm for each of raykd's sides, and completions."""
    num_rows = options.steps * options.batch_size
    if options.train_file:
        problems = list(datasets.read_jsonl(Path(options.train_file)))[:num_rows]
        source = {"source": "jsonl", "train_file": options.train_file, "test_file": options.train_file}
    else:
        problems, source = list(demo_problems.generate("train", num_rows, seed=0)), {"source": "demo"}
    texts = (f"{problem['question']}\n{problem['answer']}" for problem in problems)
    model = random_llama.write(folder / "model", options.millions, texts)
    experiment = {
        "name": "training",
        "storage": str(folder),
        "dataset": {**source, "num_train": num_rows, "num_test": 1},
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
    splits = datasets.write_splits(load_experiment(folder / "experiment.yaml", []).dataset, folder)
    _write_completions(splits / "train.parquet", folder / "completions", Student(model=str(model)))


def _write_completions(file: Path, folder: Path, student: Student) -> None:
    """Write the reference solutions with random log-probabilities as a teacher's completions."""
    rng, tokenizer = np.random.default_rng(0), loading.load_tokenizer(student)
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
                "topk_ids": [rng.choice(len(tokenizer), TOP_K, replace=False).tolist() for _ in tokens],
                "topk_logprobs": np.log(rng.dirichlet(np.ones(TOP_K + 1), len(tokens))[:, :TOP_K]).tolist(),
            }
        )
    row_store.write_part(folder, pa.Table.from_pylist(rows, schema=schemas.COMPLETION))


def measure(folder: Path, side: str, losses: dict[str, list[float]]) -> dict[str, float]:
    """Measure one side once, and store its losses in `losses`."""
    process = subprocess.run([sys.executable, str(SIDE), str(folder), side], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{side}: {process.stderr[-3000:]}")
    figures = json.loads(process.stdout)
    losses[side] = figures.pop("losses")
    return figures


if __name__ == "__main__":
    sys.exit(main())
