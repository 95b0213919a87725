"""Generate: problems x strategies become completions, through Ray Data and the served teacher, resumable by row.

The stage that asks the teacher also writes: what one call answered lies on disk before the next row counts.
So whatever is killed, at most the calls in flight are asked again (Ray Data's own checkpoint commits whole
blocks, and counts rows with an error as done).
"""

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray import serve
from ray.exceptions import RayError

from raykd import answers, models, prompts, records, storage
from raykd.completions import Request, completion_id
from raykd.config import Teacher
from raykd.progress import Meter
from raykd.teacher import MODEL_ID, failure, wait_until_up

# How often a call is made again after the replica that had it died; Serve starts another meanwhile.
INFRASTRUCTURE_RETRIES = 6


def generate(
    wanted: list[Request],
    problems: Path,
    teacher: Teacher,
    instruction: str,
    app: str,
    versions: Mapping[str, str],
) -> None:
    """Asks the served teacher all that is missing, for all strategies in one stream, and seals each folder.

    Args:
        wanted: from `requests`.
        problems: the folder of the splits; `train` is asked.
        teacher: the configuration's section.
        instruction: what is said about the form of the answer.
        app: the Serve application's name.
        versions: of the packages that matter, for the manifest.

    Raises:
        RuntimeError: where more than `teacher.max_error_rate` of a strategy's rows failed, naming some.
    """
    started = time.monotonic()
    total = pq.read_metadata(problems / "train.parquet").num_rows
    done = {
        request.folder.name: storage.done_ids(request.folder, records.COMPLETION, "completion_id") for request in wanted
    }
    already = sum(len(ids) for ids in done.values())
    with Meter("teacher", total * len(wanted), done=already) as meter:
        if already < total * len(wanted):
            try:
                for row in _answered(wanted, problems, teacher, instruction, app, done).iter_rows():
                    meter.add(row["rows"], row["tokens"])
            except RayError:
                # Where it is the teacher that failed, say so rather than where that was noticed.
                if failed := failure(app):
                    raise RuntimeError(failed) from None
                raise
    seconds = time.monotonic() - started
    for request in wanted:
        _seal(request, total, teacher.max_error_rate, seconds / len(wanted), versions)


def _answered(
    wanted: list[Request],
    problems: Path,
    teacher: Teacher,
    instruction: str,
    app: str,
    done: dict[str, set[str]],
) -> ray.data.Dataset:
    """The stream that asks what is missing; its rows are counts, for the completions are written on the way."""
    in_flight = teacher.concurrency * teacher.replicas.max
    # The actors wait far more than they work: they take no core from the engine, nor from Ray Data's own tasks.
    questions = ray.data.read_parquet(str(problems / "train.parquet")).map_batches(
        Render,
        batch_size=256,
        batch_format="pyarrow",
        fn_constructor_kwargs={
            "requests": wanted,
            "model": teacher.model,
            "revision": teacher.revision,
            "instruction": instruction,
            "done": done,
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    # Blocks as large as a call, so that each call can be under way, and written, on its own.
    return questions.repartition(target_num_rows_per_block=teacher.batch_size).map_batches(
        AskTeacher,
        batch_size=teacher.batch_size,
        fn_constructor_kwargs={"app": app, "teacher": teacher, "requests": wanted, "in_flight": in_flight},
        compute=ray.data.ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=in_flight, max_concurrent_calls_per_actor=in_flight
        ),
        num_cpus=0,
    )


class Render:
    """Turns problems into the teacher's prompt tokens, leaving out what was answered before."""

    def __init__(
        self,
        requests: list[Request],
        model: str,
        revision: str | None,
        instruction: str,
        done: dict[str, set[str]],
    ) -> None:
        self._tokenizer = models.load_tokenizer(model, revision)
        self._requests, self._instruction, self._done = requests, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Strategy by strategy, so that neighbours share a prime, which the engine then computes once.
        rows = [
            self._row(problem, request)
            for request in self._requests
            for problem in batch.to_pylist()
            if completion_id(request, problem["problem_id"]) not in self._done[request.folder.name]
        ]
        return pa.Table.from_pylist(rows, schema=_QUESTION)

    def _row(self, problem: dict[str, Any], request: Request) -> dict[str, Any]:
        messages = prompts.teacher_messages(problem, request.strategy, self._instruction)
        return {
            "completion_id": completion_id(request, problem["problem_id"]),
            "problem_id": problem["problem_id"],
            "reference_answer": problem["reference_answer"],
            "strategy": request.strategy_name,
            "sample_index": 0,
            "key": request.folder.name,
            "prompt_token_ids": models.prompt_token_ids(self._tokenizer, messages),
        }


_QUESTION = pa.schema(
    [records.COMPLETION.field(name) for name in ("completion_id", "problem_id", "strategy", "sample_index")]
    + [
        pa.field("reference_answer", pa.string()),
        pa.field("key", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
    ]
)


class AskTeacher:
    """Asks the served teacher one batch a call, writes what it answered, and passes on the counts."""

    def __init__(
        self,
        app: str,
        teacher: Teacher,
        requests: list[Request],
        in_flight: int,
    ) -> None:
        self._app, self._handle = app, serve.get_app_handle(app)
        self._teacher = teacher
        self._requests = {request.folder.name: request for request in requests}
        self._room = asyncio.Semaphore(in_flight)
        self._up = asyncio.Lock()
        self._is_up = False

    async def __call__(self, batch: dict[str, np.ndarray]) -> AsyncIterator[dict[str, list[int]]]:
        await self._wait_until_up()
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for key in dict.fromkeys(row["key"] for row in rows):
            group = [row for row in rows if row["key"] == key]
            request = self._requests[key]
            async with self._room:
                completions = await self._ask(group, request.content["top_k"])
            table = pa.Table.from_pylist(completions, schema=records.COMPLETION)
            await asyncio.to_thread(storage.write_part, request.folder, table, "completion_id")
            yield {
                "rows": [len(completions)],
                "tokens": [sum(len(row["completion_token_ids"]) for row in completions)],
            }

    async def _wait_until_up(self) -> None:
        """Loads what a request is made of while the engine loads, and waits for that."""
        async with self._up:
            if not self._is_up:
                importlib.import_module("ray.serve.llm.openai_api_models")
                await asyncio.to_thread(wait_until_up, self._app, self._teacher.start_timeout_s)
                self._is_up = True

    async def _ask(self, rows: list[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
        """Completions of the rows, in their order; rows that cannot be answered carry an error."""
        reply = await self._call(rows, top_k)
        if isinstance(reply, str) and len(rows) > 1:
            # One bad row makes the engine refuse all of a call: find it, and answer the others.
            return [answer for row in rows for answer in await self._ask([row], top_k)]
        if isinstance(reply, str):
            return [_failed(rows[0], reply)]
        return [_completion(row, choice, top_k) for row, choice in zip(rows, reply, strict=True)]

    async def _call(self, rows: list[dict[str, Any]], top_k: int) -> list[Any] | str:
        """The choices for the rows, or why there are none."""
        # Not before a worker needs it: it loads vLLM.
        from ray.serve.llm.openai_api_models import CompletionRequest

        sampling = self._teacher.sampling
        request = CompletionRequest(
            model=MODEL_ID,
            prompt=[row["prompt_token_ids"].tolist() for row in rows],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature else None,
            logprobs=top_k or None,
            return_token_ids=True,
            return_tokens_as_token_ids=True if top_k else None,
        )
        failure = ""
        for attempt in range(INFRASTRUCTURE_RETRIES):
            try:
                async with asyncio.timeout(self._teacher.timeout_s):
                    replies: Any = self._handle.options(stream=True).completions.remote(request)
                    async for reply in replies:
                        if hasattr(reply, "choices"):
                            return sorted(reply.choices, key=lambda choice: choice.index)
                        return f"refused: {reply.error.message}"
                return "the teacher sent no answer"
            except TimeoutError:
                return f"no answer within {self._teacher.timeout_s:g} s (teacher.timeout_s)"
            except RayError as error:
                failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                await asyncio.sleep(2**attempt)
        return failure


def _completion(row: Mapping[str, Any], choice: Any, top_k: int) -> dict[str, Any]:
    """A row of `records.COMPLETION` from one choice of the engine's reply."""
    topk_ids, topk_logprobs = [], []
    if top_k:
        for position in choice.logprobs.top_logprobs:
            # The sampled token comes along even where it is none of the k best; the k best are wanted.
            best = sorted(position.items(), key=lambda item: -item[1])[:top_k]
            topk_ids.append([int(token.removeprefix("token_id:")) for token, _ in best])
            topk_logprobs.append([logprob for _, logprob in best])
        assert len(topk_ids) == len(choice.token_ids), "a log-probability for every completion token"
    strict = answers.strict_match(choice.text)
    return {
        **_identity(row),
        "completion": choice.text,
        "completion_token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "answer_strict": strict,
        "answer_flexible": answers.flexible_extract(choice.text),
        "is_correct": answers.is_correct(strict, row["reference_answer"]),
        "topk_ids": topk_ids,
        "topk_logprobs": topk_logprobs,
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


def _seal(request: Request, total: int, max_error_rate: float, seconds: float, versions: Mapping[str, str]) -> None:
    """Checks that all rows are there, and writes the manifest with what they hold."""
    rows = storage.open_rows(request.folder, records.COMPLETION)
    counts = {"answered": 0, "correct": 0, "completion_tokens": 0, "truncated": 0, "prompt_tokens": 0}
    failed: dict[str, str] = {}
    answered: set[str] = set()
    for batch in rows.to_batches(
        columns=[
            "problem_id",
            "is_correct",
            "completion_token_ids",
            "prompt_token_ids",
            "finish_reason",
            "error",
        ]
    ):
        for row in batch.to_pylist():
            if row["error"]:
                failed[row["problem_id"]] = row["error"]
                continue
            answered.add(row["problem_id"])
            counts["answered"] += 1
            counts["correct"] += row["is_correct"]
            counts["completion_tokens"] += len(row["completion_token_ids"])
            counts["prompt_tokens"] += len(row["prompt_token_ids"])
            counts["truncated"] += row["finish_reason"] == "length"
    errors = sorted(set(failed) - answered)
    assert counts["answered"] + len(errors) == total, "each problem has one completion or one error"
    if len(errors) > max_error_rate * total:
        shown = "; ".join(f"{problem_id}: {failed[problem_id]}" for problem_id in errors[:3])
        raise RuntimeError(
            f"strategy {request.strategy_name!r}: {len(errors)} of {total} rows failed, more than "
            f"teacher.max_error_rate={max_error_rate:g} allows ({shown}); the others are kept in "
            f"{request.folder}, and the same command asks the failed ones again"
        )
    storage.seal(
        request.folder,
        records.COMPLETION,
        "completion_id",
        {
            "strategy": request.strategy_name,
            "content": request.content,
            **counts,
            "errors": len(errors),
            "seconds": round(seconds, 1),
            "versions": dict(versions),
        },
    )
