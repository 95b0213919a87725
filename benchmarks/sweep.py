"""Sweep: one sweep of many trials, compared with one run of the pipeline for each trial.

    python benchmarks/sweep.py [--runs 12]

Both cover twelve points of learning rate and rank with the built-in models. The sweep generates completions once,
trains in parallel where resources allow, and evaluates all students in one engine. The runs repeat everything.
With fewer `--runs` the time of all twelve is extrapolated, and the table says so.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib import bench

RAYKD = str(Path(sys.executable).parent / "raykd")
SPACE: dict[str, list[Any]] = {"train.learning_rate": [1e-3, 2e-3, 5e-3, 1e-2], "student.lora.r": [4, 8, 16]}
POINTS = [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]


def main() -> int:
    parser = bench.parser(__doc__, "sweep", rounds=1)
    parser.add_argument("--runs", type=int, default=len(POINTS), help="number of runs, at most twelve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as temporary:
        folder = Path(temporary)

        def sweep() -> dict[str, float]:
            section = {"space": {name: {"grid": values} for name, values in SPACE.items()}, "test_top_n": len(POINTS)}
            return {"seconds": seconds(folder, "sweep", {**experiment_of(), "sweep": section})}

        def runs() -> dict[str, float]:
            times = [seconds(folder, "run", {**experiment_of(), **nested(point)}) for point in POINTS[: options.runs]]
            return {"seconds": sum(times) * len(POINTS) / len(times)}

        peer = f"{len(POINTS)} runs" + (f" (from {options.runs})" if options.runs < len(POINTS) else "")
        ours = f"a sweep of {len(POINTS)} trials"
        measured = bench.alternate({ours: sweep, peer: runs}, options.rounds)
    ratio = bench.ratios(measured, peer, ours, "seconds")
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    rows["speed-up"] = {"seconds": f"{ratio[0]:.1f}"}
    bench.table("One sweep and separate runs", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratio=ratio)
    return 0


def experiment_of() -> dict[str, Any]:
    """Return a small experiment with the built-in models."""
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
    """Return the sections of the experiment that a point changes."""
    base = experiment_of()
    return {
        "train": {**base["train"], "learning_rate": point["train.learning_rate"]},
        "student": {**base["student"], "lora": {"r": point["student.lora.r"]}},
    }


def seconds(folder: Path, command: str, experiment: dict[str, Any]) -> float:
    """Return the seconds of a command in an empty storage folder."""
    root = Path(tempfile.mkdtemp(dir=folder))
    (root / "experiment.yaml").write_text(json.dumps({"name": "timed", "storage": str(root), **experiment}))
    began = time.monotonic()
    process = subprocess.run([RAYKD, command, str(root / "experiment.yaml")], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
