"""Pretended: what holds GPUs that there are not, as the teacher's replicas and the students' workers would."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raykd import placement, teacher
from raykd.sections import Teacher, Train


class Pretended(LLMServer):
    """A replica with the place of its engine, and without the engine."""

    async def __init__(self, llm_config: Any) -> None:  # pyright: ignore[reportInconsistentConstructor]
        self._llm_config = llm_config

    async def check_health(self) -> None:
        pass

    async def answer(self, seconds: float) -> str:
        """Takes so long, and tells on which node it did."""
        await asyncio.sleep(seconds)
        return ray.get_runtime_context().get_node_id()


@contextmanager
def deployed(told: Teacher, kind: placement.Accelerator, deployment: type[LLMServer]) -> Iterator[Any]:
    """The teacher as raykd configures it, behind a deployment of a test's, for a `with` block.

    Yields:
        its handle, which may be asked before a replica is up.
    """
    app = build_llm_deployment(teacher.llm_config(told, 0, kind), deployment_cls=deployment)
    target = serve.RunTarget(app, name="tested", route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        yield serve.get_app_handle("tested")
    finally:
        serve.delete("tested")


def train_on(train: Train) -> list[tuple[str, list[str]]]:
    """Has Ray Train's workers, placed as a trial's are, tell on which node they are and which GPUs they were given."""

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
            resources_per_worker=placement.processor("gpu", train.accelerator_type),
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
