"""Capacity of a cluster, now and after autoscaling, and node requests of trials."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from raykd.cluster import capacity, connection, nodes
from raykd.tuning import slots


def test_gpus_are_counted_by_type_too():
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


def test_capacity_includes_nodes_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def grown(file: Path) -> None:
    """A cluster that may have two nodes of 8 GPUs, and four of 4."""
    large = {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2}
    small = {"resources": {"CPU": 48, "GPU": 4, "accelerator_type:A10G": 1}, "max_workers": 4}
    types = {"head": {"resources": {"CPU": 8}}, "large": large, "small": small}
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 6, "available_node_types": types}))


def test_requests_stay_within_the_autoscalers_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grown(tmp_path / "cluster.yaml")
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    asked: list[list[nodes.Bundle]] = []
    of_a_kind = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:A10G": 0.001}] * 4
    slots.AutoscalerRequester(
        lambda bundles: asked.append(list(bundles)),
        trial_bundles=of_a_kind,
        min_workers=4,
        other_groups=[],
        max_trials=21,
    ).update(0, 21)
    assert asked.pop() == of_a_kind * 4
    slots.AutoscalerRequester(
        lambda bundles: asked.append(list(bundles)),
        trial_bundles=of_a_kind,
        min_workers=4,
        other_groups=[],
        max_trials=2,
    ).update(0, 2)
    assert asked.pop() == of_a_kind * 2
    # What stays up meanwhile has to have room as well.
    teacher = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}] * 8
    anywhere = [{"CPU": 1.0, "GPU": 1.0}] * 8
    slots.AutoscalerRequester(
        lambda bundles: asked.append(list(bundles)),
        trial_bundles=anywhere,
        min_workers=8,
        other_groups=[teacher],
        max_trials=21,
    ).update(0, 21)
    assert asked.pop() == [*teacher, *anywhere * 3]


def test_elastic_trial_requests_as_many_workers_as_the_limits_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grown(tmp_path / "cluster.yaml")
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    asked: list[list[nodes.Bundle]] = []
    # There may be sixteen of them.
    of_a_kind = [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:A10G": 0.001}] * 24
    for least, expected in ((4, 16), (24, 24)):
        slots.AutoscalerRequester(
            lambda bundles: asked.append(list(bundles)),
            trial_bundles=of_a_kind,
            min_workers=least,
            other_groups=[],
            max_trials=3,
        ).update(0, 3)
        assert asked.pop() == of_a_kind[:expected]


def test_without_limits_one_more_trial_is_requested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked: list[int] = []
    now = [100.0]
    monkeypatch.setattr(slots.time, "monotonic", lambda: now[0])
    requester = slots.AutoscalerRequester(
        lambda bundles: asked.append(len(bundles)), trial_bundles=[{"CPU": 1.0}] * 2, min_workers=2, max_trials=3
    )
    for room in (0, 0, 1, 1, 2, 5):
        requester.update(room, 9)
    assert asked == [2, 4, 6]
    # Another experiment may have asked for something else since.
    now[0] += 61
    requester.update(5, 9)
    assert asked == [2, 4, 6, 6]
    # Fewer than there is room for are left.
    requester.update(5, 1)
    assert asked == [2, 4, 6, 6, 2]


def test_group_fits_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grown(tmp_path / "cluster.yaml")
    monkeypatch.setattr(connection.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    assert capacity.fits_on_one_node([{"GPU": 1.0}] * 2)
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not capacity.fits_on_one_node([{"GPU": 1.0}] * 3)
    monkeypatch.setenv("RAYKD_CLUSTER", str(tmp_path / "cluster.yaml"))
    assert capacity.fits_on_one_node([{"GPU": 1.0}] * 8)
    assert not capacity.fits_on_one_node([{"GPU": 1.0}] * 9)


def test_on_premise_capacity_is_what_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What Ray's launcher leaves on the head then names a node type without a word of what it has."""
    told = yaml.safe_load((Path(__file__).parents[3] / "cluster/local.yaml").read_text())
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(prepare_config(told)))
    with pytest.raises(ValueError, match="has no resources"):
        nodes.read_cluster_file(file)
    monkeypatch.setattr(capacity, "current_resources", lambda: {"CPU": 16.0})
    monkeypatch.setattr(capacity, "RAY_UP_FILE", file)
    monkeypatch.delenv("RAYKD_CLUSTER", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert capacity.capacity() == {"CPU": 16}
