"""Scale: many rows and many replicas, with a simulated engine of fixed latency behind raykd's Ray Serve and Data path.

    python benchmarks/scale.py [--rows 1000,10000,100000] [--replicas 1,2,4,8,16] [--rounds 1]

The measurement covers everything except the engine: reading problems, rendering prompts, calls, checking answers and
writing Parquet. Nodes are simulated too: each is a separate raylet on this machine. A simulated replica processes four
calls at a time, each in `latency` seconds, so its maximum rate is known. Four more calls wait in its queue.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lib import bench

SIDE = Path(__file__).parent / "lib" / "scale_side.py"
ROWS_PER_REPLICA, REPLICAS_PER_NODE = 1280, 2
CALLS_PER_REPLICA = 4


def main() -> int:
    parser = bench.parser(__doc__, "scale", rounds=1)
    parser.add_argument("--rows", default="1000,10000,100000,1000000", help="numbers of rows, comma-separated")
    parser.add_argument("--replicas", default="1,2,4,8,16", help="numbers of replicas, comma-separated")
    parser.add_argument("--latency", default="4,2,1", help="seconds of a call in the replica series, comma-separated")
    parser.add_argument("--rows-latency", type=float, default=0.5, help="seconds of a call in the row series")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per call")
    options = parser.parse_args()
    common = {"batch": options.batch_size, "calls": CALLS_PER_REPLICA}
    by_rows = [
        {"rows": rows, "replicas": 2, "nodes": 1, "latency_s": options.rows_latency, **common}
        for rows in numbers(options.rows)
    ]
    by_replicas = [
        {
            "rows": ROWS_PER_REPLICA * replicas,
            "replicas": replicas,
            "nodes": max(1, replicas // REPLICAS_PER_NODE),
            "latency_s": latency,
            **common,
        }
        for latency in numbers(options.latency)
        for replicas in numbers(options.replicas)
    ]
    simulated = f"simulated engines, {options.batch_size} rows per call"
    rows = table(f"Rows ({simulated})", by_rows, options.rounds)
    replicas = table(f"Replicas ({simulated}, simulated nodes)", by_replicas, options.rounds)
    bench.write(options.out, options=vars(options), rows=rows, replicas=replicas)
    return 0


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def table(title: str, points: list[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Measure points, and print their rates as a fraction of the simulated engines' maximum rate."""
    sides = {point_name(point): lambda point=point: measure(point) for point in points}
    rows = bench.medians(bench.alternate(sides, rounds)) if points else {}
    for point in points:
        figures = rows[point_name(point)]
        figures["of the engines' rate"] = figures["rows/s"] / capacity(point)
    bench.table(title, rows)
    return rows


def point_name(point: dict[str, Any]) -> str:
    replicas = "1 replica" if point["replicas"] == 1 else f"{point['replicas']} replicas"
    nodes = "1 node" if point["nodes"] == 1 else f"{point['nodes']} nodes"
    return f"{point['rows']:,} rows, {replicas} on {nodes}, {point['latency_s']:g} s per call"


def capacity(point: dict[str, Any]) -> float:
    """Return the rows per second of simulated engines that are never idle."""
    return point["replicas"] * point["calls"] * point["batch"] / point["latency_s"]


def measure(point: dict[str, Any]) -> dict[str, float]:
    """Measure one point in a separate process."""
    process = subprocess.run([sys.executable, str(SIDE), json.dumps(point)], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{point_name(point)}: {process.stderr[-3000:]}")
    return json.loads(process.stdout)


if __name__ == "__main__":
    sys.exit(main())
