"""Teacher: the served engine. Built from the configuration, waited for, asked, and taken down."""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import ProxyLocation

from raykd import compat, completions, metrics, placement, records, storage
from raykd.cluster import is_joined
from raykd.completions import Request
from raykd.demo import resolve_model
from raykd.faults import StageError, as_user_error
from raykd.progress import say
from raykd.sections import Teacher
from raykd.watch import watched

MODEL_ID = "teacher"
# How often a call is made again after the replica that had it died. Until Serve has noticed that, which takes it three
# looks, others of the calls may be given to it again, and fail at once.
INFRASTRUCTURE_RETRIES = 6
HEALTH_CHECK_EVERY_S = 2
# A replica gives up rows by itself; only one that does not answer at all is given up.
REPLICA_GRACE_S = 60
LONGEST_PAUSE_S = 8
# What `AskTeacher` is given: one row for each completion that is wanted.
QUESTION = pa.schema(
    [
        *(records.COMPLETION.field(name) for name in ("completion_id", "problem_id", "strategy", "sample_index")),
        pa.field("reference_answer", pa.string()),
        # Of the request that the row belongs to.
        pa.field("folder", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        # Of a teacher that is sent messages these, in JSON; its prompt has no tokens here.
        pa.field("messages", pa.string()),
        # What the teacher is to score; empty where it is to answer.
        pa.field("given_token_ids", pa.list_(pa.int32())),
        pa.field("given_text", pa.string()),
        pa.field("given_finish_reason", pa.string()),
    ]
)


def llm_config(teacher: Teacher, top_k: int, kind: placement.Accelerator) -> Any:
    """The Serve LLM configuration of the teacher.

    Args:
        teacher: the configuration's section.
        top_k: the engine is told to allow that many log-probabilities; 0 for none.
        kind: what the engine runs on.
    """
    # Loads vLLM, which takes seconds that a run without anything to ask should not pay.
    from ray.serve.llm import LLMConfig

    kwargs, env = placement.engine_settings(teacher.engine, kind, teacher.start_timeout_s)
    if teacher.revision:
        kwargs["revision"] = teacher.revision
    kwargs["trust_remote_code"] = teacher.trust_remote_code
    if top_k:
        kwargs.setdefault("max_logprobs", max(top_k, 20))
        # vLLM's default, and the only mode that gives the model's own distribution whatever the sampling.
        kwargs.setdefault("logprobs_mode", "raw_logprobs")
    deployment: dict[str, Any] = {
        # Serve LLM's own default lets one replica take everything, and then never scales.
        "max_ongoing_requests": 2 * teacher.concurrency,
        # The engine's processes have bundles of their own; the replica that feeds them needs no core.
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": HEALTH_CHECK_EVERY_S,
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
        callback_config={"callback_class": "raykd.hub_tokens.KeepHubTokens"},  # pyright: ignore[reportArgumentType]
        # By default, too; but Serve LLM refuses an engine that was told to keep no statistics.
        log_engine_metrics=not kwargs.get("disable_log_stats", False),
        deployment_config=deployment,
    )


def app_name(experiment: str) -> str:
    """What the teacher of an experiment is called in Ray Serve: otherwise for each process that works on it."""
    return f"raykd-{experiment}-{ray.get_runtime_context().get_job_id()}"


@contextmanager
def served(teacher: Teacher, top_k: int, app: str, cluster: Mapping[str, float]) -> Iterator[None]:
    """Serves the teacher inside this cluster, on no network port, for the time of a `with` block.

    The block begins while the engine still loads, so that whatever asks it can get ready meanwhile;
    `wait_until_up` waits for it. A teacher that is elsewhere is served there.

    Args:
        teacher: the configuration's section.
        top_k: the most log-probabilities that will be asked for at a token; 0 for none.
        app: the Serve application's name, by which any process of the cluster gets a handle; experiments that
            share a cluster need names of their own.
        cluster: the cluster's resources.
    """
    if teacher.endpoint:
        say(f"asking the teacher {teacher.served_model} at {teacher.endpoint.url}")
        yield
        return
    kind = placement.accelerator(teacher.engine.accelerator, cluster)
    say(f"starting the teacher {teacher.model} ({kind})")
    # Loads vLLM, which takes seconds.
    from ray.serve.llm import build_llm_deployment

    from raykd.replica import Replica

    with as_user_error("teacher.engine", ValueError):
        deployment = build_llm_deployment(llm_config(teacher, top_k, kind), deployment_cls=Replica)
    quiet = logging.getLogger("ray.serve")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = serve.RunTarget(deployment, name=app, route_prefix=None)
        with watched(app) if is_joined() else nullcontext():
            try:
                serve.run_many([target], wait_for_applications_running=False)
                yield
            finally:
                serve.delete(app)
    finally:
        quiet.setLevel(level)


def wait_until_up(app: str, timeout_s: float) -> None:
    """Waits until a replica of the teacher can be asked.

    Args:
        app: the Serve application's name.
        timeout_s: seconds that the engine may take to load.

    Raises:
        StageError: where no replica is up in time, or the engine fails to start, with Serve's message.
    """
    deadline = time.monotonic() + timeout_s
    while not is_up(app):
        if failed := failure(app):
            raise StageError(failed)
        if time.monotonic() > deadline:
            raise StageError(f"the teacher was not up after {timeout_s:g} s (teacher.start_timeout_s)")
        time.sleep(0.5)


def is_up(app: str) -> bool:
    """Whether the teacher can be asked: a replica is there, or, where it scales from none, will be when it is asked."""
    status = serve.status().applications.get(app)
    # Other replicas may be loading still, at first or again.
    return (status is not None and status.status == "RUNNING") or has_replica(app)


def has_replica(app: str) -> bool:
    """Whether a replica of the teacher runs."""
    status = serve.status().applications.get(app)
    deployments = status.deployments.values() if status else ()
    return any(state == "RUNNING" and count for each in deployments for state, count in each.replica_states.items())


def failure(app: str) -> str:
    """Why the teacher's engine does not start, in Serve's words; empty where it starts, again perhaps, or runs."""
    status = serve.status().applications.get(app)
    if status is None or status.status != "DEPLOY_FAILED":
        return ""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    return f"the teacher did not start: {' '.join(message for message in messages if message)}"


class AskTeacher:
    """Asks the teacher, here or elsewhere, one batch a call, writes what it answered, and passes on the counts.

    A row with `given_token_ids` is not answered but scored: the teacher's k best log-probabilities at each of those
    tokens, as if it had written them.
    """

    def __init__(self, app: str, experiment: str, teacher: Teacher, requests: list[Request], in_flight: int) -> None:
        self._app, self._experiment, self._teacher = app, experiment, teacher
        self._elsewhere = None
        if teacher.endpoint:
            # Loads OpenAI's client, which takes a second.
            from raykd.endpoint import Server

            self._elsewhere = Server(teacher)
        self._answer = self._elsewhere.answer if self._elsewhere else serve.get_app_handle(app).answer.remote
        self._requests = {str(request.folder): request for request in requests}
        self._room = asyncio.Semaphore(in_flight)
        self._up = asyncio.Lock()
        self._was_up = False
        # Whether a replica is known to have run; one that scales from none is up without.
        self._was_there = teacher.replicas.min > 0

    async def __call__(self, batch: dict[str, np.ndarray]) -> AsyncIterator[dict[str, list[int]]]:
        if not self._was_up:
            await self._wait_until_up()
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        # All prompts of a call share a seed, so a problem's samples, which must differ, go into different calls.
        for folder, sample_index in dict.fromkeys((row["folder"], row["sample_index"]) for row in rows):
            group = [row for row in rows if (row["folder"], row["sample_index"]) == (folder, sample_index)]
            request = self._requests[folder]
            answered = await self._ask(group, request)
            table = pa.Table.from_pylist(answered, schema=records.COMPLETION)
            await asyncio.to_thread(storage.write_part, request.folder, table)
            metrics.count_completions(self._experiment, request.strategy_name, request.sequence, answered)
            if self._elsewhere and any(row["error"] for row in answered):
                # Is it up to the rows? Where the server is gone, all others would fail as well.
                await self._check_elsewhere()
            yield {
                "rows": [len(answered)],
                "tokens": [sum(len(row["completion_token_ids"]) for row in answered)],
            }

    async def _wait_until_up(self) -> None:
        async with self._up:
            if not self._elsewhere:
                await asyncio.to_thread(wait_until_up, self._app, self._teacher.start_timeout_s)
            elif not self._was_up:
                await self._check_elsewhere()
            self._was_up = True

    async def _check_elsewhere(self) -> None:
        assert self._elsewhere is not None
        answered, scored = (
            max((each.top_k for each in self._requests.values() if (each.sequence == "teacher") is is_own), default=0)
            for is_own in (True, False)
        )
        await self._elsewhere.check(answered, scored)

    async def _ask(self, rows: list[dict[str, Any]], wanted: Request) -> list[dict[str, Any]]:
        """Completions of the rows, in their order; rows that cannot be answered carry an error."""
        replies = await self._call(rows, wanted)
        if isinstance(replies, str):
            return [_failed(row, replies) for row in rows]
        return [_completion(row, reply, wanted.top_k) for row, reply in zip(rows, replies, strict=True)]

    async def _call(self, rows: list[dict[str, Any]], wanted: Request) -> list[dict[str, Any]] | str:
        """The replica's replies to the rows, or why there are none."""
        prompts = [
            json.loads(row["messages"] or "[]") or row["prompt_token_ids"].tolist() + row["given_token_ids"].tolist()
            for row in rows
        ]
        told = (prompts, _sampling(rows[0], wanted), self._teacher.timeout_s)
        if self._elsewhere:
            # It makes requests again by itself, and says of each row what befell it.
            async with self._room:
                return await self._answer(*told)
        failure = ""
        for attempt in range(INFRASTRUCTURE_RETRIES):
            if failure:
                await asyncio.sleep(min(2**attempt, LONGEST_PAUSE_S))
                # Loading a large model takes longer than an answer may.
                await self._wait_until_up()
            try:
                # What waits for room does not wait for its answer yet.
                async with self._room:
                    reply = await self._patiently(self._answer(*told))
                self._was_there = True
                return reply
            except TimeoutError:
                failure = f"no answer within {self._teacher.timeout_s:g} s (teacher.timeout_s)"
                if await asyncio.to_thread(is_up, self._app):
                    return failure
            except RayError as error:
                failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                if (
                    attempt
                    and isinstance(error, RayTaskError)
                    and type(error.cause).__name__ != compat.ENGINE_DEAD_ERROR
                ):
                    # It is up to the call, not to the replica.
                    return failure
        return failure

    async def _patiently(self, asked: Any) -> list[dict[str, Any]]:
        """A replica's replies, waited for as long as they may take once there is a replica.

        Raises:
            TimeoutError: where there was one all the time, or none for `teacher.start_timeout_s`.
        """
        replicas, told = self._teacher.replicas, self._teacher
        # While others are still loading, calls for all of them queue before those that are there.
        longest = (told.timeout_s + REPLICA_GRACE_S) * math.ceil(replicas.max / max(1, replicas.min))
        began, was_there = time.monotonic(), self._was_there
        reply = asyncio.ensure_future(_awaited(asked))
        try:
            while not (await asyncio.wait([reply], timeout=longest))[0]:
                # A teacher that scales from none loads, or waits for its nodes, when it is asked: the call is what
                # keeps it coming.
                is_there = await asyncio.to_thread(has_replica, self._app)
                waited = time.monotonic() - began
                if (is_there and was_there) or (not is_there and waited > told.start_timeout_s):
                    raise TimeoutError
                was_there = is_there
            return reply.result()
        finally:
            reply.cancel()


async def _awaited(reply: Any) -> Any:
    return await reply


def _sampling(row: Mapping[str, Any], wanted: Request) -> dict[str, Any]:
    """vLLM's sampling parameters."""
    if len(row["given_token_ids"]):
        # The engine cannot but write a token of its own; it is thrown away.
        return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": wanted.top_k}
    sampling = wanted.sampling
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed + int(row["sample_index"]) if sampling.temperature else None,
        "logprobs": wanted.top_k or None,
    }


def _completion(row: Mapping[str, Any], reply: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    """A row of `records.COMPLETION` from a replica's reply."""
    if error := reply.get("error"):
        return _failed(row, error)
    if given := row["given_token_ids"].tolist():
        text, tokens, finish = row["given_text"], given, row["given_finish_reason"]
    else:
        text, tokens, finish = reply["text"], reply["token_ids"].tolist(), reply["finish_reason"]
    # Where the engine scored, it scored the prompt, too.
    ids, logprobs = (reply[name][-len(tokens) :].tolist() if top_k else [] for name in ("topk_ids", "topk_logprobs"))
    assert len(ids) == (len(tokens) if top_k else 0), "log-probabilities for every completion token"
    return {
        **_identity(row),
        "completion": text,
        "completion_token_ids": tokens,
        "finish_reason": finish,
        **completions.answers_of(text, row["reference_answer"]),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "error": "",
    }


def _failed(row: Mapping[str, Any], error: str) -> dict[str, Any]:
    """A row of `records.COMPLETION` that says why there is no completion."""
    return {
        **_identity(row),
        "completion": "",
        "completion_token_ids": [],
        "finish_reason": "error",
        "answer_strict": None,
        "answer_flexible": None,
        "is_correct": False,
        "topk_ids": [],
        "topk_logprobs": [],
        "error": error,
    }


def _identity(row: Mapping[str, Any]) -> dict[str, Any]:
    identity = {name: row[name] for name in ("completion_id", "problem_id", "strategy")}
    return {
        **identity,
        "sample_index": int(row["sample_index"]),
        "prompt_token_ids": row["prompt_token_ids"].tolist(),
    }
