"""Fake GPUs: deployments and workers with the resources of teacher replicas and training workers, without engines."""

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
from raykd.config.sections import Teacher
from raykd.config.training import Train
from raykd.teacher import server


class FakeGpuServer(LLMServer):
    """A replica that holds the placement group of its engine, without the engine."""

    async def __init__(self, llm_config: Any) -> None:  # pyright: ignore[reportInconsistentConstructor]
        self._llm_config = llm_config

    async def check_health(self) -> None:
        pass

    async def record_routing_stats(self) -> dict[str, Any]:
        return {}

    async def answer(self, seconds: float) -> str:
        """Wait for some seconds and return the node's id."""
        await asyncio.sleep(seconds)
        return ray.get_runtime_context().get_node_id()


def carry(module: str) -> None:
    """Pickle a test module by value, because Ray's workers cannot import it."""
    if not module.startswith("raykd."):
        cloudpickle.register_pickle_by_value(sys.modules[module])


@contextmanager
def deployed(teacher: Teacher, kind: resources.Accelerator, deployment: type[LLMServer]) -> Iterator[Any]:
    """Deploy the teacher's configuration with the deployment class of a test, for a `with` block.

    Yields:
        The application's handle; requests wait until a replica is up.
    """
    carry(deployment.__module__)
    app = build_llm_deployment(server.llm_config(teacher, 0, kind), deployment_cls=deployment)
    # A new name each time: Serve's handle of a deleted application stays invalid for its successor.
    name = f"tested-{uuid.uuid4().hex[:8]}"
    target = serve.RunTarget(app, name=name, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        yield serve.get_app_handle(name)
    finally:
        serve.delete(name)


def train_on(train: Train) -> list[tuple[str, list[str]]]:
    """Run Ray Train workers placed like a trial's, and return each worker's node id and GPU ids."""

    carry(__name__)

    def report() -> None:
        context = ray.get_runtime_context()
        ray.get(reports.put.remote((context.get_node_id(), context.get_accelerator_ids()["GPU"])))

    reports = Reports.remote()
    TorchTrainer(
        report,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=True,
            resources_per_worker=resources.process_bundle("gpu", train.accelerator_type),
        ),
    ).fit()
    return ray.get(reports.all.remote())


@ray.remote(num_cpus=0)
class Reports:
    """Reports of all workers."""

    def __init__(self) -> None:
        self._all: list[Any] = []

    def put(self, report: Any) -> None:
        self._all.append(report)

    def all(self) -> list[Any]:
        return self._all
