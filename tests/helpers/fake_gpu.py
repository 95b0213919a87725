"""Pretended: what holds GPUs that there are not, as the teacher's replicas and the students' workers would."""

import asyncio
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import cloudpickle, serve
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raykd.cluster import resources
from raykd.config.sections import Teacher, Train
from raykd.teacher import server


class Pretended(LLMServer):
    """A replica with the place of its engine, and without the engine."""

    async def __init__(self, llm_config: Any) -> None:  # pyright: ignore[reportInconsistentConstructor]
        self._llm_config = llm_config

    async def check_health(self) -> None:
        pass

    async def record_routing_stats(self) -> dict[str, Any]:
        return {}

    async def answer(self, seconds: float) -> str:
        """Takes so long, and tells on which node it did."""
        await asyncio.sleep(seconds)
        return ray.get_runtime_context().get_node_id()


def carry(module: str) -> None:
    """Has a module of the tests sent to Ray's workers, which do not find it where they are."""
    if not module.startswith("raykd."):
        cloudpickle.register_pickle_by_value(sys.modules[module])


@contextmanager
def deployed(told: Teacher, kind: resources.Accelerator, deployment: type[LLMServer]) -> Iterator[Any]:
    """The teacher as raykd configures it, behind a deployment of a test's, for a `with` block.

    Yields:
        its handle, which may be asked before a replica is up.
    """
    carry(deployment.__module__)
    app = build_llm_deployment(server.llm_config(told, 0, kind), deployment_cls=deployment)
    # A handle to an application that was there before would take it for gone.
    name = f"tested-{uuid.uuid4().hex[:8]}"
    target = serve.RunTarget(app, name=name, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        yield serve.get_app_handle(name)
    finally:
        serve.delete(name)


def train_on(train: Train) -> list[tuple[str, list[str]]]:
    """Has Ray Train's workers, placed as a trial's are, tell on which node they are and which GPUs they were given."""

    carry(__name__)

    def tell() -> None:
        context = ray.get_runtime_context()
        ray.get(told.put.remote((context.get_node_id(), context.get_accelerator_ids()["GPU"])))

    told = Told.remote()
    TorchTrainer(
        tell,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=True,
            resources_per_worker=resources.process_bundle("gpu", train.accelerator_type),
        ),
    ).fit()
    return ray.get(told.all.remote())


@ray.remote(num_cpus=0)
class Told:
    """What workers told."""

    def __init__(self) -> None:
        self._all: list[Any] = []

    def put(self, told: Any) -> None:
        self._all.append(told)

    def all(self) -> list[Any]:
        return self._all
