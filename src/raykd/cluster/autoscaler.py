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
    """Yield `request_nodes` for a `with` block, and withdraw its last request at the end.

    Pending tasks and actors request nodes too, but one by one, and only once they are submitted. A cluster has one
    request of this kind: the latest of any driver replaces all others. Ray adds no node at all for a request that
    exceeds the cluster's limits.
    """
    with autoscaler_request() if is_existing_cluster() else nullcontext():
        yield request_nodes


def request_nodes(bundles: Sequence[Mapping[str, float]]) -> None:
    """Request nodes that hold all bundles at once, in place of any earlier request."""
    # Callers repeat their request, so a busy or restarting head is no error.
    with suppress(RayError, TimeoutError):
        request_resources(bundles=[dict(bundle) for bundle in bundles])


@contextmanager
def autoscaler_request() -> Iterator[None]:
    """Withdraw the autoscaler request after a `with` block, and also if this process dies within it.

    Without this, the request and its nodes stay until a driver makes another request.
    """
    # A driver may open several such blocks, one after another.
    name = f"raykd-autoscaler-{ray.get_runtime_context().get_job_id()}-{uuid.uuid4().hex[:8]}"
    with when_driver_ends(name, partial(request_nodes, ())) as cleanup_actor:
        try:
            yield
        finally:
            request_nodes(())
            ray.kill(cleanup_actor)
