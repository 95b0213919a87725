"""Cluster: joined where there is one, started on this machine where there is none; quiet either way."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.autoscaler.sdk import request_resources

from raykd import progress, signals
from raykd.watch import given_back

# Blocks that a task of Ray Data may hand on between two looks of its scheduler.
BLOCKS_AT_A_LOOK = 16
LOGS = "/tmp/ray/session_latest/logs"
# Ray's own; the next that is free where it is taken.
DASHBOARD_PORT = 8265
API_SERVER = "RAY_API_SERVER_ADDRESS"


@contextmanager
def connected(log: Path) -> Iterator[dict[str, float]]:
    """Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine, for a `with` block.

    Args:
        log: the file for what Ray, vLLM and other libraries have to say in this process.

    Yields:
        The cluster's resources, as Ray names them.
    """
    with progress.libraries_write_to(log):
        address = os.environ.get("RAY_ADDRESS")
        context = ray.init(address=address, log_to_driver=False) if address else _start()
        with signals.end_in_order():
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            data.print_on_execution_start = False
            # Ray Data looks ten times a second, and takes at most so many blocks of a task each time, by default 2. A
            # block of ours is a call, and one task cuts up thousands: the teacher would get 20 calls a second.
            data._max_num_blocks_in_streaming_gen_buffer = BLOCKS_AT_A_LOOK
            dashboard = f"  dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
            progress.say(f"Ray {ray.__version__}: {address or 'local'}{dashboard}  logs: {log}, {LOGS}")
            try:
                with given_back() if address else nullcontext():
                    yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
            finally:
                ray.shutdown()


def is_joined() -> bool:
    """Whether the cluster is one that goes on when this process ends."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def requested(bundles: Sequence[dict[str, float]]) -> Iterator[None]:
    """Asks the cluster's autoscaler, where it has one, for nodes that hold all of this, for a `with` block.

    What is asked by tasks and actors that wait is asked one by one, and only as far as they are started.
    """
    request_resources(bundles=list(bundles))
    try:
        yield
    finally:
        request_resources(bundles=[])


def _start() -> Any:
    """A cluster of this machine's own, beside whatever others run here.

    Ray Train frees the place of a trial that was stopped early when the API server says that its controller is gone.
    The process that asks is told by the environment, which it has from here, where that server is: else it takes the
    first that it finds on the machine, and the place is never freed.
    """
    before = os.environ.get(API_SERVER)
    port = _free_port()
    os.environ[API_SERVER] = f"http://127.0.0.1:{port}"
    try:
        # A plain ray.init() would join whatever cluster happens to run on this machine.
        return ray.init(address="local", dashboard_port=port, log_to_driver=False)
    finally:
        # This process may be asked to talk to another cluster afterwards.
        del os.environ[API_SERVER]
        if before is not None:
            os.environ[API_SERVER] = before


def _free_port() -> int:
    for port in range(DASHBOARD_PORT, DASHBOARD_PORT + 1000):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError(f"no port is free from {DASHBOARD_PORT} on, which Ray's dashboard needs")
