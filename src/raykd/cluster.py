"""Cluster: joined where there is one, started on this machine where there is none; quiet either way."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.job_config import JobConfig

from raykd import compat, metrics, nodes, progress, signals
from raykd.faults import StageError, UserError
from raykd.watch import ask, given_back, taken_back

# Blocks that a task of Ray Data may hand on between two looks of its scheduler.
BLOCKS_AT_A_LOOK = 16
LOGS = "/tmp/ray/session_latest/logs"
# Ray's own; the next that is free where it is taken.
DASHBOARD_PORT = 8265
API_SERVER = "RAY_API_SERVER_ADDRESS"
# What the cluster may grow to: a file of `ray up`, or of the same words; and where Ray's launcher puts it on the head.
CLUSTER_FILE, LAUNCHED_BY = "RAYKD_CLUSTER", Path("~/ray_bootstrap_config.yaml")


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
    with progress.libraries_write_to(log) as log:
        address = os.environ.get("RAY_ADDRESS")
        # The dashboard calls a job by its `job_name`.
        told = {"job_name": f"{experiment} {stage}", "experiment": experiment, "stage": stage}
        job = JobConfig(metadata=told)
        context = _join(address, job) if address else _start(job)
        with signals.end_in_order():
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            data.print_on_execution_start = False
            # A block of ours is a call.
            compat.hand_on_blocks(data, BLOCKS_AT_A_LOOK)
            dashboard = f"  dashboard: http://{context.dashboard_url}" if context.dashboard_url else ""
            progress.say(f"Ray {ray.__version__}: {address or 'local'}{dashboard}  logs: {log}, {LOGS}")
            try:
                with given_back() if address else nullcontext():
                    yield capacity()
            finally:
                metrics.forget()
                ray.shutdown()


def live() -> dict[str, float]:
    """What the cluster's nodes have now: Ray's names, and `GPU:H100` and such for the GPUs of nodes of a kind."""
    return nodes.of_ray(ray.nodes()).resources


def capacity(joined: bool | None = None) -> dict[str, float]:
    """What the cluster has, or may come to have by its autoscaler: nodes that go when idle are not there at first.

    Ray does not tell what its autoscaler may bring. `ray up` leaves its file on the head, where jobs run; elsewhere the
    variable `RAYKD_CLUSTER` names one.

    Args:
        joined: whether the cluster is one that goes on when this process ends; None for `is_joined()`.

    Raises:
        UserError: where the file that is named is none of `ray up`.
    """
    there, grown = live(), _grown(is_joined() if joined is None else joined)
    may_come = grown.resources if grown else {}
    return {name: max(there.get(name, 0), may_come.get(name, 0)) for name in {*there, *may_come}}


def _grown(joined: bool) -> nodes.Cluster | None:
    """The cluster as its autoscaler may make it; None where that is not told."""
    named = os.environ.get(CLUSTER_FILE)
    file = Path(named) if named else LAUNCHED_BY.expanduser() if joined else None
    if file is None or not (named or file.exists()):
        return None
    try:
        return nodes.read(file)
    except UserError:
        if named:
            raise
        # On machines of one's own it does not say what they have, and all of them are there.
        return None


def may_hold(groups: Sequence[Sequence[nodes.Bundle]]) -> int | None:
    """How many placement groups, from the first on, the cluster can come to hold; None where that is not told."""
    grown = _grown(is_joined())
    return len(nodes.place(groups, grown)) if grown else None


def is_on_a_node(group: Sequence[nodes.Bundle]) -> bool:
    """Whether a node, of those that are there or may come, holds all of a placement group."""
    there, grown = nodes.of_ray(ray.nodes()), _grown(is_joined())
    kinds = [*there.nodes, *(grown.nodes if grown else ())]
    return any(nodes.place([group], nodes.Cluster(each.name, (replace(each, count=1),))) for each in kinds)


def is_joined() -> bool:
    """Whether the cluster is one that goes on when this process ends."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def requested() -> Iterator[Callable[[Sequence[nodes.Bundle]], None]]:
    """What asks the cluster's autoscaler, where it has one, for nodes that hold all of some bundles, in a `with` block.

    What is asked by tasks and actors that wait is asked one by one, and only as far as they are started. A cluster has
    one such request, the last that was made by anybody; where it cannot have all of it, Ray brings nothing at all.
    """

    with taken_back() if is_joined() else nullcontext():
        yield ask


def _join(address: str, job: JobConfig) -> Any:
    try:
        return ray.init(address=address, job_config=job, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        # A ValueError where it is no address.
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"no Ray cluster at RAY_ADDRESS={address}: {said}; set it to the cluster's, or unset it"
        ) from None


def _start(job: JobConfig) -> Any:
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
