"""Clean up Serve apps, placement groups and autoscaler requests when the driver exits or crashes."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from raykd import compat

DELETE_ATTEMPTS = 30
DELETE_RETRY_S = 10
# Ray lets an actor run for up to 30 s after its owner died, and a placement group that it creates last appears later.
ORPHAN_WATCH_S = 90
POLL_INTERVAL_S = 3


@ray.remote(num_cpus=0)
class DriverLiveness:
    """Actor that Ray ends together with the driver that created it."""

    async def end(self) -> None:
        """Block for as long as the actor lives."""
        await asyncio.Event().wait()


@ray.remote(num_cpus=0)
class CleanupActor:
    """Detached actor that runs a clean-up once the driver is gone, and then ends itself."""

    def __init__(self, driver: Any, cleanup: Callable[[], None]) -> None:
        threading.Thread(target=self._watch, args=(driver, cleanup), daemon=True).start()

    def _watch(self, driver: Any, cleanup: Callable[[], None]) -> None:
        try:
            with suppress(RayError):
                ray.get(driver.end.remote())
            cleanup()
        finally:
            # A detached actor lives until it exits or is killed.
            os._exit(0)


def delete_serve_app(app: str) -> None:
    """Delete a Ray Serve application; retry while Serve's controller restarts."""
    # Takes seconds to load, which the actors of a run without a teacher save.
    from ray import serve

    for _ in range(DELETE_ATTEMPTS):
        try:
            serve.delete(app)
            break
        except (RayError, TimeoutError):
            time.sleep(DELETE_RETRY_S)


def remove_placement_groups(job_id: str) -> None:
    """Remove the placement groups of a job that ended, including those created up to `ORPHAN_WATCH_S` later."""
    deadline = time.monotonic() + ORPHAN_WATCH_S
    while time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
        # The dashboard, which answers this query, may be busy.
        with suppress(RayError, RayStateApiException, TimeoutError):
            for group in orphaned_placement_groups(job_id):
                remove_placement_group(group)


def orphaned_placement_groups(job_id: str) -> list[PlacementGroup]:
    """Return the placement groups of a job, without detached ones."""
    states: list[Any] = list_placement_groups(
        filters=[("creator_job_id", "=", job_id), ("state", "!=", "REMOVED")],
        detail=True,
        limit=10_000,
        raise_on_missing_output=False,
    )
    return [
        PlacementGroup(ray.PlacementGroupID.from_hex(state.placement_group_id))
        for state in states
        if not state.is_detached
    ]


@contextmanager
def cleanup_on_exit() -> Iterator[None]:
    """Remove this job's placement groups after a `with` block, and also if this process dies within it.

    Ray frees the placement groups of an actor that dies. Ray Train's controller (2.60) creates one more group when it
    is ended while it waits for resources. Nobody removes that group: it stays pending, takes resources as soon as some
    are free, and blocks all later groups.
    """
    job_id = ray.get_runtime_context().get_job_id()
    with when_driver_ends(f"raykd-cleanup-{job_id}", partial(remove_placement_groups, job_id)):
        yield


@contextmanager
def serve_app_cleanup(app: str) -> Iterator[None]:
    """Delete a Ray Serve application if this process dies within a `with` block.

    A Serve application outlives the driver that deployed it, and keeps its GPUs.

    Args:
        app: the application's name.
    """
    name = f"raykd-teacher-cleanup-{ray.get_runtime_context().get_job_id()}-{app}"
    with when_driver_ends(name, partial(delete_serve_app, app)) as cleanup_actor:
        try:
            yield
        finally:
            ray.kill(cleanup_actor)


@contextmanager
def when_driver_ends(name: str, cleanup: Callable[[], None]) -> Iterator[Any]:
    """Run a clean-up on the head node at the end of a `with` block, or when this process dies within it.

    Args:
        name: name of the detached actor.
        cleanup: a picklable function, called once in that actor.

    Yields:
        The actor's handle; kill it to cancel the clean-up.
    """
    # On the driver's own node, so that the loss of another node does not look like the end of the driver.
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray types an actor's handle as its class, which `ray.kill` does not accept.
    driver: Any = DriverLiveness.options(name=f"{name}-run", scheduling_strategy=on_this_node).remote()
    cleanup_actor: Any = CleanupActor.options(
        name=name, lifetime="detached", resources={compat.HEAD_RESOURCE: 0.0001}
    ).remote(driver, cleanup)
    try:
        yield cleanup_actor
    finally:
        ray.kill(driver)
