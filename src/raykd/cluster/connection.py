"""Connection to the Ray cluster at RAY_ADDRESS, or to a new local one."""

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
from raykd.display import summary
from raykd.errors import StageError, UserError
from raykd.runtime import console, metrics, signals

# Blocks that a Ray Data task may yield in each iteration of the scheduler.
STREAMING_BLOCKS_PER_TASK = 16
# Ray's default port; `_free_port` tries the following ones.
DASHBOARD_PORT = 8265
DASHBOARD_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
# Ray 2.60 sets it to `token` in a process that starts a local cluster, or finds a token on this machine.
AUTH_MODE_VARIABLE = "RAY_AUTH_MODE"


@contextmanager
def connected(log: Path, experiment: str, stage: str) -> Iterator[dict[str, float]]:
    """Connect to the Ray cluster at RAY_ADDRESS, or start a local one, for a `with` block.

    Args:
        log: file for the output of Ray, vLLM and other libraries in this process.
        experiment: name of the experiment.
        stage: the command, such as `train`. Ray's dashboard shows it with the experiment's name, unless this process
            runs in a submitted job: that shows the metadata of its submission.

    Yields:
        The cluster's `capacity()`.
    """
    with console.redirect_library_output(log) as log:
        address = os.environ.get("RAY_ADDRESS")
        # The dashboard shows `job_name` as the job's name.
        metadata = {"job_name": f"{experiment} {stage}", "experiment": experiment, "stage": stage}
        job_config = JobConfig(metadata=metadata)
        context = _join(address, job_config) if address else _start_local(job_config)
        with signals.graceful_shutdown():
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            data.print_on_execution_start = False
            # A block is one call of the teacher.
            compat.set_output_buffer_blocks(data, STREAMING_BLOCKS_PER_TASK)
            console.print_status(describe_cluster(context, address, log))
            try:
                with cleanup_on_exit() if address else nullcontext():
                    yield capacity()
            finally:
                metrics.reset()
                ray.shutdown()


def describe_cluster(context: Any, address: str | None, log: Path) -> str:
    """Return the line that names the cluster, its dashboard and the logs.

    Args:
        context: result of `ray.init`.
        address: RAY_ADDRESS; None for a local cluster.
        log: this process' log.
    """
    parts = [f"Ray {ray.__version__}: {address or 'local'}"]
    if context.dashboard_url:
        parts.append(f"dashboard: http://{context.dashboard_url}")
        if os.environ.get(AUTH_MODE_VARIABLE, "").lower() == "token":
            # Its pages load without the token, and ask for it before they show anything.
            parts[-1] += " (`ray get-auth-token` prints its token)"
    parts.append(f"logs: {log}")
    # Ray Client (ray://) has no node on this machine, and its context no `address_info`.
    session_dir = getattr(context, "address_info", {}).get("session_dir")
    if session_dir:
        ray_logs = str(Path(session_dir) / "logs")
        # A node keeps the logs of its own processes, below its own --temp-dir.
        parts[-1] += f", {ray_logs} (this node; others keep their own)" if address else f", {ray_logs}"
    return "  ".join(parts)


def _join(address: str, job_config: JobConfig) -> Any:
    try:
        return ray.init(address=address, job_config=job_config, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        # Ray raises ValueError for a malformed address.
        message = summary(error)
        raise UserError(
            f"no Ray cluster at RAY_ADDRESS={address}: {message}; set RAY_ADDRESS to the cluster's address, or unset it"
        ) from None


def _start_local(job_config: JobConfig) -> Any:
    """Start a local cluster, separate from others on this machine.

    Ray Train (2.60) asks the API server whether the controller of an early-stopped trial is alive, and frees the
    trial's placement group if it is not. The process that asks inherits the server's address from this environment;
    without it, it asks the first server that it finds on the machine, and the placement group is never freed.
    """
    previous = os.environ.get(DASHBOARD_ADDRESS_VARIABLE)
    port = _free_port()
    os.environ[DASHBOARD_ADDRESS_VARIABLE] = f"http://127.0.0.1:{port}"
    try:
        # Without "local", ray.init() joins any cluster that runs on this machine.
        return ray.init(address="local", dashboard_port=port, job_config=job_config, log_to_driver=False)
    finally:
        # This process may connect to another cluster later.
        del os.environ[DASHBOARD_ADDRESS_VARIABLE]
        if previous is not None:
            os.environ[DASHBOARD_ADDRESS_VARIABLE] = previous


def _free_port() -> int:
    last = DASHBOARD_PORT + 999
    for port in range(DASHBOARD_PORT, last + 1):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise StageError(f"no free port from {DASHBOARD_PORT} to {last} for Ray's dashboard; stop a local Ray cluster")
