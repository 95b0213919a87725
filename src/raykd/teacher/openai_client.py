"""Endpoint: a server elsewhere that speaks OpenAI's protocol, asked as a replica is, and answering in the same arrays.

OpenAI's client makes requests again, with backoff and jitter or when `Retry-After` says. vLLM's server adds to the
protocol what a teacher must give besides text: the ids of the tokens, in answers and in log-probabilities.
"""

import asyncio
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

from raykd.config.sections import Teacher
from raykd.errors import StageError

CONNECT_TIMEOUT_S = 10
# As long as what a server has to say about a mistake may be.
_MESSAGE_PATTERN = 300
# What is sent where none is asked for; the client would else send the key of another server (OPENAI_API_KEY).
NO_KEY = "EMPTY"
# Sampling that a request does not name, vLLM's server takes from the model's generation_config.json.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class OpenAITeacherClient:
    """The client of one server, with its limits."""

    def __init__(self, teacher: Teacher) -> None:
        assert teacher.endpoint is not None
        self._teacher, self._endpoint = teacher, teacher.endpoint
        key = os.environ.get(self._endpoint.api_key_env or "", "").strip()
        # What no header can hold is sent nowhere, for whatever refuses it repeats it.
        self._is_sound = key.isascii() and key.isprintable() and " " not in key
        self._key = key if self._is_sound else ""
        self._room = asyncio.Semaphore(self._endpoint.max_concurrent_requests)
        self._pace = RateLimiter(self._endpoint.max_requests_per_minute)
        client = AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=self._key or NO_KEY,
            max_retries=self._endpoint.max_retries,
            # How long an answer may take is said with each call.
            timeout=Timeout(None, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [self._again]}),
        )
        self._completions = client.completions.with_raw_response
        self._chat = client.chat.completions.with_raw_response

    async def answer(
        self, prompts: Sequence[Any], sampling: Mapping[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Answers prompts, each by itself: what befalls one leaves the others alone.

        Args:
            prompts: token ids, or messages where `api` is `chat`.
            sampling: vLLM's sampling parameters, the same for all.
            timeout_s: seconds after which a row is given up, all its tries together.

        Returns:
            what `raykd.teacher.deployment.TeacherDeployment.answer` does; by `chat` without token ids (T = 0).
        """
        return await asyncio.gather(*(self._answer(prompt, sampling, timeout_s) for prompt in prompts))

    async def _answer(self, prompt: Any, sampling: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        async with self._room:
            try:
                return await self._ask(prompt, sampling, timeout_s)
            except Exception as error:
                return {"error": self._said(error)}

    async def check(self, logprobs: int, prompt_logprobs: int) -> None:
        """Asks for one short answer, in the way in which rows are asked for.

        Args:
            logprobs: the most log-probabilities at a token of an answer; 0 for none.
            prompt_logprobs: the same of given tokens that are scored.

        Raises:
            StageError: where it is not given, whatever the row, with the address and the way out.
        """
        endpoint, wanted = self._endpoint, self._teacher.sampling
        if endpoint.api_key_env and not self._key:
            wrong = "is not set" if self._is_sound else "holds a blank, a line break, or what else no key has,"
            raise self._error(
                f"the environment variable {endpoint.api_key_env} (teacher.endpoint.api_key_env) {wrong} on "
                f"{socket.gethostname()}; set it to the key on every node before Ray is started"
            )
        sampling: dict[str, Any] = {"max_tokens": 1, "temperature": wanted.temperature, "top_p": wanted.top_p}
        if self._teacher.uses_chat_api:
            # Some models think first, and take it for a mistake where there is no room for that.
            prompt, sampling["max_tokens"] = [{"role": "user", "content": "Say yes."}], wanted.max_tokens
        else:
            # Of the first two tokens of any vocabulary the second can be scored.
            prompt = [0, 1]
            sampling |= {"logprobs": logprobs or None, "prompt_logprobs": prompt_logprobs or None}
        try:
            await self._ask(prompt, sampling, self._teacher.timeout_s)
        except Exception as error:
            raise self._error(f"{self._said(error)}{self._way_out(error)}") from None

    async def _ask(self, prompt: Any, sampling: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        await self._pace.wait()
        try:
            async with asyncio.timeout(timeout_s):
                if self._teacher.uses_chat_api:
                    response = await self._chat.create(**_of_messages(prompt, self._teacher, sampling))
                else:
                    response = await self._completions.create(**_of_tokens(prompt, self._teacher, sampling))
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout_s:g} s (teacher.timeout_s)") from None
        try:
            (choice,) = response.http_response.json()["choices"]
            return _text(choice) if self._teacher.uses_chat_api else _tokens(choice, prompt, sampling)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            wanted = "text" if self._teacher.uses_chat_api else "token ids, and log-probabilities by them"
            raise ValueError(f"what was answered holds not what was asked for, {wanted}: {error!r}") from None

    async def _again(self, request: Any) -> None:
        """What is asked again counts as well."""
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            await self._pace.wait()

    def _error(self, text: str) -> StageError:
        return StageError(f"teacher.endpoint {self._endpoint.url}: {text}")

    def _said(self, error: Exception) -> str:
        """What went wrong, in one line without the key."""
        if isinstance(error, APIStatusError):
            status, body = error.status_code, error.message.partition(" - ")[2] or error.body
            text = f"{'failed' if status >= 500 else 'refused'}, status {status}"
            # What is wrong with a key may be said by repeating a part of it.
            text += f": {body}" if body and status not in (401, 403) else ""
        elif isinstance(error, APIConnectionError):
            cause = error.__cause__ or error
            text = f"cannot be reached from {socket.gethostname()}: {type(cause).__name__}"
            # Repeats the header that cannot be sent.
            text += "" if type(cause).__name__ == "LocalProtocolError" else f": {cause}"
        else:
            text = str(error) if type(error) in (ValueError, TimeoutError) else f"{type(error).__name__}: {error}"
        line = " ".join(text.split())
        return (line.replace(self._key, "(the key)") if self._key else line)[:_MESSAGE_PATTERN]

    def _way_out(self, error: Exception) -> str:
        endpoint, status = self._endpoint, error.status_code if isinstance(error, APIStatusError) else 0
        times = f", {endpoint.max_retries + 1} times (teacher.endpoint.max_retries)"
        if status in (401, 403):
            name = endpoint.api_key_env
            return f"; {name} holds no key that it takes" if name else "; name the variable of its key by api_key_env"
        if status == 404:
            name = self._teacher.served_model
            return f"; {endpoint.url}/models lists what it has, which may not be {name!r} (teacher.endpoint.model)"
        if status == 429:
            return f"{times}; lower max_requests_per_minute or max_concurrent_requests"
        if status >= 500 or isinstance(error, APIConnectionError):
            return times
        if self._teacher.uses_chat_api or isinstance(error, TimeoutError):
            return ""
        return (
            "; soft targets need vLLM's server, or one that does as much, started with --max-logprobs of at least "
            "targets.top_k; for hard ones there is teacher.endpoint.api=chat"
        )


class RateLimiter:
    """Lets requests go at even distances."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Waits for the next place, of which each is given once."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + self._gap_s
        await asyncio.sleep(at - now)


def _of_tokens(prompt: list[int], teacher: Teacher, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request of `/completions`, with what vLLM adds to it."""
    known = {name: value for name, value in sampling.items() if name != "prompt_logprobs" and value is not None}
    more = {**PLAIN_SAMPLING, "return_token_ids": True}
    if sampling.get("logprobs"):
        # Several tokens may be the same string.
        more["return_tokens_as_token_ids"] = True
    if scored := sampling.get("prompt_logprobs"):
        more["prompt_logprobs"] = scored
    return {"model": teacher.served_model, "prompt": prompt, **known, "extra_body": more}


def _of_messages(prompt: list[dict[str, str]], teacher: Teacher, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request of `/chat/completions`: what every vendor knows, and no more."""
    body = {name: sampling[name] for name in ("max_tokens", "temperature", "seed") if sampling.get(name) is not None}
    # There are models that take one of temperature and top_p only.
    if sampling["temperature"] and sampling["top_p"] < 1:
        body["top_p"] = sampling["top_p"]
    return {"model": teacher.served_model, "messages": prompt, **body}


def _text(choice: Mapping[str, Any]) -> dict[str, Any]:
    text, finish = choice["message"]["content"], choice["finish_reason"]
    return {"text": _readable(text), "token_ids": np.zeros(0, np.int32), "finish_reason": _readable(finish)}


def _tokens(choice: Mapping[str, Any], prompt: list[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
    tokens = choice["token_ids"]
    reply = {
        "text": _readable(choice["text"]),
        "token_ids": np.asarray([*tokens], dtype=np.int32),
        "finish_reason": _readable(choice["finish_reason"]),
    }
    if top_k := sampling.get("logprobs"):
        given = [
            {int(name.removeprefix("token_id:")): logprob for name, logprob in place.items()}
            for place in choice["logprobs"]["top_logprobs"]
        ]
        reply |= _best(tokens, given, top_k)
    if top_k := sampling.get("prompt_logprobs"):
        # The first token of a prompt follows on nothing.
        given = [
            {int(token): found["logprob"] for token, found in place.items()} for place in choice["prompt_logprobs"][1:]
        ]
        reply |= _best(prompt[1:], given, top_k)
    return reply


def _best(tokens: Sequence[int], given: Sequence[Mapping[int, float]], top_k: int) -> dict[str, Any]:
    """The k best of each position, the best first, by `topk_ids` and `topk_logprobs` (T, K).

    Args:
        tokens: those that are there.
        given: log-probabilities by token: the best, and that of the token that is there where it is not among them.
        top_k: k.
    """
    ids, logprobs = [], []
    for token, place in zip(tokens, given, strict=True):
        found = {each: value for each, value in place.items() if len(place) == top_k or each != token}
        order = sorted(found, key=lambda each: -found[each])
        ids.append(order)
        logprobs.append([found[each] for each in order])
    topk_ids = np.asarray(ids, dtype=np.int32).reshape(len(tokens), top_k)
    topk_logprobs = np.asarray(logprobs, dtype=np.float32).reshape(len(tokens), top_k)
    if not np.isfinite(topk_logprobs).all():
        raise ValueError("a log-probability is not a number")
    return {"topk_ids": topk_ids, "topk_logprobs": topk_logprobs}


def _readable(text: Any) -> str:
    """The text itself.

    Raises:
        ValueError: where it is none, or cannot be written: JSON can hold halves of characters.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text")
    text.encode()
    return text
