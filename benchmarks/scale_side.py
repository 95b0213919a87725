"""One point of the scale benchmark, in a process of its own: `python scale_side.py JSON`.

The argument: `rows`, `replicas`, `nodes` of a cluster that is pretended on this machine, of the simulated engine
`latency_s`, and `batch`, the rows of a call. Prints one line of JSON: rows per second from the first call to the last
row written, seconds of the whole stage, the most memory that this process, which is the run's driver, had, and the
processor time that the driver and the actors of the path took for a row.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench
import numpy as np
import psutil
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import ProxyLocation

from raykd.cluster.connection import connected
from raykd.config.loading import load_experiment
from raykd.pipeline import run
from raykd.pipeline.plan import resolve
from raykd.storage import row_store
from raykd.teacher import generate

# Of a pretended node: Ray's workers, and simulated engines; bytes of its object store.
NODE: dict[str, Any] = {"num_cpus": 2, "resources": {"engine": 2}, "object_store_memory": 256 << 20}
TEXT = "Each of the boxes holds the same number, so they hold them all together. " * 3 + "\n#### 42"
NUM_TOKENS = 64
APP = "simulated"
# Calls that an engine answers at a time.
CALLS = 4
# What Ray calls the processes whose time is told.
ROLES = {"TeacherClient": "asking", "BuildTeacherPrompts": "rendering", "ServeController": "controller"}
LOOKS_EVERY_S = 1.0


class Simulated:
    """Stands in for an engine: whatever it is asked, the answer takes as long, for so many calls at a time.

    Args:
        calls: how many it answers at a time.
        latency_s: seconds that each takes.
    """

    def __init__(self, calls: int, latency_s: float) -> None:
        self._room, self._latency_s = asyncio.Semaphore(calls), latency_s

    async def answer(
        self, prompts: list[list[int]], sampling: dict[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """As `raykd.teacher.deployment.TeacherDeployment.answer`."""
        async with self._room:
            await asyncio.sleep(self._latency_s)
        tokens = np.arange(NUM_TOKENS, dtype=np.int32)
        return [{"text": TEXT, "token_ids": tokens, "finish_reason": "stop"} for _ in prompts]


def main() -> None:
    told = json.loads(sys.argv[1])
    # What libraries print must not come between.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(told["nodes"] - 1):
            cluster.add_node(**NODE)
        os.environ["RAY_ADDRESS"] = str(cluster.address)
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            figures = measure(told, Path(folder))
    finally:
        cluster.shutdown()
    print(json.dumps(figures), file=answer, flush=True)


def measure(told: dict[str, Any], root: Path) -> dict[str, float]:
    """All rows, from problems in Parquet to completions in Parquet and their manifest."""
    file = root / "experiment.yaml"
    file.write_text(json.dumps(experiment_of(told)))
    plan = resolve(load_experiment(file, [f"storage={root}"]))
    run.start(plan, "benchmark")
    teacher, (request,) = plan.experiment.teacher, plan.required_sets
    with connected(root / "log", "scale", "benchmark"):
        deployment: Any = serve.deployment(Simulated)
        deployment = deployment.options(
            num_replicas=told["replicas"],
            max_ongoing_requests=2 * teacher.concurrency,
            ray_actor_options={"num_cpus": 0, "resources": {"engine": 1}},
        )
        serve.start(proxy_location=ProxyLocation.Disabled)
        serve.run(deployment.bind(CALLS, told["latency_s"]), name=APP, route_prefix=None)
        before, began = bench.peak_mb(), time.monotonic()
        with processor_seconds() as taken:
            context = generate.GenerationContext(
                plan.problems, teacher, plan.experiment.prompt.instruction, APP, plan.experiment.name, {}
            )
            generate.generate_completions([request], context)
        stage = time.monotonic() - began
        serve.shutdown()
    peak = bench.peak_mb()
    manifest = row_store.read_manifest(request.folder)
    assert manifest and manifest["rows"] == told["rows"]
    written = [part.stat().st_mtime for part in row_store.list_parts(request.folder)]
    busy = max(written) - min(written) + told["latency_s"]
    figures = {"rows/s": told["rows"] / busy, "stage, s": stage, "driver, MB": peak, "before, MB": before}
    return figures | {f"{name}, ms/row": 1000 * taken[name] / told["rows"] for name in taken}


@contextmanager
def processor_seconds() -> Iterator[dict[str, float]]:
    """What the driver and the actors of the path take of the processors during a `with` block."""
    taken = dict.fromkeys(("driver", *ROLES.values()), 0.0)
    last: dict[int, float] = {}
    ended, own = threading.Event(), psutil.Process()

    def look() -> None:
        for process in own.children(recursive=True):
            try:
                title, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.Error:
                continue
            now = times.user + times.system
            role = next((role for name, role in ROLES.items() if title.startswith("ray::") and name in title), None)
            if role:
                taken[role] += now - last.get(process.pid, 0.0)
            last[process.pid] = now

    def watch() -> None:
        while not ended.wait(LOOKS_EVERY_S):
            look()

    look()
    taken.update(dict.fromkeys(taken, 0.0))
    watcher, before = threading.Thread(target=watch), time.process_time()
    watcher.start()
    try:
        yield taken
    finally:
        ended.set()
        watcher.join()
        taken["driver"] = time.process_time() - before


def experiment_of(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "scale",
        "dataset": {"source": "demo", "num_train": told["rows"], "num_test": 1},
        "teacher": {
            "model": "raykd/demo-teacher",
            "replicas": {"min": told["replicas"], "max": told["replicas"]},
            "concurrency": 2 * CALLS,
            "batch_size": told["batch"],
        },
        "student": {"model": "raykd/demo-student"},
        "arms": {"one": {"prompt.strategy": "ground_truth"}},
    }


if __name__ == "__main__":
    main()
