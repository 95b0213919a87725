"""Soak: the quickstart over and over on one cluster, while a seeded script kills what it finds.

    python benchmarks/soak.py --minutes 60 [--seed 0] [--out soak.json] [key.path=value ...]

A cluster of three of Ray's nodes on this machine; each round is an experiment of its own, typed again after whatever
ended it, until it is complete; then its rows are counted. Prints a table, a row a round, and writes it as JSON.
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
# What is killed, by a word of its command line; and how often, in seconds.
PROCESSES = {"engine": "EngineCore", "replica": "ServeReplica", "worker": "RayTrainWorker", "actor": "MapWorker"}
EVERY_S = (20, 90)
PREFERRED = 3
# No round takes so many attempts unless something is wrong for good.
MOST_ATTEMPTS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="no round is begun after so many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when (0)")
    parser.add_argument("--out", type=Path, default=Path("soak.json"), help="where the table goes as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields of configs/quickstart.yaml")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    # Ray Train needs the dashboard to free what an early-stopped trial held.
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    rounds: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="soak") as folder:
            while time.monotonic() - started < 60 * options.minutes:
                each = soak(cluster, chance, Path(folder) / str(len(rounds)), options.overrides, len(rounds))
                rounds.append(each)
                print(json.dumps(each), flush=True)
                options.out.write_text(json.dumps({"seed": options.seed, "rounds": rounds}, indent=1))
    finally:
        cluster.shutdown()
    Console(width=140).print(table(rounds))
    return 0 if all(each["wrong"] == "" for each in rounds) else 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def soak(cluster: Cluster, chance: random.Random, root: Path, overrides: list[str], number: int) -> dict[str, Any]:
    """One experiment, to its end."""
    root.mkdir()
    typed = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={root}", f"name=soak-{number}", *overrides]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    kills: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    peak: dict[str, float] = {"driver": 0.0, "controller": 0.0}
    began = time.monotonic()
    for _ in range(MOST_ATTEMPTS):
        with (root / "log").open("a") as log:
            run = subprocess.Popen([RAYKD, *typed], env=environment, stdout=log, stderr=subprocess.STDOUT)
        over = threading.Event()
        watching = threading.Thread(target=watch, args=(run.pid, peak, over))
        watching.start()
        try:
            while run.poll() is None:
                try:
                    run.wait(chance.uniform(*EVERY_S))
                except subprocess.TimeoutExpired:
                    kills[kill(cluster, run, chance)] += 1
        finally:
            over.set()
            watching.join()
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
        **counted(typed),
    }


def kill(cluster: Cluster, run: "subprocess.Popen[bytes]", chance: random.Random) -> str:
    """Kills something that is there; returns what."""
    there = {name: found for name, word in PROCESSES.items() if (found := processes(word))}
    # A run that has just begun has nothing else to be killed: else it would seldom be anything but the run.
    what = chance.choice([*PREFERRED * sorted(there), "driver", "driver, SIGTERM", "node"])
    if what in there:
        victim = chance.choice(there[what])
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return "nothing"
    elif what == "node":
        cluster.remove_node(chance.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)), False)
        time.sleep(chance.uniform(0, 20))
        cluster.add_node(num_cpus=1)
    else:
        run.send_signal(signal.SIGTERM if "SIGTERM" in what else signal.SIGKILL)
        run.wait(60)
    return what


def processes(word: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def watch(driver: int, peak: dict[str, float], over: threading.Event) -> None:
    """Notes the most memory (resident, MB) of the driver and of Serve's controller."""
    while not over.wait(2):
        found = {"driver": [driver], "controller": [each.pid for each in processes("ServeController")]}
        for name, pids in found.items():
            peak[name] = max([peak[name], *map(resident, pids)])


def resident(pid: int) -> float:
    try:
        return psutil.Process(pid).memory_info().rss / 1e6
    except psutil.Error:
        return 0.0


def counted(typed: list[str]) -> dict[str, Any]:
    """How many rows there are, and what is wrong with them: empty where every one is there once."""
    plan = resolve(load_experiment(typed[1], typed[2:]))
    wrong = [] if plan.is_complete() else ["not complete"]
    completions = 0
    num_train, num_test = (datasets.split_size(plan.problems, split) for split in ("train", "test"))
    for request in plan.required_sets:
        rows = row_store.read_rows(request.folder, schemas.COMPLETION, ["completion_id", "error"])
        completions += len(rows)
        wrong += once(rows, "completion_id", request.strategy_name, num_train * request.num_samples)
    answers = row_store.read_rows(plan.predictions, schemas.PREDICTION, ["prediction_id", "error"])
    expected = num_test * len(plan.eval_models()) * plan.experiment.evaluate.num_samples
    wrong += once(answers, "prediction_id", "students", expected)
    if plan.attention and plan.experiment.attention:
        read = row_store.read_rows(plan.attention, schemas.ATTENTION, ["attention_id", "error"])
        texts = min(num_test, plan.experiment.attention.num_problems) * len(plan.eval_models())
        wrong += once(read, "attention_id", "attention", texts)
    return {"completions": completions, "answers": len(answers), "wrong": "; ".join(wrong)}


def once(rows: Any, name: str, whose: str, expected: int) -> list[str]:
    ids, errors = rows[name].to_pylist(), [error for error in rows["error"].to_pylist() if error]
    doubled = len(ids) - len(set(ids))
    missing = [f"{whose}: {len(set(ids))} of {expected}"] * (len(set(ids)) != expected)
    return missing + [f"{whose}: {doubled} doubled"] * bool(doubled) + [f"{whose}: {len(errors)} failed"] * bool(errors)


def table(rounds: list[dict[str, Any]]) -> Table:
    made = Table(title="Soak", box=None)
    for name in ("Round", "Minutes", "Killed", "Ends", "Completions", "Answers", "Driver MB", "Controller MB", "Wrong"):
        made.add_column(name)
    for each in rounds:
        killed = ", ".join(f"{count} {name}" for name, count in sorted(each["kills"].items()))
        ends = ", ".join(f"{count} x {code}" for code, count in each["ends"].items())
        memory = (str(each["driver_peak_mb"]), str(each["controller_peak_mb"]))
        cells = (str(each["round"]), f"{each['seconds'] / 60:.1f}", killed, ends)
        counts = (f"{each['completions']:,}", f"{each['answers']:,}")
        made.add_row(*cells, *counts, *memory, each["wrong"] or "nothing")
    return made


if __name__ == "__main__":
    sys.exit(main())
