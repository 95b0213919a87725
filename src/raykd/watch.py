"""Watch: on a cluster that goes on, a served teacher is taken down with the run that started it, however that ends."""

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raykd import placement

ATTEMPTS = 30


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
