"""Nodes: what a cluster has or may grow to, by kinds of nodes, and how placement groups lie on it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raykd.memory import GPUS, Gpu
from raykd.mistakes import did_you_mean, on_one_line
from raykd.placement import TYPE as ACCELERATOR_TYPE

Bundle = Mapping[str, float]
# Workers of a cluster of which `max_workers` is not told: Ray's default.
_WORKERS = 2


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind."""

    name: str
    count: int
    """How many there are, or may be: each kind by itself, whatever of a cluster's `max_workers` others take."""
    resources: Mapping[str, float]
    """Of each, as Ray names them."""

    @property
    def gpu(self) -> Gpu | None:
        """What its GPUs are; None where it has none.

        Raises:
            ValueError: where it has some of a kind that is not told, or not known.
        """
        if not self.resources.get("GPU"):
            return None
        # Where a node tells A100 as well as A100-80G, the longer name says more.
        kind = max(_kinds(self.resources), key=len, default="")
        if kind not in GPUS:
            told = f"of an unknown kind {kind!r}{did_you_mean(kind, GPUS)}" if kind else "of a kind that is not told"
            raise ValueError(
                f"node type {self.name!r} has GPUs {told}: give it the resource accelerator_type:KIND: 1, by which Ray "
                f"knows them; known: {', '.join(GPUS)}"
            )
        return GPUS[kind]


@dataclass(frozen=True)
class Cluster:
    """What a cluster has, or may grow to."""

    name: str
    nodes: tuple[Nodes, ...]

    @property
    def resources(self) -> dict[str, float]:
        """All of them together: Ray's names, and `GPU:H100` and such for the GPUs of nodes of a kind."""
        total: dict[str, float] = {}
        for each in self.nodes:
            gpus = {f"GPU:{kind}": each.resources.get("GPU", 0.0) for kind in _kinds(each.resources)}
            for name, amount in {**each.resources, **gpus}.items():
                total[name] = total.get(name, 0.0) + amount * each.count
        return total


@dataclass(frozen=True)
class Placed:
    """Where the bundles of a placement group lie."""

    on: tuple[tuple[str, int], ...]
    """For each node its kind and how many bundles it has."""

    def splits(self, size: int) -> bool:
        """Whether bundles that follow each other in groups of `size` are not all on one node each."""
        return any(number % size for _, number in self.on[:-1])


def read(file: Path) -> Cluster:
    """What the cluster of a `ray up` file may grow to.

    Raises:
        ValueError: where the file is none, with what is missing.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(on_one_line(f"{file}: not a `ray up` file: {error}")) from None
    types = tree.get("available_node_types") if isinstance(tree, dict) else None
    if not isinstance(types, dict) or not types:
        raise ValueError(f"{file}: has no available_node_types, by which `ray up` knows the nodes that it may start")
    head, at_most = tree.get("head_node_type"), tree.get("max_workers")
    found = []
    for name, told in types.items():
        resources = told.get("resources") if isinstance(told, dict) else None
        try:
            amounts = {str(each): float(amount) for each, amount in (resources or {}).items()}
            # As Ray has it: a head is no worker unless it says so, others are as many as the cluster may have.
            limit = _WORKERS if at_most is None else int(at_most)
            workers = min(limit, int(told.get("max_workers", 0 if name == head else limit)))
        except (TypeError, ValueError, AttributeError):
            raise ValueError(f"{file}: node type {name!r}: resources and max_workers should be numbers") from None
        if not resources and workers:
            raise ValueError(
                f"{file}: node type {name!r} does not say what it has: write resources, such as {{CPU: 96, GPU: 8, "
                "accelerator_type:H100: 1}"
            )
        if count := int(workers) + (name == head):
            found.append(Nodes(str(name), count, amounts))
    return Cluster(str(file), tuple(found))


def of_ray(records: Iterable[Mapping[str, Any]]) -> Cluster:
    """The cluster that `ray.nodes()` tells of, nodes of the same resources together."""
    alike: dict[tuple[tuple[str, float], ...], int] = {}
    for record in records:
        if record.get("Alive", record.get("alive")):
            told = {name: float(amount) for name, amount in record["Resources"].items() if not name.startswith("node:")}
            # Every node's memory is another number of bytes.
            key = tuple(sorted((name, told[name]) for name in told if "memory" not in name))
            alike[key] = alike.get(key, 0) + 1
    found = [Nodes(_named(dict(key)), count, dict(key)) for key, count in alike.items()]
    return Cluster("the running cluster", tuple(found))


def _kinds(resources: Mapping[str, float]) -> list[str]:
    return [name.removeprefix(ACCELERATOR_TYPE) for name in resources if name.startswith(ACCELERATOR_TYPE)]


def _named(resources: Mapping[str, float]) -> str:
    gpus = f"{resources['GPU']:g} x {max(_kinds(resources), key=len, default='GPU')}, " if resources.get("GPU") else ""
    return f"node of {gpus}{resources.get('CPU', 0):g} CPU"


def place(
    groups: Sequence[Sequence[Bundle]], nodes: Sequence[Nodes], kinds: Sequence[str] | None = None
) -> list[Placed]:
    """Where placement groups of equal bundles lie, one beside the other, packed onto as few nodes as they can.

    A group goes to the fullest node that has room for all of it, else over nodes from the emptiest on.

    Args:
        groups: bundles.
        nodes: the cluster's.
        kinds: of GPUs that will do; None for all, and nodes without.

    Returns:
        as many of the groups, from the first on, as there is room for.
    """
    able = [each for each in nodes if kinds is None or (each.gpu and each.gpu.kind in kinds)]
    # No more nodes than there are bundles can matter.
    most = sum(map(len, groups))
    free = [(each.name, dict(each.resources)) for each in able for _ in range(min(each.count, most))]
    placed = []
    for group in groups:
        bundle, wanted = dict(group[0]), len(group)
        room = sorted(((_room(left, bundle), at) for at, (_, left) in enumerate(free)), key=lambda each: each[0])
        whole = next(((slots, at) for slots, at in room if slots >= wanted), None)
        taken: list[tuple[int, int]] = []
        for slots, at in [whole] if whole else reversed(room):
            if number := min(slots, wanted - sum(count for _, count in taken)):
                taken.append((at, number))
        if sum(number for _, number in taken) < wanted:
            break
        for at, number in taken:
            for name, amount in bundle.items():
                free[at][1][name] -= amount * number
        placed.append(Placed(tuple((free[at][0], number) for at, number in taken)))
    return placed


def _room(left: Mapping[str, float], bundle: Bundle) -> int:
    """How many bundles a node has room for."""
    # Ray counts in ten-thousandths.
    return int(min((left.get(name, 0.0) + 1e-6) // amount for name, amount in bundle.items() if amount))
