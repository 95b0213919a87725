"""Soak: repeated runs of the quickstart on one cluster, with processes and nodes killed at random.

    python benchmarks/soak.py --minutes 60 [--seed 0] [--out soak.json] [key.path=value ...]

The cluster has three Ray nodes on this machine. Each round is a new experiment, whose command is repeated until it
completes; then its rows are checked. Prints a table with a row for each round, and writes it as JSON.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from raykd.config.loading import load_experiment
from raykd.data import datasets
from raykd.pipeline.plan import resolve
from raykd.storage import row_store, schemas

ROOT = Path(__file__).parents[1]
RAYKD = str(Path(sys.executable).parent / "raykd")
# Processes to kill, by a word of their command line; the range of seconds between two kills.
PROCESSES = {"engine": "EngineCore", "replica": "ServeReplica", "worker": "RayTrainWorker", "actor": "MapWorker"}
EVERY_S = (20, 90)
# The weight of these processes against the driver and a node.
PROCESS_WEIGHT = 3
# More attempts than this indicate a permanent failure.
MAX_ATTEMPTS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="start no round after this time (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills (0)")
    parser.add_argument("--out", type=Path, default=Path("soak.json"), help="the JSON file for the results")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields of configs/quickstart.yaml")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    # Ray Train needs the dashboard to release the resources of a trial that was stopped early.
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    rounds: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="soak") as folder:
            while time.monotonic() - started < 60 * options.minutes:
                result = soak(cluster, rng, Path(folder) / str(len(rounds)), options.overrides, len(rounds))
                rounds.append(result)
                print(json.dumps(result), flush=True)
                options.out.write_text(json.dumps({"seed": options.seed, "rounds": rounds}, indent=1))
    finally:
        cluster.shutdown()
    Console(width=140).print(table(rounds))
    return 0 if all(result["wrong"] == "" for result in rounds) else 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def soak(cluster: Cluster, rng: random.Random, root: Path, overrides: list[str], number: int) -> dict[str, Any]:
    """Run one experiment until it is complete."""
    root.mkdir()
    arguments = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={root}", f"name=soak-{number}", *overrides]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    kills: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    peak: dict[str, float] = {"driver": 0.0, "controller": 0.0}
    began = time.monotonic()
    for _ in range(MAX_ATTEMPTS):
        with (root / "log").open("a") as log:
            run = subprocess.Popen([RAYKD, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT)
        stopped = threading.Event()
        monitor = threading.Thread(target=record_memory, args=(run.pid, peak, stopped))
        monitor.start()
        try:
            while run.poll() is None:
                try:
                    run.wait(rng.uniform(*EVERY_S))
                except subprocess.TimeoutExpired:
                    kills[kill(cluster, run, rng)] += 1
        finally:
            stopped.set()
            monitor.join()
        ends[run.returncode] += 1
        if run.returncode == 0:
            break
    return {
        "round": number,
        "seconds": round(time.monotonic() - began),
        "kills": dict(kills),
        "ends": {str(code): count for code, count in ends.items()},
        "driver_peak_mb": round(peak["driver"]),
        "controller_peak_mb": round(peak["controller"]),
        **check_rows(arguments),
    }


def kill(cluster: Cluster, run: "subprocess.Popen[bytes]", rng: random.Random) -> str:
    """Kill a random process or node, and return its kind."""
    candidates = {name: running for name, word in PROCESSES.items() if (running := processes(word))}
    # A run has no such process when it starts: without the weight most kills would hit the driver.
    kind = rng.choice([*PROCESS_WEIGHT * sorted(candidates), "driver", "driver, SIGTERM", "node"])
    if kind in candidates:
        victim = rng.choice(candidates[kind])
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return "nothing"
    elif kind == "node":
        cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)), False)
        time.sleep(rng.uniform(0, 20))
        cluster.add_node(num_cpus=1)
    else:
        run.send_signal(signal.SIGTERM if "SIGTERM" in kind else signal.SIGKILL)
        run.wait(60)
    return kind


def processes(word: str) -> list[psutil.Process]:
    """Return the child processes whose command line contains a word, by process id."""
    matching = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                matching.append(process)
        except psutil.Error:
            continue
    return sorted(matching, key=lambda process: process.pid)


def record_memory(driver: int, peak: dict[str, float], stopped: threading.Event) -> None:
    """Record the peak resident memory, in MB, of the driver and of Serve's controller."""
    while not stopped.wait(2):
        running = {"driver": [driver], "controller": [process.pid for process in processes("ServeController")]}
        for name, pids in running.items():
            peak[name] = max([peak[name], *map(resident, pids)])


def resident(pid: int) -> float:
    try:
        return psutil.Process(pid).memory_info().rss / 1e6
    except psutil.Error:
        return 0.0


def check_rows(arguments: list[str]) -> dict[str, Any]:
    """Return the numbers of rows, and what is wrong with them: empty where every row occurs exactly once."""
    plan = resolve(load_experiment(arguments[1], arguments[2:]))
    wrong = [] if plan.is_complete() else ["not complete"]
    completions = 0
    num_train, num_test = (datasets.split_size(plan.problems, split) for split in ("train", "test"))
    for completion_set in plan.required_sets:
        rows = row_store.read_rows(completion_set.folder, schemas.COMPLETION, ["completion_id", "error"])
        completions += len(rows)
        wrong += row_errors(rows, "completion_id", completion_set.strategy_name, num_train * completion_set.num_samples)
    answers = row_store.read_rows(plan.predictions, schemas.PREDICTION, ["prediction_id", "error"])
    expected = num_test * len(plan.eval_models()) * plan.experiment.evaluate.num_samples
    wrong += row_errors(answers, "prediction_id", "students", expected)
    if plan.attention and plan.experiment.attention:
        attention = row_store.read_rows(plan.attention, schemas.ATTENTION, ["attention_id", "error"])
        texts = min(num_test, plan.experiment.attention.num_problems) * len(plan.eval_models())
        wrong += row_errors(attention, "attention_id", "attention", texts)
    return {"completions": completions, "answers": len(answers), "wrong": "; ".join(wrong)}


def row_errors(rows: Any, column: str, title: str, expected: int) -> list[str]:
    """Return what is wrong with rows: missing, duplicate and failed ones."""
    ids, num_failed = rows[column].to_pylist(), sum(1 for error in rows["error"].to_pylist() if error)
    num_unique = len(set(ids))
    errors = []
    if num_unique != expected:
        errors.append(f"{title}: {num_unique} of {expected}")
    if len(ids) != num_unique:
        errors.append(f"{title}: {len(ids) - num_unique} duplicates")
    if num_failed:
        errors.append(f"{title}: {num_failed} failed")
    return errors


def table(rounds: list[dict[str, Any]]) -> Table:
    result = Table(title="Soak", box=None)
    for name in ("Round", "Minutes", "Killed", "Ends", "Completions", "Answers", "Driver MB", "Controller MB", "Wrong"):
        result.add_column(name)
    for round_ in rounds:
        killed = ", ".join(f"{count} {name}" for name, count in sorted(round_["kills"].items()))
        ends = ", ".join(f"{count} x {code}" for code, count in round_["ends"].items())
        memory = (str(round_["driver_peak_mb"]), str(round_["controller_peak_mb"]))
        cells = (str(round_["round"]), f"{round_['seconds'] / 60:.1f}", killed, ends)
        counts = (f"{round_['completions']:,}", f"{round_['answers']:,}")
        result.add_row(*cells, *counts, *memory, round_["wrong"] or "nothing")
    return result


if __name__ == "__main__":
    sys.exit(main())
