"""Connect to the Ray cluster named by RAY_ADDRESS, or start a local one."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.job_config import JobConfig

from raykd import compat
from raykd.cluster.capacity import capacity
from raykd.cluster.cleanup import cleanup_on_exit
from raykd.errors import StageError, UserError
from raykd.runtime import console, metrics, signals

# Blocks that a task of Ray Data may hand on between two looks of its scheduler.
STREAMING_BLOCKS_PER_TASK = 16
RAY_LOGS = "/tmp/ray/session_latest/logs"
# Ray's own; the next that is free where it is taken.
DASHBOARD_PORT = 8265
API_SERVER = "RAY_API_SERVER_ADDRESS"


@contextmanager
def connected(log: Path, experiment: str, stage: str) -> Iterator[dict[str, float]]:
    """Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine, for a `with` block.

    Args:
        log: the file for what Ray, vLLM and other libraries have to say in this process.
        experiment: the experiment's name.
        stage: what this process does of it. Ray's dashboard shows both of a process that joins by itself; of one that
            was submitted as a job, what was said when it was submitted.

    Yields:
        `capacity()`.
    """
    with console.redirect_library_output(log) as log:
        address = os.environ.get("RAY_ADDRESS")
        # The dashboard calls a job by its `job_name`.
        told = {"job_name": f"{experiment} {stage}", "experiment": experiment, "stage": stage}
        job = JobConfig(metadata=told)
        context = _join(address, job) if address else _start_local(job)
        with signals.graceful_shutdown():
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            data.print_on_execution_start = False
            # A block of ours is a call.
            compat.set_output_buffer_blocks(data, STREAMING_BLOCKS_PER_TASK)
            dashboard = f"  dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
            console.print_status(f"Ray {ray.__version__}: {address or 'local'}{dashboard}  logs: {log}, {RAY_LOGS}")
            try:
                with cleanup_on_exit() if address else nullcontext():
                    yield capacity()
            finally:
                metrics.reset()
                ray.shutdown()


def _join(address: str, job: JobConfig) -> Any:
    try:
        return ray.init(address=address, job_config=job, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        # A ValueError where it is no address.
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"no Ray cluster at RAY_ADDRESS={address}: {said}; set it to the cluster's, or unset it"
        ) from None


def _start_local(job: JobConfig) -> Any:
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
        return ray.init(address="local", dashboard_port=port, job_config=job, log_to_driver=False)
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
    raise StageError(f"no port is free from {DASHBOARD_PORT} on, which Ray's dashboard needs")
