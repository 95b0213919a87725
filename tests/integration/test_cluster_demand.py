"""Demand on a cloud: Ray's real autoscaler launches and removes the nodes of cluster/aws.yaml stage by stage."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve.config import ProxyLocation
from ray.util import placement_group_table

from autoscaling_cluster import autoscaling_head
from fake_gpu import FakeGpuServer, deployed, train_on
from raykd import compat
from raykd.cluster import autoscaler, connection, nodes, resources
from raykd.config.experiment import Experiment
from raykd.planning.demand import resource_demand

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster/aws.yaml"
EXPERIMENT = Experiment.model_validate(
    {
        "name": "cloud",
        "teacher": {
            "model": "raykd/demo-teacher",
            # GPU types of the file, so that each stage uses its own pool.
            "engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "accelerator_type": "H100"},
        },
        "student": {"model": "raykd/demo-student"},
        "train": {"num_workers": 2, "accelerator_type": "A10G"},
        "max_concurrent_trials": 1,
    }
)

# Starts five nodes. In `make test`, test_autoscaler.py launches nodes, and tests/unit/planning tests the requests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A head whose autoscaler may launch the nodes of cluster/aws.yaml, with a fake provider."""
    types = yaml.safe_load(FILE.read_text())["available_node_types"]
    types = {name: {**each, "node_config": {}} for name, each in types.items() if name != "head"}
    with autoscaling_head(tmp_path_factory.mktemp("cloud"), types, idle_timeout_minutes=0.1) as head:
        yield head


def gpu_nodes() -> dict[str, int]:
    """Return the number of live nodes by GPU type."""
    found: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            found.update(
                name.removeprefix(compat.ACCELERATOR_TYPE_PREFIX)
                for name in node["Resources"]
                if compat.ACCELERATOR_TYPE_PREFIX in name
            )
    return dict(found)


def placed_bundles() -> list[list[dict[str, float]]]:
    """Return the bundles of each created placement group."""
    groups = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
    return [list(each["bundles"].values()) for each in groups]


def planned_nodes(groups: tuple[Any, ...]) -> dict[str, int]:
    """Return the number of nodes by GPU type on which `raykd plan` places the groups."""
    found = Counter(
        name for each in nodes.place(groups, nodes.read_cluster_file(FILE)) for name, _ in each.bundles_per_node
    )
    return {{"teacher": "H100", "student": "A10G"}[name]: count for name, count in found.items()}


def is_eventually(condition: Callable[[], bool], seconds: float = 240) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
    return condition()


def observe(address: str, file: Path, log: Path) -> dict[str, Any]:
    """Return the nodes during and after the teacher, and during and after training."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "RAYKD_CLUSTER": str(file)}
    observed: dict[str, Any] = {}
    with connection.connected(log, "cloud", "test") as capacity:
        observed["capacity"] = capacity
        observed["auto"] = resources.resolve_accelerator("auto", capacity)
        observed["before"] = gpu_nodes()
        teacher, train = EXPERIMENT.teacher, EXPERIMENT.train
        resources.check_engine("teacher.engine", teacher.engine, "gpu", capacity)
        serve.start(proxy_location=ProxyLocation.Disabled)
        with deployed(teacher, "gpu", FakeGpuServer) as handle:
            handle.answer.remote(0).result(timeout_s=300)
            observed["teacher"], observed["teacher's bundles"] = gpu_nodes(), placed_bundles()
        observed["teacher's nodes removed"] = is_eventually(lambda: not gpu_nodes())
        with autoscaler.node_requests() as request_nodes:
            request_nodes(resources.trial_bundles(train, "gpu"))
            workers = train_on(train)
            observed["students"] = gpu_nodes()
        observed["workers"] = len(workers)
        observed["students' nodes removed"] = is_eventually(lambda: not gpu_nodes())
        serve.shutdown()
    return observed


def test_autoscaler_adds_and_removes_nodes_of_each_stage(cloud: tuple[str, Path], tmp_path: Path):
    # In another process, because Ray ends a process whose head node has stopped.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        observed = pool.submit(observe, *cloud, tmp_path / "driver.log").result(timeout=800)
    # Capacity includes nodes that have not started.
    assert observed["before"] == {}
    assert observed["auto"] == "gpu"
    assert (observed["capacity"]["GPU:H100"], observed["capacity"]["GPU:A10G"]) == (16, 32)
    demand = resource_demand(EXPERIMENT, observed["capacity"])
    assert observed["teacher's bundles"] == [[dict(bundle) for bundle in group] for group in demand.generation]
    assert observed["teacher"] == planned_nodes(demand.generation) == {"H100": 2}
    assert observed["teacher's nodes removed"]
    assert observed["students"] == planned_nodes(demand.training) == {"A10G": 1}
    assert observed["workers"] == 2
    assert observed["students' nodes removed"]
