"""Serve the teacher with Ray Serve and vLLM: configure, start, wait and stop."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation

from raykd.cluster import engine, resources
from raykd.cluster.capacity import is_existing_cluster
from raykd.cluster.cleanup import serve_app_cleanup
from raykd.config.sections import Teacher
from raykd.errors import StageError, as_user_error
from raykd.models.builtin import resolve_model
from raykd.runtime.console import print_status

MODEL_ID = "teacher"
HEALTH_CHECK_PERIOD_S = 2


def llm_config(teacher: Teacher, top_k: int, kind: resources.Accelerator) -> Any:
    """Return the Serve LLM configuration of the teacher.

    Args:
        teacher: the `teacher` section.
        top_k: most log-probabilities of a token that the engine must return; 0 for none.
        kind: accelerator of the engine.
    """
    # Loads vLLM, which takes seconds; a run whose completions exist does not need it.
    from ray.serve.llm import LLMConfig

    kwargs, env = engine.engine_settings(teacher.engine, kind, teacher.start_timeout_s)
    if teacher.revision:
        kwargs["revision"] = teacher.revision
    kwargs["trust_remote_code"] = teacher.trust_remote_code
    if top_k:
        kwargs.setdefault("max_logprobs", max(top_k, 20))
        # vLLM's default, and the only mode whose log-probabilities do not depend on the sampling parameters.
        kwargs.setdefault("logprobs_mode", "raw_logprobs")
    deployment: dict[str, Any] = {
        # With Serve LLM's default one replica accepts all calls, so that Serve never scales up.
        "max_ongoing_requests": 2 * teacher.concurrency,
        # The engine's processes have bundles of their own; the replica itself needs no core.
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
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
            "bundles": resources.engine_bundles(teacher.engine, kind),
            "strategy": "PACK",
        },
        engine_kwargs=kwargs,
        runtime_env={"env_vars": env},
        callback_config={"callback_class": "raykd.teacher.deployment_callback.PrepareNodes"},  # pyright: ignore[reportArgumentType]
        # True by default; but Serve LLM rejects it together with `disable_log_stats`.
        log_engine_metrics=not kwargs.get("disable_log_stats", False),
        deployment_config=deployment,
    )


def app_name(experiment: str) -> str:
    """Return the name of the teacher's Serve application, which differs for each driver of an experiment."""
    return f"raykd-{experiment}-{ray.get_runtime_context().get_job_id()}"


@contextmanager
def serve_teacher(teacher: Teacher, top_k: int, app: str, cluster: Mapping[str, float]) -> Iterator[None]:
    """Serve the teacher inside this cluster, without a network port, during a `with` block.

    The block begins while the engine still loads, so that its callers can start meanwhile; `wait_until_up` waits for
    the engine. With `teacher.endpoint` nothing is served.

    Args:
        teacher: the `teacher` section.
        top_k: most log-probabilities of a token that calls will request; 0 for none.
        app: name of the Serve application (`app_name`), by which any process of the cluster gets a handle.
        cluster: the cluster's resources by Ray's names.
    """
    if teacher.endpoint:
        print_status(f"using the teacher {teacher.served_model} at {teacher.endpoint.url}")
        yield
        return
    kind = resources.resolve_accelerator(teacher.engine.accelerator, cluster)
    print_status(f"starting the teacher {teacher.model} ({kind})")
    # Loads vLLM, which takes seconds.
    from ray.serve.llm import build_llm_deployment

    from raykd.teacher.deployment import TeacherDeployment

    with as_user_error("teacher.engine", ValueError):
        deployment = build_llm_deployment(llm_config(teacher, top_k, kind), deployment_cls=TeacherDeployment)
    serve_logger = logging.getLogger("ray.serve")
    level = serve_logger.level
    serve_logger.setLevel(logging.ERROR)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = serve.RunTarget(deployment, name=app, route_prefix=None)
        with serve_app_cleanup(app) if is_existing_cluster() else nullcontext():
            try:
                serve.run_many([target], wait_for_applications_running=False)
                yield
            finally:
                serve.delete(app)
    finally:
        serve_logger.setLevel(level)


def wait_until_up(app: str, timeout_s: float) -> None:
    """Wait until the teacher accepts calls (`is_up`).

    Args:
        app: name of the Serve application.
        timeout_s: most seconds for the engine to load.

    Raises:
        StageError: no replica is up in time, or the engine fails to start, with Serve's message.
    """
    deadline = time.monotonic() + timeout_s
    while not is_up(app):
        if failure := start_failure(app):
            raise StageError(failure)
        if time.monotonic() > deadline:
            raise StageError(f"the teacher was not up after {timeout_s:g} s (teacher.start_timeout_s)")
        time.sleep(0.5)


def is_up(app: str) -> bool:
    """Return whether the teacher accepts calls: a replica runs, or a call will start one (scaling from zero)."""
    status = serve.status().applications.get(app)
    # The application may be deploying still, while one of several replicas runs.
    return (status is not None and status.status == "RUNNING") or has_replica(app)


def has_replica(app: str) -> bool:
    """Return whether a replica of the teacher runs."""
    status = serve.status().applications.get(app)
    deployments = status.deployments.values() if status else ()
    return any(state == "RUNNING" and count for each in deployments for state, count in each.replica_states.items())


def start_failure(app: str) -> str:
    """Return Serve's message on an engine that failed to start; empty where the engine starts, restarts or runs."""
    status = serve.status().applications.get(app)
    if status is None or status.status != "DEPLOY_FAILED":
        return ""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    return f"the teacher did not start: {' '.join(message for message in messages if message)}"
