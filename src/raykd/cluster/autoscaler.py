"""Requests to the cluster's autoscaler, withdrawn when the driver exits or crashes."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import ray
import ray.data
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from raykd.cluster import nodes
from raykd.cluster.capacity import is_existing_cluster
from raykd.cluster.cleanup import when_driver_ends


@contextmanager
def node_requests() -> Iterator[Callable[[Sequence[nodes.Bundle]], None]]:
    """What asks the cluster's autoscaler, where it has one, for nodes that hold all of some bundles, in a `with` block.

    What is asked by tasks and actors that wait is asked one by one, and only as far as they are started. A cluster has
    one such request, the last that was made by anybody; where it cannot have all of it, Ray brings nothing at all.
    """

    with autoscaler_request() if is_existing_cluster() else nullcontext():
        yield request_nodes


def request_nodes(bundles: Sequence[Mapping[str, float]]) -> None:
    """Asks the cluster's autoscaler for nodes that hold all of some bundles, in place of whatever anybody asked."""
    # A head that is busy, or starting again, will be asked again.
    with suppress(RayError, TimeoutError):
        request_resources(bundles=[dict(bundle) for bundle in bundles])


@contextmanager
def autoscaler_request() -> Iterator[None]:
    """Has what is asked of the autoscaler taken back after a `with` block, or should this process die within.

    It stands until something else is asked, whoever asked for it, and the nodes stay for it.
    """
    # There may be several, one after another.
    name = f"raykd-autoscaler-{ray.get_runtime_context().get_job_id()}-{uuid.uuid4().hex[:8]}"
    with when_driver_ends(name, partial(request_nodes, ())) as watch:
        try:
            yield
        finally:
            request_nodes(())
            ray.kill(watch)
