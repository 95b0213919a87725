"""Capacity of a cluster, current and after autoscaling."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from cloud_files import write_two_pools
from raykd.cluster import capacity, connection, nodes


def test_gpus_are_counted_in_total_and_by_type():
    head, h100 = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    a10g = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A10G": 1.0}
    found = nodes.from_ray(
        [{"Alive": True, "Resources": each} for each in (head, h100, h100, a10g, a10g, a10g)]
    ).resources
    assert {name: found[name] for name in ("CPU", "GPU", "GPU:H100", "GPU:A10G")} == {
        "CPU": 8 + 192 + 48,
        "GPU": 28,
        "GPU:H100": 16,
        "GPU:A10G": 12,
    }


def test_capacity_includes_launchable_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "cluster.yaml"
    node = {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2}
    types = {"head": {"resources": {"CPU": 8}}, "teacher": node}
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 4, "available_node_types": types}))
    monkeypatch.setattr(capacity, "current_resources", lambda: {"CPU": 16.0, "memory": 1.0})
    monkeypatch.setenv("RAYKD_CLUSTER", str(file))
    expected = {"CPU": 392, "GPU": 16, "GPU:H100": 16, "accelerator_type:H100": 2, "memory": 1}
    assert capacity.capacity() == expected
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"none\.yaml: no such file"):
        capacity.capacity()
    monkeypatch.delenv("RAYKD_CLUSTER")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert capacity.capacity() == {"CPU": 16, "memory": 1}


def test_group_fits_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_two_pools(tmp_path / "cluster.yaml")
    monkeypatch.setattr(connection.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    assert capacity.fits_on_one_node([{"GPU": 1.0}] * 2)
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not capacity.fits_on_one_node([{"GPU": 1.0}] * 3)
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    assert capacity.fits_on_one_node([{"GPU": 1.0}] * 8)
    assert not capacity.fits_on_one_node([{"GPU": 1.0}] * 9)


def test_on_premise_capacity_is_current_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On premises, Ray's launcher writes a file whose node type has no resources."""
    config = yaml.safe_load((Path(__file__).parents[3] / "cluster/local.yaml").read_text())
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(prepare_config(config)))
    with pytest.raises(ValueError, match="has no resources"):
        nodes.read_cluster_file(file)
    monkeypatch.setattr(capacity, "current_resources", lambda: {"CPU": 16.0})
    monkeypatch.setattr(capacity, "RAY_UP_FILE", file)
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert capacity.capacity() == {"CPU": 16}
