"""Cluster: joined where there is one, started on this machine where there is none; quiet either way."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.data

from raykd import progress

LOGS = "/tmp/ray/session_latest/logs"


@contextmanager
def connected(log: Path) -> Iterator[dict[str, float]]:
    """Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine, for a `with` block.

    Args:
        log: the file for what Ray, vLLM and other libraries have to say in this process.

    Yields:
        The cluster's resources, as Ray names them.
    """
    with progress.libraries_write_to(log):
        # A plain ray.init() would join whatever cluster happens to run on this machine.
        address = os.environ.get("RAY_ADDRESS") or "local"
        context = ray.init(address=address, log_to_driver=False)
        data = ray.data.DataContext.get_current()
        data.enable_progress_bars = False
        data.print_on_execution_start = False
        dashboard = f"  dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
        progress.say(f"Ray {ray.__version__}: {address}{dashboard}  logs: {log}, {LOGS}")
        try:
            yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
        finally:
            ray.shutdown()
