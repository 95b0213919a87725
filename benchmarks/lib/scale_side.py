"""One point of the scale benchmark, in a separate process: `python scale_side.py JSON`.

The argument has `rows`, `replicas`, the simulated `nodes`, the simulated engine's `latency_s` and concurrent `calls`,
and `batch`, the rows per call. The output is one line of JSON: rows per second from the first call to the last written
row, seconds of the stage, peak memory of this process, which is the driver, and processor time per row of the driver
and of the actors.
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

import numpy as np
import psutil
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import ProxyLocation

import bench
from raykd.cluster.connection import connected
from raykd.config.loading import load_experiment
from raykd.pipeline import run
from raykd.pipeline.plan import resolve
from raykd.storage import row_store
from raykd.teacher import generate

# The resources of a simulated node.
NODE: dict[str, Any] = {"num_cpus": 2, "resources": {"engine": 2}, "object_store_memory": 256 << 20}
TEXT = "Each of the boxes holds the same number, so they hold them all together. " * 3 + "\n#### 42"
NUM_TOKENS = 64
APP = "simulated"
# Names of Ray's processes, and their names in the output.
ROLES = {"TeacherClient": "client", "BuildTeacherPrompts": "prompts", "ServeController": "controller"}
POLL_INTERVAL_S = 1.0


class SimulatedEngine:
    """An engine that answers every call with the same text after a fixed time.

    Args:
        calls: number of concurrent calls.
        latency_s: seconds of each call.
    """

    def __init__(self, calls: int, latency_s: float) -> None:
        self._slots, self._latency_s = asyncio.Semaphore(calls), latency_s

    async def answer(
        self, prompts: list[list[int]], sampling: dict[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Mimic `raykd.teacher.deployment.TeacherDeployment.answer`."""
        async with self._slots:
            await asyncio.sleep(self._latency_s)
        tokens = np.arange(NUM_TOKENS, dtype=np.int32)
        return [{"text": TEXT, "token_ids": tokens, "finish_reason": "stop"} for _ in prompts]


def main() -> None:
    point = json.loads(sys.argv[1])
    # Libraries print to standard output too: they get standard error instead.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(point["nodes"] - 1):
            cluster.add_node(**NODE)
        os.environ["RAY_ADDRESS"] = str(cluster.address)
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            figures = measure(point, Path(folder))
    finally:
        cluster.shutdown()
    print(json.dumps(figures), file=output, flush=True)


def measure(point: dict[str, Any], root: Path) -> dict[str, float]:
    """Generate all rows, from problems in Parquet to completions in Parquet and their manifest."""
    file = root / "experiment.yaml"
    file.write_text(json.dumps(experiment_of(point)))
    plan = resolve(load_experiment(file, [f"storage={root}"]))
    run.start(plan, "benchmark")
    teacher, (completion_set,) = plan.experiment.teacher, plan.required_sets
    with connected(root / "log", "scale", "benchmark"):
        deployment: Any = serve.deployment(SimulatedEngine)
        deployment = deployment.options(
            num_replicas=point["replicas"],
            max_ongoing_requests=2 * teacher.concurrency,
            ray_actor_options={"num_cpus": 0, "resources": {"engine": 1}},
        )
        serve.start(proxy_location=ProxyLocation.Disabled)
        serve.run(deployment.bind(point["calls"], point["latency_s"]), name=APP, route_prefix=None)
        before, began = bench.peak_mb(), time.monotonic()
        with processor_seconds() as cpu_seconds:
            context = generate.GenerationContext(
                problems_dir=plan.problems,
                teacher=teacher,
                instruction=plan.experiment.prompt.instruction,
                app=APP,
                experiment=plan.experiment.name,
            )
            generate.generate_completions([completion_set], context)
        stage = time.monotonic() - began
        serve.shutdown()
    peak = bench.peak_mb()
    manifest = row_store.read_manifest(completion_set.folder)
    assert manifest and manifest["rows"] == point["rows"]
    written = [part.stat().st_mtime for part in row_store.list_parts(completion_set.folder)]
    busy = max(written) - min(written) + point["latency_s"]
    figures = {"rows/s": point["rows"] / busy, "stage, s": stage, "driver, MB": peak, "before, MB": before}
    return figures | {f"{name}, ms/row": 1000 * seconds / point["rows"] for name, seconds in cpu_seconds.items()}


@contextmanager
def processor_seconds() -> Iterator[dict[str, float]]:
    """Yield the processor seconds of the driver and of the actors, complete at the end of the block."""
    cpu_seconds = dict.fromkeys(("driver", *ROLES.values()), 0.0)
    last: dict[int, float] = {}
    stopped, driver = threading.Event(), psutil.Process()

    def poll() -> None:
        for process in driver.children(recursive=True):
            try:
                title, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.Error:
                continue
            now = times.user + times.system
            role = next((role for name, role in ROLES.items() if title.startswith("ray::") and name in title), None)
            if role:
                cpu_seconds[role] += now - last.get(process.pid, 0.0)
            last[process.pid] = now

    def poll_until_stopped() -> None:
        while not stopped.wait(POLL_INTERVAL_S):
            poll()

    # The first poll sets the starting point of each process.
    poll()
    cpu_seconds.update(dict.fromkeys(cpu_seconds, 0.0))
    poller, before = threading.Thread(target=poll_until_stopped), time.process_time()
    poller.start()
    try:
        yield cpu_seconds
    finally:
        stopped.set()
        poller.join()
        cpu_seconds["driver"] = time.process_time() - before


def experiment_of(point: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "scale",
        "dataset": {"source": "demo", "num_train": point["rows"], "num_test": 1},
        "teacher": {
            "model": "raykd/demo-teacher",
            "replicas": {"min": point["replicas"], "max": point["replicas"]},
            "concurrency": 2 * point["calls"],
            "batch_size": point["batch"],
        },
        "student": {"model": "raykd/demo-student"},
        "arms": {"one": {"prompt.strategy": "ground_truth"}},
    }


if __name__ == "__main__":
    main()
