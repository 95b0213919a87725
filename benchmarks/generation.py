"""Generation: `raykd generate` compared with offline vLLM on the same model, prompts, sampling and cores.

    python benchmarks/generation.py [--millions 33] [--requests 512] [--tokens 64] [--top-k 0] [--rounds 3]

Both engines are loaded and warm, and run alternately. raykd reads problems from Parquet, uses Ray Data and Ray Serve,
and writes completions to Parquet; it is timed from the first call of the teacher to the last written row. Offline vLLM
is timed from the first scheduled prompt to the last token. Then each runs once from a cold start.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lib import bench, peer, random_llama
from raykd.cluster import engine
from raykd.cluster.connection import connected
from raykd.cluster.resources import resolve_accelerator
from raykd.config.loading import load_experiment
from raykd.config.sections import Teacher
from raykd.data import demo_problems, prompts
from raykd.pipeline import run
from raykd.pipeline.plan import Plan, resolve
from raykd.storage import row_store, schemas
from raykd.teacher import client, generate, server

RAYKD = str(Path(sys.executable).parent / "raykd")
CALLS = "calls.txt"
OURS, PEER = "raykd generate", "offline LLM.chat"


def record_call(call: client.TeacherCall, began: float, ended: float) -> None:
    """Record the start of a call beside the completions."""
    with (call.completion_set.folder.parents[1] / CALLS).open("a") as file:
        file.write(f"{began}\n")


def main() -> int:
    parser = bench.parser(__doc__, "generation", rounds=3)
    parser.add_argument("--millions", type=int, default=33, choices=sorted(random_llama.SHAPES), help="of parameters")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--top-k", type=int, default=0, help="log-probabilities at each token (0: none)")
    parser.add_argument("--no-start-up", action="store_true", help="skip the runs from a cold start")
    parser.add_argument("overrides", nargs="*", metavar="teacher.path=value", help="fields of the experiment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        root = Path(folder)
        problems = demo_problems.generate("train", 512, seed=0)
        model = random_llama.write(root / "model", options.millions, (problem["question"] for problem in problems))
        file = root / "experiment.yaml"
        file.write_text(json.dumps(experiment_of(model, options)))
        measured = warm_throughput(file, root, options)
        cold = {} if options.no_start_up else cold_start(file, root, options)
    ratio = bench.ratios(measured, OURS, PEER, "tokens/s")
    rows: dict[str, dict[str, Any]] = {**bench.medians(measured)}
    rows["ratio"] = {"tokens/s": f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"}
    for name, seconds in cold.items():
        rows[name]["cold start, s"] = seconds
    logprobs = f", top {options.top_k} log-probabilities" if options.top_k else ""
    bench.table(f"{options.millions}M parameters, {options.requests} x {options.tokens} tokens{logprobs}", rows)
    bench.write(options.out, options=vars(options), measured=measured, ratio=ratio, cold_start=cold)
    return 0


def experiment_of(model: Path, options: Any) -> dict[str, Any]:
    """Return the experiment whose completions are generated."""
    soft = {"targets.kind": "top_k", "targets.top_k": options.top_k} if options.top_k else {"targets.kind": "hard"}
    return {
        "name": "generation",
        "dataset": {"source": "demo", "num_train": options.requests, "num_test": 1},
        "teacher": {
            "model": str(model),
            "engine": {"engine_kwargs": {"dtype": "bfloat16", "max_model_len": random_llama.CONTEXT}},
            "sampling": {"max_tokens": options.tokens},
        },
        "student": {"model": str(model)},
        "arms": {"one": {"prompt.strategy": "ground_truth", **soft}},
    }


def warm_throughput(file: Path, root: Path, options: Any) -> dict[str, list[dict[str, float]]]:
    """Measure both loaded engines alternately."""
    first = plan_of(file, root / "warm", [*options.overrides, "dataset.num_train=64"])
    teacher = first.experiment.teacher
    with (
        connected(root / "log", "generation", "benchmark") as resources,
        offline(teacher, options.top_k, resources) as process,
    ):
        app = server.app_name("generation")
        with server.serve_teacher(teacher, options.top_k, app, resources):
            server.wait_until_up(app, teacher.start_timeout_s)

            def ours(plan: Plan | None = None) -> dict[str, float]:
                plan = plan or plan_of(file, Path(tempfile.mkdtemp(dir=root)), options.overrides)
                began = time.time()
                context = generate.GenerationContext(
                    problems_dir=plan.problems,
                    teacher=plan.experiment.teacher,
                    instruction=plan.experiment.prompt.instruction,
                    app=app,
                    experiment=plan.experiment.name,
                    on_call=record_call,
                )
                generate.generate_completions(plan.required_sets, context)
                return figures(plan, began)

            def theirs(plan: Plan = first) -> dict[str, float]:
                return run_peer(process, conversations(plan), options)

            print("warming up", file=sys.stderr)
            ours(first)
            theirs()
            full = plan_of(file, root / "full", options.overrides)
            return bench.alternate({OURS: ours, PEER: lambda: theirs(full)}, options.rounds)


def plan_of(file: Path, storage_folder: Path, overrides: list[str]) -> Plan:
    plan = resolve(load_experiment(file, [f"storage={storage_folder}", *overrides]))
    run.start(plan, "benchmark")
    return plan


def figures(plan: Plan, began: float) -> dict[str, float]:
    """Return the throughput of the completions that were just generated."""
    (completion_set,) = plan.required_sets
    rows = row_store.read_rows(completion_set.folder, schemas.COMPLETION, ["completion_token_ids", "error"])
    assert not any(rows["error"].to_pylist()), "a row failed"
    tokens = sum(map(len, rows["completion_token_ids"].to_pylist()))
    first = min(float(line) for line in (plan.root / CALLS).read_text().splitlines())
    last = max(file.stat().st_mtime for file in completion_set.folder.glob("part-*.parquet"))
    return {"tokens": tokens, "tokens/s": tokens / (last - first), "stage, s": time.time() - began}


def conversations(plan: Plan) -> Path:
    """Write the same prompts as messages to a file."""
    (completion_set,) = plan.required_sets
    messages = [
        prompts.teacher_messages(problem, completion_set.strategy, plan.experiment.prompt.instruction)
        for problem in pq.read_table(plan.problems / "train.parquet").to_pylist()
    ]
    file = plan.root / "conversations.json"
    file.write_text(json.dumps(messages))
    return file


@contextmanager
def offline(teacher: Teacher, top_k: int, resources: dict[str, float]) -> Iterator["subprocess.Popen[str]"]:
    """Start the peer with the same engine arguments and environment."""
    kind = resolve_accelerator(teacher.engine.accelerator, resources)
    kwargs, env = engine.engine_settings(teacher.engine, kind)
    # LLM() optimizes for throughput by default.
    del kwargs["performance_mode"]
    with peer.running(kwargs | {"model": teacher.model, "max_logprobs": max(top_k, 20)}, env) as process:
        yield process


def run_peer(process: "subprocess.Popen[str]", file: Path, options: Any) -> dict[str, float]:
    """Return the throughput of the peer."""
    result = peer.generate(process, conversations=str(file), max_tokens=options.tokens, top_k=options.top_k)
    tokens = result["tokens"]
    return {"tokens": tokens, "tokens/s": tokens / result["engine_seconds"], "stage, s": result["seconds"]}


def cold_start(file: Path, root: Path, options: Any) -> dict[str, float]:
    """Return the seconds of each side as a separate command, start-up included."""
    storage_folder, began = root / "cold_start", time.monotonic()
    arguments = ["generate", str(file), f"storage={storage_folder}", *options.overrides]
    subprocess.run([RAYKD, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours, began = time.monotonic() - began, time.monotonic()
    plan = plan_of(file, storage_folder, options.overrides)
    with offline(plan.experiment.teacher, options.top_k, {}) as process:
        run_peer(process, conversations(plan), options)
    return {OURS: ours, PEER: time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
