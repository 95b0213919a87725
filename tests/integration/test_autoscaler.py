"""A cluster that grows: nodes of Ray's own fake provider, brought by its real autoscaler on this machine."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from raykd import cluster, sweep
from raykd.sections import Train
from runs import free_port, wait_for_end

RAY = str(Path(sys.executable).parent / "ray")
HEAD = "ray.head.default"
# Nothing is run on a fake node, but the autoscaler wants to be told so.
LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head of one core, whose autoscaler may add two nodes of two cores each."""
    folder, port = tmp_path_factory.mktemp("autoscaler"), free_port()
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 10,
        "provider": {
            # Not by its name: Ray's package lacks the file of its defaults.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        **{key: [] for key in LISTS},
    }
    file, log = folder / "cluster.json", folder / "head.log"
    file.write_text(json.dumps(config))
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_AUTH_MODE": "disabled",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}", "--include-dashboard=false"]
    with log.open("w") as stream:
        head = subprocess.Popen(
            [*command, "--node-ip-address=127.0.0.1", f"--autoscaling-config={file}"],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=120)
        for process in family:
            # The fake nodes are the autoscaler's, which does not take them down.
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for_end(family)


def grow(address: str, log: Path) -> tuple[float, int, int, float]:
    """How many cores there may be; for how many of four trials there is room before and after they come, and how many
    have come."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}
    with cluster.connected(log) as capacity:
        room = sweep._room([(Train(num_workers=1), "cpu")], {}, at_most=4)
        before = room()
        with cluster.requested([{"CPU": 1}] * 5):
            deadline = time.monotonic() + 240
            while ray.cluster_resources()["CPU"] < 5 and time.monotonic() < deadline:
                time.sleep(1)
            return capacity["CPU"], before, room(), ray.cluster_resources()["CPU"]


def test_nodes_come_when_trials_want_room_and_trials_when_nodes_come(growing: str, tmp_path: Path):
    # Ray ends a process whose head is gone.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(grow, growing, tmp_path / "driver.log").result(timeout=400) == (5, 1, 4, 5)
