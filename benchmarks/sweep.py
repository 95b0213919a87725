"""Sweep: one sweep of many trials against as many runs of the whole pipeline.

    python benchmarks/sweep.py [--runs 12]

Twelve points of learning rate and rank, a small demonstration each. As a sweep, the teacher answers once, trials stand
beside each other where there is room, and one engine evaluates all; as runs, everything is done twelve times. With
fewer `--runs` than twelve only so many are made, and their time is multiplied: the table says so.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench

RAYKD = str(Path(sys.executable).parent / "raykd")
SPACE: dict[str, list[Any]] = {"train.learning_rate": [1e-3, 2e-3, 5e-3, 1e-2], "student.lora.r": [4, 8, 16]}
POINTS = [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]


def main() -> int:
    parser = bench.parser(__doc__, "sweep", rounds=1)
    parser.add_argument("--runs", type=int, default=len(POINTS), help="how many of the twelve are made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as made:
        folder = Path(made)

        def sweep() -> dict[str, float]:
            swept = {"space": {name: {"grid": values} for name, values in SPACE.items()}, "test_top_n": len(POINTS)}
            return {"seconds": seconds(folder, "sweep", {**experiment_of(), "sweep": swept})}

        def runs() -> dict[str, float]:
            each = [seconds(folder, "run", {**experiment_of(), **nested(point)}) for point in POINTS[: options.runs]]
            return {"seconds": sum(each) * len(POINTS) / len(each)}

        peer = f"{len(POINTS)} runs" + (f" (from {options.runs})" if options.runs < len(POINTS) else "")
        ours = f"a sweep of {len(POINTS)} trials"
        measured = bench.by_turns({ours: sweep, peer: runs}, options.rounds)
    ratio = bench.ratios(measured, peer, ours, "seconds")
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    rows["times as fast"] = {"seconds": f"{ratio[0]:.1f}"}
    bench.table("A sweep against runs", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratio=ratio)
    return 0


def experiment_of() -> dict[str, Any]:
    """A small demonstration."""
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 64}}
    return {
        "dataset": {"source": "demo", "num_train": 200, "num_validation": 20, "num_test": 60},
        "teacher": {
            "model": "raykd/demo-teacher",
            "engine": engine,
            "sampling": {"max_tokens": 160},
            "concurrency": 3,
        },
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {"epochs": 1, "batch_size": 16, "zero_stage": 0, "dtype": "float32"},
        "evaluate": {"engine": engine, "sampling": {"max_tokens": 160}},
        "arms": {"primed": {"prompt.strategy": "ground_truth"}},
    }


def nested(point: dict[str, Any]) -> dict[str, Any]:
    """A point's values in the sections that they belong to, beside what is there."""
    base = experiment_of()
    return {
        "train": {**base["train"], "learning_rate": point["train.learning_rate"]},
        "student": {**base["student"], "lora": {"r": point["student.lora.r"]}},
    }


def seconds(folder: Path, command: str, experiment: dict[str, Any]) -> float:
    """How long a command takes with nothing there yet."""
    root = Path(tempfile.mkdtemp(dir=folder))
    (root / "experiment.yaml").write_text(json.dumps({"name": "timed", "storage": str(root), **experiment}))
    began = time.monotonic()
    done = subprocess.run([RAYKD, command, str(root / "experiment.yaml")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
