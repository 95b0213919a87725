"""Watch: on a cluster that goes on, what a run held is given back, however it ends: its teacher, and its places."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from raykd import placement

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
    """Takes an application down when a run is gone."""

    def __init__(self, app: str, run: Any) -> None:
        threading.Thread(target=self._watch, args=(app, run), daemon=True).start()

    def _watch(self, app: str, run: Any) -> None:
        with suppress(RayError):
            ray.get(run.end.remote())
        for _ in range(ATTEMPTS):
            try:
                serve.delete(app)
                break
            except (RayError, TimeoutError):
                # Serve's controller may be starting again.
                time.sleep(10)
        # A detached actor stays until somebody ends it.
        os._exit(0)


@ray.remote(num_cpus=0)
class GiveBack:
    """Removes the placement groups that a run has left when it is gone."""

    def __init__(self, job_id: str, run: Any) -> None:
        threading.Thread(target=self._watch, args=(job_id, run), daemon=True).start()

    def _watch(self, job_id: str, run: Any) -> None:
        with suppress(RayError):
            ray.get(run.end.remote())
        until = time.monotonic() + LINGERS_S
        while time.monotonic() < until:
            time.sleep(LOOKS_EVERY_S)
            # Ray's dashboard, which is asked, may be busy.
            with suppress(RayError, RayStateApiException, TimeoutError):
                for group in left_by(job_id):
                    remove_placement_group(group)
        os._exit(0)


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
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    run: Any = Run.options(scheduling_strategy=here).remote()
    told = {"name": f"raykd-give-back-{context.get_job_id()}", "lifetime": "detached"}
    GiveBack.options(**told, resources={placement.HEAD: 0.0001}).remote(context.get_job_id(), run)
    try:
        yield
    finally:
        ray.kill(run)


@contextmanager
def watched(app: str) -> Iterator[None]:
    """Has an application of Ray Serve taken down should this process die within a `with` block.

    Ray Serve keeps what it serves when the process that asked for it is gone, and with it its GPUs.

    Args:
        app: the application's name.
    """
    context = ray.get_runtime_context()
    # It must not go with another node.
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    # Ray types a handle to an actor as its class, which `ray.kill` does not take.
    run: Any = Run.options(scheduling_strategy=here).remote()
    told = {"name": f"raykd-watch-{context.get_job_id()}-{app}", "lifetime": "detached"}
    watch: Any = Watch.options(**told, resources={placement.HEAD: 0.0001}).remote(app, run)
    try:
        yield
    finally:
        ray.kill(watch)
        ray.kill(run)
