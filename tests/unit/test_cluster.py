"""Cluster: what it has and may come to have; and what is set in Ray without being part of its public interface."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config
from ray.data import DataContext

from raykd import cluster, nodes


def test_ray_data_still_has_the_number_of_blocks_that_a_task_hands_on():
    """A name that it did not know would be set all the same, and the teacher be asked twenty calls a second again."""
    assert hasattr(DataContext(), "_max_num_blocks_in_streaming_gen_buffer")


def test_gpus_are_counted_by_their_kind_too():
    head, h100 = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    a10g = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A10G": 1.0}
    found = nodes.of_ray(
        [{"Alive": True, "Resources": each} for each in (head, h100, h100, a10g, a10g, a10g)]
    ).resources
    assert {name: found[name] for name in ("CPU", "GPU", "GPU:H100", "GPU:A10G")} == {
        "CPU": 8 + 192 + 48,
        "GPU": 28,
        "GPU:H100": 16,
        "GPU:A10G": 12,
    }


def test_what_may_come_counts_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "cluster.yaml"
    node = {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2}
    types = {"head": {"resources": {"CPU": 8}}, "teacher": node}
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 4, "available_node_types": types}))
    monkeypatch.setattr(cluster, "live", lambda: {"CPU": 16.0, "memory": 1.0})
    monkeypatch.setenv("RAYKD_CLUSTER", str(file))
    expected = {"CPU": 392, "GPU": 16, "GPU:H100": 16, "accelerator_type:H100": 2, "memory": 1}
    assert cluster.capacity() == expected
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"none\.yaml: not a `ray up` file"):
        cluster.capacity()
    monkeypatch.delenv("RAYKD_CLUSTER")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.capacity() == {"CPU": 16, "memory": 1}


def test_on_machines_of_ones_own_what_is_there_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What Ray's launcher leaves on the head then names a node type without a word of what it has."""
    told = yaml.safe_load((Path(__file__).parents[2] / "cluster/local.yaml").read_text())
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(prepare_config(told)))
    with pytest.raises(ValueError, match="does not say what it has"):
        nodes.read(file)
    monkeypatch.setattr(cluster, "live", lambda: {"CPU": 16.0})
    monkeypatch.setattr(cluster, "LAUNCHED_BY", file)
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster.capacity() == {"CPU": 16}
