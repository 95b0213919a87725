"""Node groups of a cluster, from a `ray up` file or from Ray, and placement of bundles on them."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.cluster.gpus import GPUS, Gpu
from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.errors import did_you_mean
from raykd.config.parsing import parse_yaml
from raykd.display import display
from raykd.errors import UserError

Bundle = Mapping[str, float]
# Ray's default for `max_workers` of a `ray up` file.
_DEFAULT_MAX_WORKERS = 2


@dataclass(frozen=True)
class NodeGroup:
    """Nodes with equal resources."""

    name: str
    count: int
    """Number of nodes, or the autoscaler's limit."""
    resources: Mapping[str, float]
    """Resources of one node, as Ray names them."""
    is_head: bool = False
    """Whether this is the head node, which is always up."""
    priority: float = 0
    """Ray's autoscaler adds the group of the highest priority, of those that fit equally well."""

    @property
    def gpu(self) -> Gpu | None:
        """Type of the nodes' GPUs; None for nodes without GPUs.

        Raises:
            UserError: where the type is missing or unknown.
        """
        if not self.resources.get("GPU"):
            return None
        # Of A100 and A100-80G, the longer name is the more specific one.
        name = max(_accelerator_types(self.resources), key=len, default="")
        if name not in GPUS:
            reason = f"of unknown type {name!r}{did_you_mean(name, GPUS)}" if name else "without a type"
            raise UserError(
                f"node type {self.name!r} has GPUs {reason}: give it Ray's resource accelerator_type:TYPE: 1; known "
                f"types: {', '.join(GPUS)}"
            )
        return GPUS[name]


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes of a cluster, or the largest cluster that its autoscaler may build."""

    name: str
    nodes: tuple[NodeGroup, ...]
    max_workers: int | None = None
    """Largest number of nodes beside the head, of all groups together; None for the sum of their counts."""

    @property
    def resources(self) -> dict[str, float]:
        """Largest amount of each resource, as Ray names them, with GPUs by type as `GPU:H100`."""
        head: dict[str, float] = {}
        per_worker: dict[str, list[float]] = {}
        for group in self.nodes:
            gpus = {f"GPU:{gpu}": group.resources.get("GPU", 0.0) for gpu in _accelerator_types(group.resources)}
            for name, amount in {**group.resources, **gpus}.items():
                if group.is_head:
                    head[name] = head.get(name, 0.0) + amount * group.count
                else:
                    per_worker.setdefault(name, []).extend([amount] * group.count)
        max_workers = sum(group.count for group in self.nodes) if self.max_workers is None else self.max_workers
        workers = {name: sum(heapq.nlargest(max_workers, amounts)) for name, amounts in per_worker.items()}
        return {name: head.get(name, 0.0) + workers.get(name, 0.0) for name in {**head, **workers}}


@dataclass(frozen=True)
class Placement:
    """Nodes on which the bundles of a placement group are placed."""

    bundles_per_node: tuple[tuple[str, int], ...]
    """Name of the node group and number of bundles, for each node."""

    def splits(self, size: int) -> bool:
        """Return whether any of the consecutive runs of `size` bundles spans several nodes."""
        return any(number % size for _, number in self.bundles_per_node[:-1])


def read_cluster_file(file: Path) -> ClusterSpec:
    """Return the largest cluster that a `ray up` file allows.

    Raises:
        UserError: where the file is missing or is not a `ray up` file.
    """
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(display(f"{file}: not a `ray up` file: {error}")) from None
    types = tree.get("available_node_types") if isinstance(tree, dict) else None
    if not isinstance(types, dict) or not types:
        raise UserError(
            f"{file}: has no available_node_types, which list the nodes of a `ray up` cluster; use --cluster live for "
            "a running cluster, and a file like cluster/kuberay/nodes.yaml for KubeRay"
        )
    head, max_workers = tree.get("head_node_type"), tree.get("max_workers")
    groups = []
    for name, node_type in types.items():
        resources = node_type.get("resources") if isinstance(node_type, dict) else None
        try:
            amounts = {str(resource): float(amount) for resource, amount in (resources or {}).items()}
            # Ray's defaults: no workers of the head's type, and any number of the others up to the cluster's limit.
            limit = _DEFAULT_MAX_WORKERS if max_workers is None else int(max_workers)
            workers = min(limit, int(node_type.get("max_workers", 0 if name == head else limit)))
            priority = float(node_type.get("priority", 0))
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{file}: node type {name!r}: resources, max_workers and priority should be numbers"
            ) from None
        if not resources and workers:
            raise UserError(
                f"{file}: node type {name!r} has no resources; add them, for example {{CPU: 96, GPU: 8, "
                "accelerator_type:H100: 1}"
            )
        if name == head:
            groups.append(NodeGroup(str(name), 1, amounts, is_head=True))
        if workers > 0:
            groups.append(NodeGroup(str(name), workers, amounts, priority=priority))
    limit = _DEFAULT_MAX_WORKERS if max_workers is None else int(max_workers)
    return ClusterSpec(str(file), tuple(groups), max_workers=limit)


def from_ray(records: Iterable[Mapping[str, Any]]) -> ClusterSpec:
    """Return the running cluster, with nodes of equal resources in one group.

    Args:
        records: result of `ray.nodes()`.
    """
    counts: dict[tuple[tuple[str, float], ...], int] = {}
    for record in records:
        if record.get("Alive", record.get("alive")):
            # Memory differs by some bytes between equal nodes.
            key = tuple(
                sorted(
                    (name, float(amount))
                    for name, amount in record["Resources"].items()
                    if not name.startswith("node:") and "memory" not in name
                )
            )
            counts[key] = counts.get(key, 0) + 1
    groups = [NodeGroup(_describe_node(dict(key)), count, dict(key)) for key, count in counts.items()]
    return ClusterSpec("the running cluster", tuple(groups))


def _accelerator_types(resources: Mapping[str, float]) -> list[str]:
    return [
        name.removeprefix(ACCELERATOR_TYPE_PREFIX) for name in resources if name.startswith(ACCELERATOR_TYPE_PREFIX)
    ]


def _describe_node(resources: Mapping[str, float]) -> str:
    cpus = f"{resources.get('CPU', 0):g} CPU"
    if not resources.get("GPU"):
        return f"node of {cpus}"
    gpu = max(_accelerator_types(resources), key=len, default="GPU")
    return f"node of {resources['GPU']:g} x {gpu}, {cpus}"


def feasible_nodes(cluster: ClusterSpec, bundle: Bundle) -> ClusterSpec:
    """Return the nodes of a cluster on which a bundle can be placed."""
    feasible = (group for group in cluster.nodes if place([(bundle,)], ClusterSpec(group.name, (group,))))
    return ClusterSpec(cluster.name, tuple(feasible), cluster.max_workers)


def place(
    groups: Sequence[Sequence[Bundle]], cluster: ClusterSpec, gpus: Sequence[str] | None = None
) -> list[Placement]:
    """Place groups of equal bundles side by side on as few nodes as possible, as Ray's strategy PACK does.

    A group goes to the fullest node that holds all of it, else to several nodes, the emptiest first. Priority decides
    between nodes that are equally full.

    Args:
        groups: placement groups; the bundles of a group are equal.
        cluster: nodes to place them on.
        gpus: types of GPU that are suitable; None for all nodes, also those without GPUs.

    Returns:
        Placements of the groups, from the first on, up to the first that does not fit.
    """
    suitable = [group for group in cluster.nodes if gpus is None or (group.gpu and group.gpu.kind in gpus)]
    # More nodes than bundles cannot be used.
    num_bundles = sum(map(len, groups))
    free = [
        (node_group, dict(node_group.resources))
        for node_group in suitable
        for _ in range(min(node_group.count, num_bundles))
    ]
    new_nodes_left = math.inf if cluster.max_workers is None else cluster.max_workers
    used = {index for index, (node_group, _) in enumerate(free) if node_group.is_head}
    placements = []
    for group in groups:
        bundle, wanted = dict(group[0]), len(group)
        # Pairs of free slots and node index, the fullest node first.
        slots_of = [(_num_bundles(resources, bundle), index) for index, (_, resources) in enumerate(free)]
        slots_of.sort(key=lambda pair: (pair[0], -free[pair[1]][0].priority))
        single = next(
            ((slots, index) for slots, index in slots_of if slots >= wanted and (index in used or new_nodes_left >= 1)),
            None,
        )
        # The sort is stable, so equally full nodes keep their order of priority.
        candidates = [single] if single else sorted(slots_of, key=lambda pair: -pair[0])
        taken: list[tuple[int, int]] = []
        num_new = 0
        for slots, index in candidates:
            number = min(slots, wanted - sum(count for _, count in taken))
            if number and (index in used or num_new < new_nodes_left):
                taken.append((index, number))
                if index not in used:
                    num_new += 1
        if sum(number for _, number in taken) < wanted:
            break
        new_nodes_left -= num_new
        for index, number in taken:
            used.add(index)
            for name, amount in bundle.items():
                free[index][1][name] -= amount * number
        placements.append(Placement(tuple((free[index][0].name, number) for index, number in taken)))
    return placements


def _num_bundles(free: Mapping[str, float], bundle: Bundle) -> int:
    """Return how many bundles fit into the free resources of a node."""
    # Ray counts resources in units of 1/10,000.
    return int(min((free.get(name, 0.0) + 1e-6) // amount for name, amount in bundle.items() if amount))
