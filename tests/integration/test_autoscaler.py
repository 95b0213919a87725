"""An autoscaling cluster: nodes of Ray's fake provider, launched by its real autoscaler."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from autoscaling_cluster import autoscaling_head
from raykd.cluster import autoscaler, connection
from raykd.config.training import Train
from raykd.tuning import slots

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A head of one core, whose autoscaler may add two nodes of two cores each."""
    types = {"worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}}
    with autoscaling_head(tmp_path_factory.mktemp("autoscaler"), types, idle_timeout_minutes=10) as head:
        yield head


def count_slots(address: str, file: Path, log: Path) -> tuple[float, int, int, float]:
    """Return the capacity, the trial slots before and after nodes are added, and the number of cores afterwards.

    More trials are requested than fit, so the request launches all nodes that the limits allow.
    """
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "RAYKD_CLUSTER": str(file)}
    with connection.connected(log, "autoscaling", "test") as capacity:
        groups = [slots.WorkerGroup(Train(num_workers=1), "cpu")]
        before = slots.num_trial_slots(groups, {}, limit=4)
        with autoscaler.node_requests() as request_nodes:
            requester = slots.AutoscalerRequester(
                request_nodes, trial_bundles=[{"CPU": 1}], min_workers=1, max_trials=9
            )
            requester.update(before, 9)
            deadline = time.monotonic() + 240
            while ray.cluster_resources()["CPU"] < 5 and time.monotonic() < deadline:
                time.sleep(1)
            return capacity["CPU"], before, slots.num_trial_slots(groups, {}, limit=4), ray.cluster_resources()["CPU"]


def test_trial_request_adds_nodes_and_nodes_add_trial_slots(two_nodes: tuple[str, Path], tmp_path: Path):
    # In another process, because Ray ends a process whose head node has stopped.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(count_slots, *two_nodes, tmp_path / "driver.log").result(timeout=400) == (5, 1, 4, 5)


def request_nodes_forever(address: str, file: Path, log: Path) -> None:
    """Start a run that requests nodes and does not end by itself."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "RAYKD_CLUSTER": str(file)}
    with connection.connected(log, "autoscaling", "test"), autoscaler.node_requests() as request_nodes:
        request_nodes([{"CPU": 1}] * 4)
        time.sleep(600)


def num_requested_bundles(address: str) -> int:
    """Return the number of bundles in the autoscaler requests."""
    os.environ |= {"RAY_AUTH_MODE": "disabled"}
    demand = get_cluster_status(address).resource_demands.cluster_constraint_demand
    return sum(each.count for request in demand for each in request.bundles_by_count)


# Takes 30 s. No test in `make test` covers this.
@pytest.mark.slow
def test_autoscaler_request_of_killed_run_is_removed(two_nodes: tuple[str, Path], tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    run = context.Process(target=request_nodes_forever, args=(*two_nodes, tmp_path / "driver.log"))
    run.start()
    try:
        with ProcessPoolExecutor(1, context) as pool:

            def is_eventually(number: int) -> bool:
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline:
                    if pool.submit(num_requested_bundles, two_nodes[0]).result(timeout=60) == number:
                        return True
                    time.sleep(1)
                return False

            assert is_eventually(4)
            run.kill()
            run.join(timeout=60)
            assert is_eventually(0)
    finally:
        run.kill()
        run.join(timeout=60)
