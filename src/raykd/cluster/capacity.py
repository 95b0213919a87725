"""Resources that the cluster has now, and those that its autoscaler may add."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
import ray.data

from raykd.cluster import nodes
from raykd.errors import UserError

# Names a file with the limits of the cluster, in the format of `ray up`.
CLUSTER_FILE_VARIABLE = "RAYKD_CLUSTER"
# Ray's cluster launcher copies its file here on the head node.
RAY_UP_FILE = Path("~/ray_bootstrap_config.yaml")


def current_resources() -> dict[str, float]:
    """Return the resources of the nodes that are alive, as Ray names them, with GPUs by type as `GPU:H100`."""
    return nodes.from_ray(ray.nodes()).resources


def capacity(is_existing: bool | None = None) -> dict[str, float]:
    """Return the resources that the cluster has, or may have after autoscaling.

    Ray has no interface for the limits of its autoscaler. They are read from the `ray up` file on the head node, where
    jobs run, or from the file that `RAYKD_CLUSTER` names.

    Args:
        is_existing: whether the cluster outlives this process; None for `is_existing_cluster()`.

    Raises:
        UserError: where the file that `RAYKD_CLUSTER` names is not a `ray up` file.
    """
    current = current_resources()
    limits = _autoscaler_limits(is_existing_cluster() if is_existing is None else is_existing)
    maximum = limits.resources if limits else {}
    return {name: max(current.get(name, 0), maximum.get(name, 0)) for name in {*current, *maximum}}


def _autoscaler_limits(is_existing: bool) -> nodes.ClusterSpec | None:
    """Return the largest cluster that the autoscaler may build; None where unknown."""
    named = os.environ.get(CLUSTER_FILE_VARIABLE)
    if named:
        return nodes.read_cluster_file(Path(named))
    file = RAY_UP_FILE.expanduser()
    if not is_existing or not file.exists():
        return None
    try:
        return nodes.read_cluster_file(file)
    except UserError:
        # The launcher's file for on-premise machines lacks their resources; all of these machines are already up.
        return None


def num_placeable(groups: Sequence[Sequence[nodes.Bundle]]) -> int | None:
    """Return how many placement groups, from the first on, fit the autoscaler's limits; None where unknown."""
    limits = _autoscaler_limits(is_existing_cluster())
    return len(nodes.place(groups, limits)) if limits else None


def fits_on_one_node(group: Sequence[nodes.Bundle]) -> bool:
    """Return whether a single node, alive or within the autoscaler's limits, holds a whole placement group."""
    current, limits = nodes.from_ray(ray.nodes()), _autoscaler_limits(is_existing_cluster())
    node_groups = [*current.nodes, *(limits.nodes if limits else ())]
    single_nodes = (nodes.ClusterSpec(node.name, (replace(node, count=1),)) for node in node_groups)
    return any(nodes.place([group], node) for node in single_nodes)


def is_existing_cluster() -> bool:
    """Return whether the cluster was there before this process, and outlives it."""
    return bool(os.environ.get("RAY_ADDRESS"))
