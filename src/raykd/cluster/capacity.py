"""Resources that the cluster has now, and those that its autoscaler may add."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
import ray.data

from raykd.cluster import nodes
from raykd.errors import UserError

# What the cluster may grow to: a file of `ray up`, or of the same words; and where Ray's launcher puts it on the head.
CLUSTER_FILE_VARIABLE, RAY_UP_FILE = "RAYKD_CLUSTER", Path("~/ray_bootstrap_config.yaml")


def current_resources() -> dict[str, float]:
    """What the cluster's nodes have now: Ray's names, and `GPU:H100` and such for the GPUs of nodes of a kind."""
    return nodes.from_ray(ray.nodes()).resources


def capacity(joined: bool | None = None) -> dict[str, float]:
    """What the cluster has, or may come to have by its autoscaler: nodes that go when idle are not there at first.

    Ray does not tell what its autoscaler may bring. `ray up` leaves its file on the head, where jobs run; elsewhere the
    variable `RAYKD_CLUSTER` names one.

    Args:
        joined: whether the cluster is one that goes on when this process ends; None for `is_joined()`.

    Raises:
        UserError: where the file that is named is none of `ray up`.
    """
    there, grown = current_resources(), _autoscaled_cluster(is_existing_cluster() if joined is None else joined)
    may_come = grown.resources if grown else {}
    return {name: max(there.get(name, 0), may_come.get(name, 0)) for name in {*there, *may_come}}


def _autoscaled_cluster(joined: bool) -> nodes.ClusterSpec | None:
    """The cluster as its autoscaler may make it; None where that is not told."""
    named = os.environ.get(CLUSTER_FILE_VARIABLE)
    file = Path(named) if named else RAY_UP_FILE.expanduser() if joined else None
    if file is None or not (named or file.exists()):
        return None
    try:
        return nodes.read_cluster_file(file)
    except UserError:
        if named:
            raise
        # On machines of one's own it does not say what they have, and all of them are there.
        return None


def num_placeable(groups: Sequence[Sequence[nodes.Bundle]]) -> int | None:
    """How many placement groups, from the first on, the cluster can come to hold; None where that is not told."""
    grown = _autoscaled_cluster(is_existing_cluster())
    return len(nodes.place(groups, grown)) if grown else None


def fits_on_one_node(group: Sequence[nodes.Bundle]) -> bool:
    """Whether a node, of those that are there or may come, holds all of a placement group."""
    there, grown = nodes.from_ray(ray.nodes()), _autoscaled_cluster(is_existing_cluster())
    kinds = [*there.nodes, *(grown.nodes if grown else ())]
    return any(nodes.place([group], nodes.ClusterSpec(each.name, (replace(each, count=1),))) for each in kinds)


def is_existing_cluster() -> bool:
    """Whether the cluster is one that goes on when this process ends."""
    return bool(os.environ.get("RAY_ADDRESS"))
