"""Teacher: the served engine. Built from the configuration, waited for, and taken down."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation

from raykd import placement
from raykd.config import Targets, Teacher
from raykd.demo import resolve_model

MODEL_ID = "teacher"


def llm_config(teacher: Teacher, targets: Targets | None, kind: placement.Accelerator) -> Any:
    """The Serve LLM configuration of the teacher.

    Args:
        teacher: the configuration's section.
        targets: with kind `top_k`, the engine is told to allow that many log-probabilities.
        kind: what the engine runs on.
    """
    # Loads vLLM, which takes seconds that a run without anything to ask should not pay.
    from ray.serve.llm import LLMConfig

    kwargs, env = placement.engine_settings(teacher.engine, kind)
    if teacher.revision:
        kwargs["revision"] = teacher.revision
    if targets and targets.kind == "top_k":
        kwargs.setdefault("max_logprobs", max(targets.top_k, 20))
    deployment: dict[str, Any] = {
        # Serve LLM's own default lets one replica take everything, and then never scales.
        "max_ongoing_requests": 2 * teacher.concurrency,
        # The engine's processes have bundles of their own; the replica that feeds them needs no core.
        "ray_actor_options": {"num_cpus": 0},
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 10,
    }
    if teacher.replicas.min == teacher.replicas.max:
        deployment["num_replicas"] = teacher.replicas.max
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": teacher.replicas.min,
            "max_replicas": teacher.replicas.max,
            "target_ongoing_requests": teacher.concurrency,
            "downscale_delay_s": 60,
        }
    return LLMConfig(
        model_loading_config={"model_id": MODEL_ID, "model_source": resolve_model(teacher.model)},
        accelerator_config={"kind": kind},  # pyright: ignore[reportArgumentType]
        placement_group_config={
            "bundles": placement.engine_bundles(teacher.engine, kind),
            "strategy": "PACK",
        },
        engine_kwargs=kwargs,
        runtime_env={"env_vars": env},
        deployment_config=deployment,
    )


@contextmanager
def served(config: Any, app: str) -> Iterator[None]:
    """Serves the teacher inside this cluster, on no network port, for the time of a `with` block.

    The block begins while the engine still loads, so that whatever asks it can get ready meanwhile;
    `wait_until_up` waits for it.

    Args:
        config: from `llm_config`.
        app: the Serve application's name, by which any process of the cluster gets a handle; experiments that
            share a cluster need names of their own.
    """
    from ray.serve.llm import build_llm_deployment

    quiet = logging.getLogger("ray.serve")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = serve.RunTarget(build_llm_deployment(config), name=app, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        yield
    finally:
        serve.delete(app)
        quiet.setLevel(level)


def wait_until_up(app: str, timeout_s: float) -> None:
    """Waits until a replica of the teacher answers.

    Args:
        app: the Serve application's name.
        timeout_s: seconds that the engine may take to load.

    Raises:
        TimeoutError: where no replica is up in time.
        RuntimeError: where the engine fails to start, with Serve's message.
    """
    deadline = time.monotonic() + timeout_s
    while not is_up(app):
        if failed := failure(app):
            raise RuntimeError(failed)
        if time.monotonic() > deadline:
            raise TimeoutError(f"the teacher was not up after {timeout_s:g} s (teacher.start_timeout_s)")
        time.sleep(0.5)


def is_up(app: str) -> bool:
    """Whether the teacher has all the replicas it should have at least."""
    status = serve.status().applications.get(app)
    return status is not None and status.status == "RUNNING"


def failure(app: str) -> str:
    """Why the teacher's engine does not start, in Serve's words; empty where it starts or runs."""
    status = serve.status().applications.get(app)
    if status is None or status.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return ""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    return f"the teacher did not start: {' '.join(message for message in messages if message)}"
