"""Teacher client: call the teacher with batches of prompts and write its completions."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.config.sections import Teacher
from raykd.data import grading
from raykd.runtime import metrics
from raykd.storage import row_store, schemas
from raykd.teacher.completion_set import CompletionSet
from raykd.teacher.serve_client import ServeTeacherClient


@dataclasses.dataclass(frozen=True)
class TeacherCall:
    """The prompts of one call, which share their sampling: rows of one completion set and one sample index."""

    completion_set: CompletionSet
    sample_index: int
    rows: list[dict[str, Any]]
    """Rows of `build_prompts.QUESTION_SCHEMA`."""

    @property
    def prompts(self) -> list[Any]:
        """The token ids of each prompt, with the text to score; or chat messages."""
        return [
            json.loads(row["messages"] or "[]") or row["prompt_token_ids"].tolist() + row["given_token_ids"].tolist()
            for row in self.rows
        ]

    @property
    def sampling_params(self) -> dict[str, Any]:
        """vLLM's sampling parameters."""
        top_k, sampling = self.completion_set.top_k, self.completion_set.sampling
        if self.completion_set.is_scored:
            # The engine cannot score a prompt without generating a token, which is dropped.
            return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        return {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed + self.sample_index if sampling.temperature else None,
            "logprobs": top_k or None,
        }


CallHook = Callable[[TeacherCall, float, float], None]
"""Takes a call, and when it began and ended (seconds since the epoch)."""


class TeacherClient:
    """Ray Data stage: calls the teacher once for each batch, writes the completions and returns counts.

    The teacher is a Serve application of this cluster, or the server that `teacher.endpoint` names. It generates, or
    scores text that exists (`CompletionSet.is_scored`): its k best log-probabilities at each token of that text.

    Args:
        app: name of the Serve application; unused with `teacher.endpoint`.
        teacher: the `teacher` section.
        completion_sets: the sets that the rows belong to.
        max_calls: calls that may wait for an answer at the same time.
        on_call: called after each call.
    """

    def __init__(
        self,
        app: str,
        teacher: Teacher,
        completion_sets: list[CompletionSet],
        max_calls: int,
        on_call: CallHook | None = None,
    ) -> None:
        self._teacher, self._on_call = teacher, on_call
        self._completion_sets = {str(each.folder): each for each in completion_sets}
        self._replicas = self._endpoint = None
        if teacher.endpoint:
            # Loads OpenAI's client, which takes a second.
            from raykd.teacher.openai_client import OpenAITeacherClient

            self._endpoint = OpenAITeacherClient(teacher)
        else:
            self._replicas = ServeTeacherClient(app, teacher, max_calls)
        self._slots = asyncio.Semaphore(max_calls)
        self._start_lock = asyncio.Lock()
        self._is_ready = False

    async def __call__(self, batch: dict[str, np.ndarray]) -> AsyncIterator[dict[str, list[Any]]]:
        await self._wait_until_ready()
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for call in self._calls(rows):
            completions = await self._complete(call)
            table = pa.Table.from_pylist(completions, schema=schemas.COMPLETION)
            completion_set = call.completion_set
            await asyncio.to_thread(row_store.write_part, completion_set.folder, table)
            if self._endpoint and any(row["error"] for row in completions):
                # Where the server is gone, and not only these rows fail, the stage ends here.
                await self._check_endpoint()
            counts = dataclasses.asdict(metrics.count_rows(completions))
            yield {
                "strategy": [completion_set.strategy_name],
                "source": [completion_set.source],
                **{name: [count] for name, count in counts.items()},
            }

    def _calls(self, rows: list[dict[str, Any]]) -> Iterator[TeacherCall]:
        """Group rows into calls. Prompts of a call share a seed, so the samples of a problem are in different calls."""
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["folder"], int(row["sample_index"])), []).append(row)
        for (folder, sample_index), group in groups.items():
            yield TeacherCall(self._completion_sets[folder], sample_index, group)

    async def _wait_until_ready(self) -> None:
        async with self._start_lock:
            if self._is_ready:
                return
            if self._replicas:
                await self._replicas.wait_until_up()
            else:
                await self._check_endpoint()
            self._is_ready = True

    async def _check_endpoint(self) -> None:
        assert self._endpoint is not None
        generated = [each.top_k for each in self._completion_sets.values() if not each.is_scored]
        scored = [each.top_k for each in self._completion_sets.values() if each.is_scored]
        await self._endpoint.check(logprobs=max(generated, default=0), prompt_logprobs=max(scored, default=0))

    async def _complete(self, call: TeacherCall) -> list[dict[str, Any]]:
        """Return the completions of a call, in the order of its rows; a row that failed carries an error."""
        started = time.time()
        replies = await self._answer(call.prompts, call.sampling_params, self._teacher.timeout_s)
        if self._on_call:
            self._on_call(call, started, time.time())
        return [_completion_row(row, reply, call.completion_set) for row, reply in zip(call.rows, replies, strict=True)]

    async def _answer(
        self, prompts: list[Any], sampling_params: dict[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        if self._replicas:
            return await self._replicas.answer(prompts, sampling_params, timeout_s)
        assert self._endpoint is not None
        async with self._slots:
            return await self._endpoint.answer(prompts, sampling_params, timeout_s)


def _completion_row(row: Mapping[str, Any], reply: Mapping[str, Any], completion_set: CompletionSet) -> dict[str, Any]:
    """Return a row of `schemas.COMPLETION` from a reply to a prompt."""
    if error := reply.get("error"):
        return _error_row(row, error)
    if completion_set.is_scored:
        text, tokens, finish_reason = row["given_text"], row["given_token_ids"].tolist(), row["given_finish_reason"]
    else:
        text, tokens, finish_reason = reply["text"], reply["token_ids"].tolist(), reply["finish_reason"]
    topk_ids, topk_logprobs = [], []
    if completion_set.top_k:
        # An engine that scores also scores the prompt.
        topk_ids = reply["topk_ids"][-len(tokens) :].tolist()
        topk_logprobs = reply["topk_logprobs"][-len(tokens) :].tolist()
        assert len(topk_ids) == len(tokens), "log-probabilities for every completion token"
    return {
        **_id_columns(row),
        "completion": text,
        "completion_token_ids": tokens,
        "finish_reason": finish_reason,
        **grading.grade_completion(text, row["reference_answer"]),
        "topk_ids": topk_ids,
        "topk_logprobs": topk_logprobs,
        "error": "",
    }


def _error_row(row: Mapping[str, Any], error: str) -> dict[str, Any]:
    """Return a row of `schemas.COMPLETION` that holds an error in place of a completion."""
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
    return {
        "completion_id": row["completion_id"],
        "problem_id": row["problem_id"],
        "strategy": row["strategy"],
        "sample_index": int(row["sample_index"]),
        "prompt_token_ids": row["prompt_token_ids"].tolist(),
    }
