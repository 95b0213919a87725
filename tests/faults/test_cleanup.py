"""Clean-up after a killed run, including placement groups that its actors create after its end."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table

from clusters import cluster, cluster_env

# The actor stands for Ray Train's controller, which lives for up to 30 s after its run and may create a placement group
# in that time. It is detached, so that it always outlives the run.
RUN = """
import sys, threading, time
from pathlib import Path
import ray
from ray.util import placement_group
from raykd.cluster.connection import connected

@ray.remote(num_cpus=0)
class Controller:
    def __init__(self, marker):
        threading.Thread(target=self.create_group, args=(marker,), daemon=True).start()

    def create_group(self, marker):
        time.sleep(8)
        group = placement_group([{"CPU": 1}])
        assert group.wait(30)
        Path(marker).write_text(group.id.hex())

    def ping(self):
        return True

with connected(Path(sys.argv[1]) / "log", "cleanup", "test"):
    controller = Controller.options(name="controller", lifetime="detached").remote(sys.argv[1] + "/marker")
    ray.get(controller.ping.remote())
    Path(sys.argv[1], "started").touch()
    time.sleep(1 if sys.argv[2] == "returns" else 300)
"""
# Waits for a minute. No test in `make test` covers this.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("end", ["returns", "killed"])
def test_placement_group_created_after_run_end_is_removed(tmp_path: Path, end: str):
    marker = tmp_path / "marker"
    with cluster(1) as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), end], env=cluster_env(nodes))
        try:
            wait_for((tmp_path / "started").exists)
            if end == "killed":
                run.kill()
            run.wait(60)
            assert not marker.exists()
            wait_for(marker.exists)
            wait_for(lambda: placement_group_table()[marker.read_text()]["state"] == "REMOVED")
            wait_for(lambda: ray.available_resources().get("CPU") == 2)
        finally:
            run.kill()
            run.wait()
            ray.shutdown()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.5)
