"""Nodes: what a cluster has or may grow to, by kinds of nodes, and how placement groups lie on it."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.cluster.gpus import GPUS, Gpu
from raykd.compat import ACCELERATOR_TYPE_PREFIX
from raykd.config.errors import did_you_mean, one_line, parse_yaml
from raykd.errors import UserError

Bundle = Mapping[str, float]
# Workers of a cluster of which `max_workers` is not told: Ray's default.
_DEFAULT_MAX_WORKERS = 2


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind."""

    name: str
    count: int
    """How many there are, or may be."""
    resources: Mapping[str, float]
    """Of each, as Ray names them."""
    is_head: bool = False
    """Whether it is there whatever comes."""
    priority: float = 0
    """Of nodes that do as well, Ray's autoscaler brings those of the highest."""

    @property
    def gpu(self) -> Gpu | None:
        """What its GPUs are; None where it has none.

        Raises:
            UserError: where it has some of a kind that is not told, or not known.
        """
        if not self.resources.get("GPU"):
            return None
        # Where a node tells A100 as well as A100-80G, the longer name says more.
        kind = max(_accelerator_types(self.resources), key=len, default="")
        if kind not in GPUS:
            told = f"of an unknown kind {kind!r}{did_you_mean(kind, GPUS)}" if kind else "of a kind that is not told"
            raise UserError(
                f"node type {self.name!r} has GPUs {told}: give it the resource accelerator_type:KIND: 1, by which Ray "
                f"knows them; known: {', '.join(GPUS)}"
            )
        return GPUS[kind]


@dataclass(frozen=True)
class ClusterSpec:
    """What a cluster has, or may grow to."""

    name: str
    nodes: tuple[NodeGroup, ...]
    most: int | None = None
    """How many nodes beside the head there may be, of all kinds together; None for as many as each kind has."""

    @property
    def resources(self) -> dict[str, float]:
        """The most that there may be of each: Ray's names, and `GPU:H100` and such for the GPUs of nodes of a kind."""
        heads: dict[str, float] = {}
        others: dict[str, list[float]] = {}
        for each in self.nodes:
            gpus = {f"GPU:{kind}": each.resources.get("GPU", 0.0) for kind in _accelerator_types(each.resources)}
            for name, amount in {**each.resources, **gpus}.items():
                if each.is_head:
                    heads[name] = heads.get(name, 0.0) + amount * each.count
                else:
                    others.setdefault(name, []).extend([amount] * each.count)
        most = sum(each.count for each in self.nodes) if self.most is None else self.most
        top = {name: sum(heapq.nlargest(most, has)) for name, has in others.items()}
        return {name: heads.get(name, 0.0) + top.get(name, 0.0) for name in {**heads, **top}}


@dataclass(frozen=True)
class Placement:
    """Where the bundles of a placement group lie."""

    on: tuple[tuple[str, int], ...]
    """For each node its kind and how many bundles it has."""

    def splits(self, size: int) -> bool:
        """Whether bundles that follow each other in groups of `size` are not all on one node each."""
        return any(number % size for _, number in self.on[:-1])


def read_cluster_file(file: Path) -> ClusterSpec:
    """What the cluster of a `ray up` file may grow to.

    Raises:
        UserError: where the file is none, with what is missing.
    """
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(one_line(f"{file}: not a `ray up` file: {error}")) from None
    types = tree.get("available_node_types") if isinstance(tree, dict) else None
    if not isinstance(types, dict) or not types:
        raise UserError(
            f"{file}: has no available_node_types, by which `ray up` knows the nodes that it may start; for a cluster "
            "that runs write --cluster live, for KubeRay's a file as cluster/kuberay/nodes.yaml is"
        )
    head, at_most = tree.get("head_node_type"), tree.get("max_workers")
    found = []
    for name, told in types.items():
        resources = told.get("resources") if isinstance(told, dict) else None
        try:
            amounts = {str(each): float(amount) for each, amount in (resources or {}).items()}
            # As Ray has it: a head is no worker unless it says so, others are as many as the cluster may have.
            limit = _DEFAULT_MAX_WORKERS if at_most is None else int(at_most)
            workers = min(limit, int(told.get("max_workers", 0 if name == head else limit)))
            priority = float(told.get("priority", 0))
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{file}: node type {name!r}: resources, max_workers and priority should be numbers"
            ) from None
        if not resources and workers:
            raise UserError(
                f"{file}: node type {name!r} does not say what it has: write resources, such as {{CPU: 96, GPU: 8, "
                "accelerator_type:H100: 1}"
            )
        if name == head:
            found.append(NodeGroup(str(name), 1, amounts, is_head=True))
        if workers > 0:
            found.append(NodeGroup(str(name), workers, amounts, priority=priority))
    return ClusterSpec(str(file), tuple(found), most=_DEFAULT_MAX_WORKERS if at_most is None else int(at_most))


def from_ray(records: Iterable[Mapping[str, Any]]) -> ClusterSpec:
    """The cluster that `ray.nodes()` tells of, nodes of the same resources together."""
    alike: dict[tuple[tuple[str, float], ...], int] = {}
    for record in records:
        if record.get("Alive", record.get("alive")):
            told = {name: float(amount) for name, amount in record["Resources"].items() if not name.startswith("node:")}
            # Every node's memory is another number of bytes.
            key = tuple(sorted((name, told[name]) for name in told if "memory" not in name))
            alike[key] = alike.get(key, 0) + 1
    found = [NodeGroup(_describe_node(dict(key)), count, dict(key)) for key, count in alike.items()]
    return ClusterSpec("the running cluster", tuple(found))


def _accelerator_types(resources: Mapping[str, float]) -> list[str]:
    return [
        name.removeprefix(ACCELERATOR_TYPE_PREFIX) for name in resources if name.startswith(ACCELERATOR_TYPE_PREFIX)
    ]


def _describe_node(resources: Mapping[str, float]) -> str:
    gpus = (
        f"{resources['GPU']:g} x {max(_accelerator_types(resources), key=len, default='GPU')}, "
        if resources.get("GPU")
        else ""
    )
    return f"node of {gpus}{resources.get('CPU', 0):g} CPU"


def feasible_nodes(cluster: ClusterSpec, bundle: Bundle) -> ClusterSpec:
    """The nodes of a cluster that have room for a bundle: those of the kind that it asks for, where it does."""
    found = (each for each in cluster.nodes if place([(bundle,)], ClusterSpec(each.name, (each,))))
    return ClusterSpec(cluster.name, tuple(found), cluster.most)


def place(
    groups: Sequence[Sequence[Bundle]], cluster: ClusterSpec, kinds: Sequence[str] | None = None
) -> list[Placement]:
    """Where placement groups of equal bundles lie, one beside the other, packed onto as few nodes as they can.

    A group goes to the fullest node that has room for all of it, else over nodes from the emptiest on; of nodes that
    are as full, to those of the highest priority.

    Args:
        groups: bundles.
        cluster: what there is or may be.
        kinds: of GPUs that will do; None for all, and nodes without.

    Returns:
        as many of the groups, from the first on, as there is room for.
    """
    will_do = [each for each in cluster.nodes if kinds is None or (each.gpu and each.gpu.kind in kinds)]
    # No more nodes than there are bundles can matter.
    bundles = sum(map(len, groups))
    free = [(each, dict(each.resources)) for each in will_do for _ in range(min(each.count, bundles))]
    to_come = math.inf if cluster.most is None else cluster.most
    used = {at for at, (each, _) in enumerate(free) if each.is_head}
    placed = []
    for group in groups:
        bundle, wanted = dict(group[0]), len(group)
        room = [(_num_bundles(left, bundle), at) for at, (_, left) in enumerate(free)]
        room.sort(key=lambda each: (each[0], -free[each[1]][0].priority))
        whole = next(((slots, at) for slots, at in room if slots >= wanted and (at in used or to_come >= 1)), None)
        taken: list[tuple[int, int]] = []
        new = 0
        # Those that are as full stay in their order.
        for slots, at in [whole] if whole else sorted(room, key=lambda each: -each[0]):
            number = min(slots, wanted - sum(count for _, count in taken))
            if number and (at in used or new < to_come):
                taken.append((at, number))
                new += at not in used
        if sum(number for _, number in taken) < wanted:
            break
        to_come -= new
        for at, number in taken:
            used.add(at)
            for name, amount in bundle.items():
                free[at][1][name] -= amount * number
        placed.append(Placement(tuple((free[at][0].name, number) for at, number in taken)))
    return placed


def _num_bundles(left: Mapping[str, float], bundle: Bundle) -> int:
    """How many bundles a node has room for."""
    # Ray counts in ten-thousandths.
    return int(min((left.get(name, 0.0) + 1e-6) // amount for name, amount in bundle.items() if amount))
