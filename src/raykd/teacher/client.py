"""Send batches of prompts to the teacher and write its completions."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from ray import serve
from ray.exceptions import RayError, RayTaskError

from raykd import compat
from raykd.config.sections import Teacher
from raykd.data import grading
from raykd.runtime import metrics
from raykd.storage import row_store, schemas
from raykd.teacher.completion_set import CompletionSet
from raykd.teacher.server import has_replica, is_up, wait_until_up

# How often a call is made again after the replica that had it died. Until Serve has noticed that, which takes it three
# looks, others of the calls may be given to it again, and fail at once.
INFRASTRUCTURE_RETRIES = 6
# A replica gives up rows by itself; only one that does not answer at all is given up.
REPLICA_GRACE_S = 60
MAX_BACKOFF_S = 8
# What `AskTeacher` is given: one row for each completion that is wanted.
QUESTION_SCHEMA = pa.schema(
    [
        *(schemas.COMPLETION.field(name) for name in ("completion_id", "problem_id", "strategy", "sample_index")),
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


class TeacherClient:
    """Asks the teacher, here or elsewhere, one batch a call, writes what it answered, and passes on the counts.

    A row with `given_token_ids` is not answered but scored: the teacher's k best log-probabilities at each of those
    tokens, as if it had written them.
    """

    def __init__(
        self, app: str, experiment: str, teacher: Teacher, requests: list[CompletionSet], in_flight: int
    ) -> None:
        self._app, self._experiment, self._teacher = app, experiment, teacher
        self._elsewhere = None
        if teacher.endpoint:
            # Loads OpenAI's client, which takes a second.
            from raykd.teacher.openai_client import OpenAITeacherClient

            self._elsewhere = OpenAITeacherClient(teacher)
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
            table = pa.Table.from_pylist(answered, schema=schemas.COMPLETION)
            await asyncio.to_thread(row_store.write_part, request.folder, table)
            metrics.count_completions(self._experiment, request.strategy_name, request.source, answered)
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
            max((each.top_k for each in self._requests.values() if (each.source == "teacher") is is_own), default=0)
            for is_own in (True, False)
        )
        await self._elsewhere.check(answered, scored)

    async def _ask(self, rows: list[dict[str, Any]], wanted: CompletionSet) -> list[dict[str, Any]]:
        """Completions of the rows, in their order; rows that cannot be answered carry an error."""
        replies = await self._call(rows, wanted)
        if isinstance(replies, str):
            return [_error_row(row, replies) for row in rows]
        return [_completion_row(row, reply, wanted.top_k) for row, reply in zip(rows, replies, strict=True)]

    async def _call(self, rows: list[dict[str, Any]], wanted: CompletionSet) -> list[dict[str, Any]] | str:
        """The replica's replies to the rows, or why there are none."""
        prompts = [
            json.loads(row["messages"] or "[]") or row["prompt_token_ids"].tolist() + row["given_token_ids"].tolist()
            for row in rows
        ]
        told = (prompts, _sampling_params(rows[0], wanted), self._teacher.timeout_s)
        if self._elsewhere:
            # It makes requests again by itself, and says of each row what befell it.
            async with self._room:
                return await self._answer(*told)
        failure = ""
        for attempt in range(INFRASTRUCTURE_RETRIES):
            if failure:
                await asyncio.sleep(min(2**attempt, MAX_BACKOFF_S))
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


def _sampling_params(row: Mapping[str, Any], wanted: CompletionSet) -> dict[str, Any]:
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


def _completion_row(row: Mapping[str, Any], reply: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    """A row of `schemas.COMPLETION` from a replica's reply."""
    if error := reply.get("error"):
        return _error_row(row, error)
    if given := row["given_token_ids"].tolist():
        text, tokens, finish = row["given_text"], given, row["given_finish_reason"]
    else:
        text, tokens, finish = reply["text"], reply["token_ids"].tolist(), reply["finish_reason"]
    # Where the engine scored, it scored the prompt, too.
    ids, logprobs = (reply[name][-len(tokens) :].tolist() if top_k else [] for name in ("topk_ids", "topk_logprobs"))
    assert len(ids) == (len(tokens) if top_k else 0), "log-probabilities for every completion token"
    return {
        **_id_columns(row),
        "completion": text,
        "completion_token_ids": tokens,
        "finish_reason": finish,
        **grading.grade_completion(text, row["reference_answer"]),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "error": "",
    }


def _error_row(row: Mapping[str, Any], error: str) -> dict[str, Any]:
    """A row of `schemas.COMPLETION` that says why there is no completion."""
    return {
        **_id_columns(row),
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


def _id_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    identity = {name: row[name] for name in ("completion_id", "problem_id", "strategy")}
    return {
        **identity,
        "sample_index": int(row["sample_index"]),
        "prompt_token_ids": row["prompt_token_ids"].tolist(),
    }
