"""Loss of the teacher during generation: an engine, the only replica, a node, the driver. No completion is lost."""

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from clusters import cluster, cluster_env, nodes_with_engines, processes
from raykd.storage import row_store, schemas
from runs import kill_when, parts, plan_of, started

ROOT = Path(__file__).parents[2]
# Starts a dozen engines. In `make test`, test_teacher_retries.py covers retries after the death of a replica, and
# test_sweeps.py a run that is interrupted while the teacher scores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(1, 1) as ray_cluster:
        yield ray_cluster


def command(root: Path, replicas: int) -> list[str]:
    return [
        *["generate", str(ROOT / "configs/quickstart.yaml"), f"storage={root}", f"name={root.name}"],
        *["dataset.num_train=400", f"teacher.replicas={{min: {replicas}, max: {replicas}}}"],
        "arms={one: {prompt.strategy: ground_truth}, two: {prompt.strategy: teacher}}",
        "teacher.engine.engine_kwargs.enable_log_requests=true",
    ]


def check_completions(arguments: list[str]) -> int:
    """Check that every problem has one completion under each strategy; return their number."""
    total = 0
    for completions in plan_of(arguments).required_sets:
        rows = row_store.read_rows(completions.folder, schemas.COMPLETION, ["problem_id", "error"])
        assert row_store.read_manifest(completions.folder)["rows"] == len(rows) == 400  # type: ignore[index]
        assert len(set(rows["problem_id"].to_pylist())) == 400
        assert set(rows["error"].to_pylist()) == {""}
        total += len(rows)
    return total


def test_killed_engine_loses_no_completion(nodes: Cluster, tmp_path: Path):
    arguments = command(tmp_path, 2)
    with started(lambda: len(parts(tmp_path)) >= 4, arguments, tmp_path, cluster_env(nodes)) as run:
        engines = processes("EngineCore")
        assert len(engines) == 2
        engines[0].kill()
        assert run.wait(400) == 0, (tmp_path / "started.log").read_text()
    check_completions(arguments)


def test_killed_only_replica_loses_no_completion(nodes: Cluster, tmp_path: Path):
    arguments = command(tmp_path, 1)
    with started(lambda: len(parts(tmp_path)) >= 4, arguments, tmp_path, cluster_env(nodes)) as run:
        (replica,) = processes("ServeReplica")
        replica.kill()
        assert run.wait(400) == 0, (tmp_path / "started.log").read_text()
    check_completions(arguments)


def test_node_loss_loses_no_completion(nodes: Cluster, tmp_path: Path):
    arguments = command(tmp_path, 2)
    with started(lambda: len(parts(tmp_path)) >= 4, arguments, tmp_path, cluster_env(nodes)) as run:
        lost = nodes_with_engines(nodes)[0]
        nodes.remove_node(lost, allow_graceful=False)
        assert run.wait(500) == 0, (tmp_path / "started.log").read_text()
    check_completions(arguments)
    nodes.add_node(num_cpus=1)


def test_killed_run_stops_its_teacher_and_resumes(nodes: Cluster, tmp_path: Path):
    """Check that only requests that were in flight are repeated."""
    arguments = command(tmp_path, 1)
    # The head's session folder holds the logs of all nodes.
    logs = Path(nodes.head_node.get_session_dir_path()) / "logs"
    before = num_received_prompts(logs)
    kill_when(lambda: len(parts(tmp_path)) >= 4, arguments, tmp_path, cluster_env(nodes))
    kept = {path.name for path in parts(tmp_path)}
    engines = processes("EngineCore")
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive, "the teacher outlived its run"
    ray.init(address=nodes.address, log_to_driver=False, namespace="test")
    try:
        assert not [name for name in serve.status().applications if name.startswith(f"raykd-{tmp_path.name}")]
    finally:
        ray.shutdown()
    with started(lambda: len(parts(tmp_path)) > len(kept), arguments, tmp_path, cluster_env(nodes)) as run:
        assert run.wait(400) == 0, (tmp_path / "started.log").read_text()
    total = check_completions(arguments)
    assert kept <= {path.name for path in parts(tmp_path)}, "completions were removed"
    teacher = plan_of(arguments).experiment.teacher
    repeated = num_received_prompts(logs) - before - total
    assert 0 <= repeated <= teacher.concurrency * teacher.batch_size


def num_received_prompts(logs: Path) -> int:
    """Return the number of prompts that the engines received, from their logs."""
    files = [file for file in logs.rglob("*") if file.is_file() and file.suffix in (".log", ".out", ".err")]
    found = {name for file in files for name in re.findall(r"Added request (\S+)", file.read_text(errors="replace"))}
    return len(found)
