"""Watch: on a cluster that goes on, what a run held is given back, however it ends: teacher, places and nodes."""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from raykd import compat

ATTEMPTS = 30
# Ray lets an actor whose owner is gone go on for 30 s, and what it does as its last may take a moment to be seen.
LINGERS_S = 90
LOOKS_EVERY_S = 3


@ray.remote(num_cpus=0)
class Run:
    """Is there for as long as the process that made it."""

    async def end(self) -> None:
        await asyncio.Event().wait()


@ray.remote(num_cpus=0)
class Watch:
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


def take_down(app: str) -> None:
    """Takes an application of Ray Serve down."""
    for _ in range(ATTEMPTS):
        try:
            serve.delete(app)
            break
        except (RayError, TimeoutError):
            # Serve's controller may be starting again.
            time.sleep(10)


def give_back(job_id: str) -> None:
    """Removes the placement groups of a job that is over, also those that are made for a while after."""
    until = time.monotonic() + LINGERS_S
    while time.monotonic() < until:
        time.sleep(LOOKS_EVERY_S)
        # Ray's dashboard, which is asked, may be busy.
        with suppress(RayError, RayStateApiException, TimeoutError):
            for group in left_by(job_id):
                remove_placement_group(group)


def left_by(job_id: str) -> list[PlacementGroup]:
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
def given_back() -> Iterator[None]:
    """Has the places that this process' actors hold given back after a `with` block, or should it die within.

    Ray frees an actor's placement groups when the actor dies. The controller of a training that is ended while it waits
    for room makes one more group after that, as its last, which nobody frees: it waits for room for ever, takes it when
    there is some, and whatever comes after waits behind it.
    """
    job_id = ray.get_runtime_context().get_job_id()
    with _watching(f"raykd-give-back-{job_id}", partial(give_back, job_id)):
        yield


def ask(bundles: Sequence[Mapping[str, float]]) -> None:
    """Asks the cluster's autoscaler for nodes that hold all of some bundles, in place of whatever anybody asked."""
    # A head that is busy, or starting again, will be asked again.
    with suppress(RayError, TimeoutError):
        request_resources(bundles=[dict(bundle) for bundle in bundles])


@contextmanager
def taken_back() -> Iterator[None]:
    """Has what is asked of the autoscaler taken back after a `with` block, or should this process die within.

    It stands until something else is asked, whoever asked for it, and the nodes stay for it.
    """
    # There may be several, one after another.
    name = f"raykd-demand-{ray.get_runtime_context().get_job_id()}-{uuid.uuid4().hex[:8]}"
    with _watching(name, partial(ask, ())) as watch:
        try:
            yield
        finally:
            ask(())
            ray.kill(watch)


@contextmanager
def watched(app: str) -> Iterator[None]:
    """Has an application of Ray Serve taken down should this process die within a `with` block.

    Ray Serve keeps what it serves when the process that asked for it is gone, and with it its GPUs.

    Args:
        app: the application's name.
    """
    name = f"raykd-watch-{ray.get_runtime_context().get_job_id()}-{app}"
    with _watching(name, partial(take_down, app)) as watch:
        try:
            yield
        finally:
            ray.kill(watch)


@contextmanager
def _watching(name: str, then: Callable[[], None]) -> Iterator[Any]:
    """A detached actor on the head that does something at the end of a `with` block, or of this process within."""
    # It must not go with another node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray types a handle to an actor as its class, which `ray.kill` does not take.
    run: Any = Run.options(name=f"{name}-run", scheduling_strategy=here).remote()
    watch: Any = Watch.options(name=name, lifetime="detached", resources={compat.HEAD_RESOURCE: 0.0001}).remote(
        run, then
    )
    try:
        yield watch
    finally:
        ray.kill(run)
