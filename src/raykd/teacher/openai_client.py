"""OpenAI teacher client: a server outside the cluster with OpenAI's protocol, called like a replica.

OpenAI's client retries requests with backoff and jitter, or after `Retry-After`. vLLM's server extends the protocol by
the token ids of answers and of log-probabilities, which soft targets need.
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
from raykd.display import summary
from raykd.errors import StageError

CONNECT_TIMEOUT_S = 10
# The key for a server without one. With an empty key the client would send OPENAI_API_KEY, another server's secret.
NO_KEY = "EMPTY"
# vLLM's server takes parameters that a request omits from the model's generation_config.json.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class OpenAITeacherClient:
    """The client of the server at `teacher.endpoint`, within its limits on rate and concurrency."""

    def __init__(self, teacher: Teacher) -> None:
        assert teacher.endpoint is not None
        self._teacher, self._endpoint = teacher, teacher.endpoint
        key = os.environ.get(self._endpoint.api_key_env or "", "").strip()
        # A key that no header can hold is not sent: the library that rejects it repeats it in its message.
        self._is_key_valid = key.isascii() and key.isprintable() and " " not in key
        self._key = key if self._is_key_valid else ""
        self._slots = asyncio.Semaphore(self._endpoint.max_concurrent_requests)
        self._rate_limiter = RateLimiter(self._endpoint.max_requests_per_minute)
        client = AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=self._key or NO_KEY,
            max_retries=self._endpoint.max_retries,
            # Each call has its own limit on the whole answer.
            timeout=Timeout(None, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [self._limit_retry]}),
        )
        self._completions = client.completions.with_raw_response
        self._chat = client.chat.completions.with_raw_response

    async def answer(
        self, prompts: Sequence[Any], sampling: Mapping[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Answer prompts independently: an error of one does not affect the others.

        Args:
            prompts: token ids; messages where `endpoint.api` is `chat`.
            sampling: vLLM's sampling parameters, the same for all prompts.
            timeout_s: seconds for each prompt, retries included.

        Returns:
            as `raykd.teacher.deployment.TeacherDeployment.answer`; a chat API gives no token ids (T = 0).
        """
        return await asyncio.gather(*(self._answer(prompt, sampling, timeout_s) for prompt in prompts))

    async def _answer(self, prompt: Any, sampling: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        async with self._slots:
            try:
                return await self._request(prompt, sampling, timeout_s)
            except Exception as error:
                return {"error": self._message(error)}

    async def check(self, logprobs: int, prompt_logprobs: int) -> None:
        """Send one short request with the parameters that the rows will use.

        Args:
            logprobs: most log-probabilities at a generated token; 0 for none.
            prompt_logprobs: most log-probabilities at a scored token; 0 for none.

        Raises:
            StageError: the request fails, so all rows would; the message names the address and the remedy.
        """
        endpoint, section_sampling = self._endpoint, self._teacher.sampling
        if endpoint.api_key_env and not self._key:
            problem = "is not set"
            if not self._is_key_valid:
                problem = "is no key, since it holds a blank, a line break or a character that no key has,"
            raise self._error(
                f"the environment variable {endpoint.api_key_env} (teacher.endpoint.api_key_env) {problem} on "
                f"{socket.gethostname()}; set it to the key on every node before Ray is started"
            )
        sampling: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": section_sampling.temperature,
            "top_p": section_sampling.top_p,
        }
        if self._teacher.uses_chat_api:
            # Reasoning models refuse a limit that leaves no room for their reasoning.
            prompt, sampling["max_tokens"] = [{"role": "user", "content": "Say yes."}], section_sampling.max_tokens
        else:
            # Token ids 0 and 1 exist in every vocabulary, and the second of a prompt can be scored.
            prompt = [0, 1]
            sampling |= {"logprobs": logprobs or None, "prompt_logprobs": prompt_logprobs or None}
        try:
            await self._request(prompt, sampling, self._teacher.timeout_s)
        except Exception as error:
            raise self._error(f"{self._message(error)}{self._remedy(error)}") from None

    async def _request(self, prompt: Any, sampling: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        await self._rate_limiter.wait()
        try:
            async with asyncio.timeout(timeout_s):
                if self._teacher.uses_chat_api:
                    response = await self._chat.create(**_chat_body(prompt, self._teacher, sampling))
                else:
                    response = await self._completions.create(**_completions_body(prompt, self._teacher, sampling))
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout_s:g} s (teacher.timeout_s)") from None
        try:
            (choice,) = response.http_response.json()["choices"]
            if self._teacher.uses_chat_api:
                return _chat_reply(choice)
            return _completions_reply(choice, prompt, sampling)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            expected = "text" if self._teacher.uses_chat_api else "token ids with log-probabilities"
            raise ValueError(f"unexpected response, expected {expected}: {error!r}") from None

    async def _limit_retry(self, request: Any) -> None:
        """Apply the rate limit to a retry of OpenAI's client, too."""
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            await self._rate_limiter.wait()

    def _error(self, text: str) -> StageError:
        return StageError(f"teacher.endpoint {self._endpoint.url}: {text}")

    def _message(self, error: Exception) -> str:
        """Return an error's message in one line without the key."""
        if isinstance(error, APIStatusError):
            status, body = error.status_code, error.message.partition(" - ")[2] or error.body
            text = f"{'failed' if status >= 500 else 'refused'}, status {status}"
            # Servers repeat parts of a wrong key.
            text += f": {body}" if body and status not in (401, 403) else ""
        elif isinstance(error, APIConnectionError):
            cause = error.__cause__ or error
            text = f"cannot be reached from {socket.gethostname()}: {type(cause).__name__}"
            # This error repeats the header that cannot be sent.
            text += "" if type(cause).__name__ == "LocalProtocolError" else f": {cause}"
        else:
            text = str(error) if type(error) in (ValueError, TimeoutError) else f"{type(error).__name__}: {error}"
        return summary(text.replace(self._key, "(the key)") if self._key else text)

    def _remedy(self, error: Exception) -> str:
        """Return what to do about an error, to be appended to its message; empty where there is no advice."""
        endpoint, status = self._endpoint, error.status_code if isinstance(error, APIStatusError) else 0
        attempts = f", {endpoint.max_retries + 1} times (teacher.endpoint.max_retries)"
        if status in (401, 403):
            name = endpoint.api_key_env
            if name:
                return f"; set {name} to a key that the server accepts"
            return "; set teacher.endpoint.api_key_env to the variable with the server's key"
        if status == 404:
            name = self._teacher.served_model
            return f"; set teacher.endpoint.model, now {name!r}, to a model that {endpoint.url}/models lists"
        if status == 429:
            return f"{attempts}; lower max_requests_per_minute or max_concurrent_requests"
        if status >= 500 or isinstance(error, APIConnectionError):
            return attempts
        if self._teacher.uses_chat_api or isinstance(error, TimeoutError):
            return ""
        return (
            "; for soft targets, use vLLM's server or a compatible one, started with --max-logprobs of at least "
            "targets.top_k; for hard targets, set teacher.endpoint.api=chat"
        )


class RateLimiter:
    """Spaces requests evenly.

    Args:
        per_minute: requests per minute; None for no limit.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._next_s = 0.0

    async def wait(self) -> None:
        """Wait until the next request may be sent. Each waiter gets a time of its own."""
        now = time.monotonic()
        send_at = max(now, self._next_s)
        self._next_s = send_at + self._interval_s
        await asyncio.sleep(send_at - now)


def _completions_body(prompt: list[int], teacher: Teacher, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request of `/completions`, with vLLM's extensions in `extra_body`."""
    standard = {name: value for name, value in sampling.items() if name != "prompt_logprobs" and value is not None}
    extra_body: dict[str, Any] = {**PLAIN_SAMPLING, "return_token_ids": True}
    if sampling.get("logprobs"):
        # Several tokens may have the same string.
        extra_body["return_tokens_as_token_ids"] = True
    if prompt_logprobs := sampling.get("prompt_logprobs"):
        extra_body["prompt_logprobs"] = prompt_logprobs
    return {"model": teacher.served_model, "prompt": prompt, **standard, "extra_body": extra_body}


def _chat_body(prompt: list[dict[str, str]], teacher: Teacher, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request of `/chat/completions`, with parameters that every vendor accepts."""
    body = {name: sampling[name] for name in ("max_tokens", "temperature", "seed") if sampling.get(name) is not None}
    # Some models accept only one of temperature and top_p.
    if sampling["temperature"] and sampling["top_p"] < 1:
        body["top_p"] = sampling["top_p"]
    return {"model": teacher.served_model, "messages": prompt, **body}


def _chat_reply(choice: Mapping[str, Any]) -> dict[str, Any]:
    text, finish_reason = choice["message"]["content"], choice["finish_reason"]
    return {"text": _readable(text), "token_ids": np.zeros(0, np.int32), "finish_reason": _readable(finish_reason)}


def _completions_reply(choice: Mapping[str, Any], prompt: list[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
    tokens = choice["token_ids"]
    reply = {
        "text": _readable(choice["text"]),
        "token_ids": np.asarray([*tokens], dtype=np.int32),
        "finish_reason": _readable(choice["finish_reason"]),
    }
    if top_k := sampling.get("logprobs"):
        logprobs = [
            {int(name.removeprefix("token_id:")): logprob for name, logprob in position.items()}
            for position in choice["logprobs"]["top_logprobs"]
        ]
        reply |= _top_k_arrays(tokens, logprobs, top_k)
    if top_k := sampling.get("prompt_logprobs"):
        # The first token of a prompt has no log-probability.
        logprobs = [
            {int(token): entry["logprob"] for token, entry in position.items()}
            for position in choice["prompt_logprobs"][1:]
        ]
        reply |= _top_k_arrays(prompt[1:], logprobs, top_k)
    return reply


def _top_k_arrays(tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]], top_k: int) -> dict[str, Any]:
    """Return the k best tokens of each position, best first, as `topk_ids` and `topk_logprobs` (T, K).

    Args:
        tokens: the T tokens of the text.
        logprobs: for each of them, log-probabilities by token id: the k best, and the token's own in addition where
            it is not among them.
        top_k: k.
    """
    ids, values = [], []
    for token, position in zip(tokens, logprobs, strict=True):
        best = {other: logprob for other, logprob in position.items() if len(position) == top_k or other != token}
        order = sorted(best, key=lambda other: -best[other])
        ids.append(order)
        values.append([best[other] for other in order])
    topk_ids = np.asarray(ids, dtype=np.int32).reshape(len(tokens), top_k)
    topk_logprobs = np.asarray(values, dtype=np.float32).reshape(len(tokens), top_k)
    if not np.isfinite(topk_logprobs).all():
        raise ValueError("a log-probability is not finite")
    return {"topk_ids": topk_ids, "topk_logprobs": topk_logprobs}


def _readable(text: Any) -> str:
    """Return the text.

    Raises:
        ValueError: not a string, or not valid Unicode: JSON may hold halves of surrogate pairs.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a string")
    text.encode()
    return text
