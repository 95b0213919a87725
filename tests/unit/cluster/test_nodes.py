"""Node groups from a file or from Ray, and placement on them."""

from pathlib import Path

import pytest

from raykd.cluster import nodes
from raykd.cluster.gpus import GPUS
from raykd.cluster.nodes import ClusterSpec, NodeGroup

RAY_UP_FILE = """
cluster_name: example
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 8}, node_config: {InstanceType: m5.2xlarge}}
  h100: {min_workers: 0, max_workers: 2, resources: {CPU: 96, GPU: 8, "accelerator_type:H100": 1}}
  a10g: {max_workers: 8, resources: {CPU: 32, GPU: 4, "accelerator_type:A10G": 1}}
"""


@pytest.mark.parametrize(
    ("sizes", "nodes_of", "expected"),
    [
        # Each group is on one node if it fits.
        ([4, 4, 4], (2, 8), [[("n", 4)], [("n", 4)], [("n", 4)]]),
        ([16], (2, 8), [[("n", 8), ("n", 8)]]),
        ([6, 6, 4], (2, 8), [[("n", 6)], [("n", 6)], [("n", 2), ("n", 2)]]),
        ([8, 8, 8], (2, 8), [[("n", 8)], [("n", 8)]]),
        ([3], (0, 8), []),
    ],
)
def test_groups_are_packed(sizes: list[int], nodes_of: tuple[int, int], expected: list):
    count, gpus = nodes_of
    spec = ClusterSpec("a test", (NodeGroup("n", count, {"CPU": 32.0, "GPU": float(gpus)}),))
    placed = nodes.place([({"CPU": 1.0, "GPU": 1.0},) * size for size in sizes], spec)
    assert [list(each.bundles_per_node) for each in placed] == expected


def test_typed_bundle_is_placed_on_its_gpu_type():
    pools = (("H100", 1, 8.0), ("A10G", 2, 4.0))
    kinds = [
        NodeGroup(name, count, {"CPU": 96.0, "GPU": gpus, f"accelerator_type:{name}": 1.0})
        for name, count, gpus in pools
    ]
    mixed = ClusterSpec("mixed", tuple(kinds))
    bundle = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:A10G": 0.001}
    (placed,) = nodes.place([(bundle,) * 6], mixed)
    assert placed.bundles_per_node == (("A10G", 4), ("A10G", 2))
    assert nodes.place([({**bundle, "accelerator_type:L4": 0.001},)], mixed) == []


def test_ray_up_file_is_read(tmp_path: Path):
    (tmp_path / "up.yaml").write_text(RAY_UP_FILE)
    found = nodes.read_cluster_file(tmp_path / "up.yaml")
    # The cluster's max_workers limits each type, and all types together.
    assert [(each.name, each.count) for each in found.nodes] == [("head", 1), ("h100", 2), ("a10g", 3)]
    assert found.resources["GPU"] == 2 * 8 + 1 * 4
    assert (found.resources["GPU:A10G"], found.resources["CPU"]) == (3 * 4, 8 + 2 * 96 + 32)
    assert [each.gpu and each.gpu.kind for each in found.nodes] == [None, "H100", "A10G"]


def test_placement_respects_cluster_max_workers(tmp_path: Path):
    (tmp_path / "up.yaml").write_text(RAY_UP_FILE)
    found = nodes.read_cluster_file(tmp_path / "up.yaml")
    of_four = ({"CPU": 1.0, "GPU": 1.0},) * 4
    # The cluster may have only three nodes, and a group goes to the fullest node that holds it.
    assert [each.bundles_per_node for each in nodes.place([of_four] * 9, found)] == [(("a10g", 4),)] * 3
    of_sixteen = ({"CPU": 1.0, "GPU": 1.0},) * 16
    assert [each.bundles_per_node for each in nodes.place([of_sixteen], found)] == [(("h100", 8), ("h100", 8))]
    assert len(nodes.place([of_sixteen, of_four, of_four], found)) == 2
    # The head does not count as a worker.
    assert len(nodes.place([({"CPU": 8.0},)] * 9, found)) == 9


def test_placement_prefers_higher_priority(tmp_path: Path):
    eight = '{CPU: 96, GPU: 8, "accelerator_type:A10G": 1}, priority: 1'
    (tmp_path / "up.yaml").write_text(RAY_UP_FILE.replace('{CPU: 32, GPU: 4, "accelerator_type:A10G": 1}', eight))
    found = nodes.read_cluster_file(tmp_path / "up.yaml")
    assert [each.bundles_per_node for each in nodes.place([({"GPU": 1.0},) * 8], found)] == [(("a10g", 8),)]
    assert [each.bundles_per_node for each in nodes.place([({"GPU": 1.0},) * 12], found)] == [
        (("a10g", 8), ("a10g", 4))
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not a `ray up` file"),
        ("available_node_types: {a: {max_workers: .inf, resources: {CPU: 1}}}", ".inf is not a finite number"),
        ("available_node_types: {a: {priority: high, resources: {CPU: 1}}}", "should be numbers"),
        ("a: 1\na: 2", "not a `ray up` file: line 2, column 1: the key 'a' occurs twice"),
        ("a: 1", "has no available_node_types"),
        ("max_workers: 2\navailable_node_types: {a: {node_config: {}}}", "'a' has no resources"),
        ("available_node_types: {a: {max_workers: many, resources: {CPU: 1}}}", "should be numbers"),
        ("available_node_types: {a: 3}", "should be numbers"),
    ],
)
def test_file_without_nodes_is_refused(text: str, words: str, tmp_path: Path):
    (tmp_path / "up.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        nodes.read_cluster_file(tmp_path / "up.yaml")


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"GPU": 8.0}, "without a type"),
        ({"GPU": 8.0, "accelerator_type:H1000": 1.0}, "unknown type 'H1000'.*did you mean 'H100'"),
    ],
)
def test_unknown_gpu_types_are_refused(resources: dict, words: str):
    with pytest.raises(ValueError, match=words):
        _ = NodeGroup("a", 1, resources).gpu


def test_running_cluster_is_read_from_ray():
    # Records of `ray.nodes()` in Ray 2.60.
    gpu = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0, "node:10.0.0.2": 1.0, "memory": 1e12}
    records = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0, "node:__internal_head__": 1.0, "memory": 3e10}},
        {"NodeID": "b", "Alive": True, "Resources": gpu},
        {"NodeID": "c", "Alive": True, "Resources": {**gpu, "memory": 1e12 + 1, "accelerator_type:A100-80G": 1.0}},
        {"NodeID": "d", "Alive": True, "Resources": {**gpu, "memory": 1e12 + 2}},
        {"NodeID": "e", "Alive": False, "Resources": {}},
    ]
    found = nodes.from_ray(records)
    assert [(each.name, each.count) for each in found.nodes] == [
        ("node of 8 CPU", 1),
        ("node of 8 x A100, 96 CPU", 2),
        ("node of 8 x A100-80G, 96 CPU", 1),
    ]
    assert found.nodes[2].gpu == GPUS["A100-80G"]
