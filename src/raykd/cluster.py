"""Cluster: joined where there is one, started on this machine where there is none; quiet either way."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data

LOGS = "/tmp/ray/session_latest/logs"


@contextmanager
def connected(log: Path) -> Iterator[dict[str, float]]:
    """Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine, for a `with` block.

    Args:
        log: the file for what Ray, vLLM and other libraries have to say in this process.

    Yields:
        The cluster's resources, as Ray names them.
    """
    with _libraries_write_to(log):
        # A plain ray.init() would join whatever cluster happens to run on this machine.
        address = os.environ.get("RAY_ADDRESS") or "local"
        context = ray.init(address=address, log_to_driver=False)
        data = ray.data.DataContext.get_current()
        data.enable_progress_bars = False
        data.print_on_execution_start = False
        dashboard = f"  dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
        print(f"Ray {ray.__version__}: {address}{dashboard}  logs: {log}, {LOGS}", file=sys.stderr)
        try:
            yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
        finally:
            ray.shutdown()


@contextmanager
def _libraries_write_to(log: Path) -> Iterator[None]:
    """Sends standard error to a file, but for what is written to `sys.stderr` from here on.

    Loggers took hold of the old `sys.stderr` when they were made, and native code writes to the descriptor behind
    it: this quiets both alike, and loses nothing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    ours = sys.stderr
    ours.flush()
    with os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace") as shown, log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = shown
        try:
            yield
        finally:
            sys.stderr = ours
            os.dup2(shown.fileno(), 2)
