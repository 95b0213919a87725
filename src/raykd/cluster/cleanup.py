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
from ray import serve
from ray.exceptions import RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from raykd import compat

DELETE_ATTEMPTS = 30
# Ray lets an actor whose owner is gone go on for 30 s, and what it does as its last may take a moment to be seen.
ORPHAN_WATCH_S = 90
POLL_INTERVAL_S = 3


@ray.remote(num_cpus=0)
class DriverLiveness:
    """Is there for as long as the process that made it."""

    async def end(self) -> None:
        await asyncio.Event().wait()


@ray.remote(num_cpus=0)
class CleanupActor:
    """Does something when a run is gone, and ends."""

    def __init__(self, run: Any, then: Callable[[], None]) -> None:
        threading.Thread(target=self._watch, args=(run, then), daemon=True).start()

    def _watch(self, run: Any, then: Callable[[], None]) -> None:
        try:
            with suppress(RayError):
                ray.get(run.end.remote())
            then()
        finally:
            # A detached actor stays until somebody ends it.
            os._exit(0)


def delete_serve_app(app: str) -> None:
    """Takes an application of Ray Serve down."""
    for _ in range(DELETE_ATTEMPTS):
        try:
            serve.delete(app)
            break
        except (RayError, TimeoutError):
            # Serve's controller may be starting again.
            time.sleep(10)


def remove_placement_groups(job_id: str) -> None:
    """Removes the placement groups of a job that is over, also those that are made for a while after."""
    until = time.monotonic() + ORPHAN_WATCH_S
    while time.monotonic() < until:
        time.sleep(POLL_INTERVAL_S)
        # Ray's dashboard, which is asked, may be busy.
        with suppress(RayError, RayStateApiException, TimeoutError):
            for group in orphaned_placement_groups(job_id):
                remove_placement_group(group)


def orphaned_placement_groups(job_id: str) -> list[PlacementGroup]:
    """The placement groups of a job, but for those that are meant to outlive it."""
    found: list[Any] = list_placement_groups(
        filters=[("creator_job_id", "=", job_id), ("state", "!=", "REMOVED")],
        detail=True,
        limit=10_000,
        raise_on_missing_output=False,
    )
    named = [each.placement_group_id for each in found if not each.is_detached]
    return [PlacementGroup(ray.PlacementGroupID.from_hex(name)) for name in named]


@contextmanager
def cleanup_on_exit() -> Iterator[None]:
    """Has the places that this process' actors hold given back after a `with` block, or should it die within.

    Ray frees an actor's placement groups when the actor dies. The controller of a training that is ended while it waits
    for room makes one more group after that, as its last, which nobody frees: it waits for room for ever, takes it when
    there is some, and whatever comes after waits behind it.
    """
    job_id = ray.get_runtime_context().get_job_id()
    with when_driver_ends(f"raykd-cleanup-{job_id}", partial(remove_placement_groups, job_id)):
        yield


@contextmanager
def serve_app_cleanup(app: str) -> Iterator[None]:
    """Has an application of Ray Serve taken down should this process die within a `with` block.

    Ray Serve keeps what it serves when the process that asked for it is gone, and with it its GPUs.

    Args:
        app: the application's name.
    """
    name = f"raykd-teacher-cleanup-{ray.get_runtime_context().get_job_id()}-{app}"
    with when_driver_ends(name, partial(delete_serve_app, app)) as watch:
        try:
            yield
        finally:
            ray.kill(watch)


@contextmanager
def when_driver_ends(name: str, then: Callable[[], None]) -> Iterator[Any]:
    """A detached actor on the head that does something at the end of a `with` block, or of this process within."""
    # It must not go with another node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray types a handle to an actor as its class, which `ray.kill` does not take.
    run: Any = DriverLiveness.options(name=f"{name}-run", scheduling_strategy=here).remote()
    watch: Any = CleanupActor.options(name=name, lifetime="detached", resources={compat.HEAD_RESOURCE: 0.0001}).remote(
        run, then
    )
    try:
        yield watch
    finally:
        ray.kill(run)
