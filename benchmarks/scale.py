"""Scale: many rows and many replicas, by simulation: an engine of fixed latency behind raykd's own Serve and Data path.

    python benchmarks/scale.py [--rows 1000,10000,100000] [--replicas 1,2,4,8,16] [--rounds 1]

What is measured is everything but the engine: reading problems, rendering prompts, calls, checking answers, writing
Parquet. Nodes are pretended: each is a raylet of its own on this machine. A simulated replica answers four calls at a
time, each in `latency` seconds, and so has a known rate; as many calls again wait for it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
import scale_side

HERE = Path(__file__).parent
# Of each replica, where replicas are counted.
ROWS_EACH, REPLICAS_A_NODE = 1280, 2


def main() -> int:
    parser = bench.parser(__doc__, "scale", rounds=1)
    parser.add_argument("--rows", default="1000,10000,100000,1000000", help="separated by commas")
    parser.add_argument("--replicas", default="1,2,4,8,16", help="separated by commas")
    parser.add_argument("--latency", default="4,2,1", help="seconds of a call, where replicas are counted")
    parser.add_argument("--rows-latency", type=float, default=0.5, help="seconds of a call, where rows are counted")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a call")
    options = parser.parse_args()
    batch = {"batch": options.batch_size}
    by_rows = [
        {"rows": rows, "replicas": 2, "nodes": 1, "latency_s": options.rows_latency, **batch}
        for rows in numbers(options.rows)
    ]
    by_replicas = [
        {
            "rows": ROWS_EACH * replicas,
            "replicas": replicas,
            "nodes": max(1, replicas // REPLICAS_A_NODE),
            "latency_s": latency,
            **batch,
        }
        for latency in numbers(options.latency)
        for replicas in numbers(options.replicas)
    ]
    simulated = f"simulated engines, {options.batch_size} rows a call"
    rows = table(f"Rows ({simulated})", by_rows, options.rounds)
    replicas = table(f"Replicas ({simulated}, pretended nodes)", by_replicas, options.rounds)
    bench.write(options.out, options=vars(options), rows=rows, replicas=replicas)
    return 0


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def table(title: str, points: list[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Measures points, and prints them beside what their simulated engines could do."""
    sides = {named(point): lambda point=point: measure(point) for point in points}
    found = bench.medians(bench.by_turns(sides, rounds)) if points else {}
    for point in points:
        figures = found[named(point)]
        figures["of the engines' rate"] = figures["rows/s"] / capacity(point)
    bench.table(title, found)
    return found


def named(point: dict[str, Any]) -> str:
    replicas, nodes = (f"{point[name]} {name[:-1]}{'s' * (point[name] > 1)}" for name in ("replicas", "nodes"))
    return f"{point['rows']:,} rows, {replicas} on {nodes}, {point['latency_s']:g} s a call"


def capacity(point: dict[str, Any]) -> float:
    """Rows per second that the simulated engines make when they never wait."""
    return point["replicas"] * scale_side.CALLS * point["batch"] / point["latency_s"]


def measure(point: dict[str, Any]) -> dict[str, float]:
    """One point, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "scale_side.py"), json.dumps(point)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{named(point)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
