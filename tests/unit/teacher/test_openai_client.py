"""OpenAI teacher client: requests, replies, retries and limits, errors and secrets."""

import asyncio
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fake_openai_server import KEY, KEY_ENV, Answer, ReceivedRequest, complete_answer, message, serving, tokens
from raykd.config.engine import Endpoint
from raykd.config.sections import Teacher
from raykd.errors import StageError
from raykd.teacher.openai_client import OpenAITeacherClient

GREEDY = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": None, "logprobs": None}
DRAWN = {"max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 3, "logprobs": 2}
PROMPTS = [[5, 6, 7], [8, 9]]
HELLO = [[{"role": "user", "content": "Hello"}]]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the server's key, and the key of another server, which must not be sent."""
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-server")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def request_answers(
    teacher: Teacher, prompts: list[Any], sampling: dict[str, Any], timeout_s: float = 20
) -> list[dict[str, Any]]:
    async def answer() -> list[dict[str, Any]]:
        return await OpenAITeacherClient(teacher).answer(prompts, sampling, timeout_s)

    return asyncio.run(answer())


def check(teacher: Teacher, logprobs: int = 0, prompt_logprobs: int = 0) -> str:
    """Return the error of the check; empty where it passes."""

    async def checked() -> None:
        await OpenAITeacherClient(teacher).check(logprobs, prompt_logprobs)

    try:
        asyncio.run(checked())
    except StageError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 4}])
def test_vllm_server_samples_like_the_engine(sampling: dict[str, Any]):
    """Servers take unset sampling parameters from the model's generation_config.json."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    with serving(complete_answer) as server:
        request_answers(server.teacher(), PROMPTS[:1], sampling)
    body = server.requests[0].body
    request = CompletionRequest.model_validate(body)
    assert not request.model_extra, "the request has unknown fields"
    assert (request.prompt, request.model) == (PROMPTS[0], "raykd/demo-teacher")
    assert request.return_token_ids and bool(request.return_tokens_as_token_ids) == bool(sampling.get("logprobs"))
    model_defaults = {"repetition_penalty": 1.5, "top_k": 1, "top_p": 0.5, "min_p": 0.2, "temperature": 3.0}
    found = request.to_sampling_params(sampling["max_tokens"], model_defaults)
    expected = SamplingParams(**{"top_p": 1.0, **sampling})
    names = ("temperature", "seed", "logprobs", "prompt_logprobs", "max_tokens", "top_k", "min_p", "repetition_penalty")
    assert {name: getattr(found, name) for name in names} == {name: getattr(expected, name) for name in names}
    if "top_p" in sampling:
        assert found.top_p == expected.top_p


def test_top_k_is_sorted_without_other_tokens():
    places = [
        # The sampled token comes first, whether or not it is among the best.
        {"token_id:7": -1.5, "token_id:3": -0.5},
        {"token_id:9": -6.0, "token_id:4": -0.25, "token_id:2": -2.0},
        {"token_id:1": -0.125, "token_id:8": -9999.0},
    ]
    with serving(lambda *_: tokens(7, 9, 1, finish="length", logprobs={"top_logprobs": places})) as server:
        (reply,) = request_answers(server.teacher(), PROMPTS[:1], DRAWN)
    assert (reply["text"], reply["finish_reason"]) == ("It is 4.", "length")
    assert reply["token_ids"].dtype == reply["topk_ids"].dtype == np.int32
    assert reply["token_ids"].tolist() == [7, 9, 1]
    assert reply["topk_ids"].tolist() == [[3, 7], [4, 2], [1, 8]]
    assert reply["topk_logprobs"].dtype == np.float32
    assert reply["topk_logprobs"].tolist() == [[-0.5, -1.5], [-0.25, -2.0], [-0.125, -9999.0]]


def test_prompt_tokens_are_scored_except_the_first():
    def entry(**logprobs: float) -> dict[str, Any]:
        return {name[1:]: {"logprob": value, "rank": 1, "decoded_token": "x"} for name, value in logprobs.items()}

    scored = [None, entry(_6=-3.0, _1=-0.5, _2=-1.0), entry(_7=-0.25, _3=-2.0)]
    with serving(lambda *_: tokens(0, prompt_logprobs=scored)) as server:
        (reply,) = request_answers(
            server.teacher(), [[5, 6, 7]], {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2}
        )
    assert reply["topk_ids"].tolist() == [[1, 2], [7, 3]]
    assert reply["topk_logprobs"].tolist() == [[-0.5, -1.0], [-0.25, -2.0]]


def test_chat_request_has_common_parameters_only():
    with serving(lambda *_: message("It is 4.")) as server:
        teacher = server.teacher(api="chat", model="large-1", api_key_env=KEY_ENV)
        (reply,) = request_answers(teacher, HELLO, GREEDY)
        request_answers(teacher, HELLO, DRAWN)
        assert check(teacher) == ""
    assert (reply["text"], reply["token_ids"].tolist(), reply["finish_reason"]) == ("It is 4.", [], "stop")
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    greedy = {"model": "large-1", "messages": HELLO[0], "max_tokens": 8, "temperature": 0.0}
    assert [request.body for request in server.requests[:2]] == [
        greedy,
        {**greedy, "temperature": 0.7, "top_p": 0.9, "seed": 3},
    ]
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_client_sends_no_key_by_default():
    with serving(complete_answer) as server:
        request_answers(server.teacher(), PROMPTS, GREEDY)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer EMPTY"}


def test_retry_after_is_respected():
    def respond(request: ReceivedRequest, number: int) -> Answer:
        return (
            (429, {"Retry-After": "1.5"}, {"error": {"message": "slow down"}})
            if not number
            else complete_answer(request)
        )

    with serving(respond) as server:
        (reply,) = request_answers(server.teacher(), PROMPTS[:1], GREEDY)
    assert reply["text"] == "18\n#### 4"
    first, second = server.requests
    # Without Retry-After, the client waits half a second.
    assert second.at_s - first.at_s >= 1.4


def test_failed_prompt_does_not_affect_others():
    def respond(request: ReceivedRequest, number: int) -> Answer:
        return (500, {}, b"no answer") if request.body["prompt"] == PROMPTS[0] else complete_answer(request)

    with serving(respond) as server:
        broken, whole = request_answers(server.teacher(max_retries=2), PROMPTS, GREEDY)
        assert whole["text"] == "17\n#### 4"
        assert set(broken) == {"error"} and "failed, status 500" in broken["error"] and "no answer" in broken["error"]
        assert len(server.requests) == 3 + 1, "three attempts, and the other prompt"
        assert check(server.teacher()) == "", "the check fails"


@pytest.mark.parametrize(
    ("answer", "endpoint", "requests", "words"),
    [
        ((500, {}, {"error": {"message": "out of memory"}}), {}, 2, ["failed, status 500", "out of memory", "2 times"]),
        ((429, {}, {"error": {"message": "slow"}}), {}, 2, ["refused, status 429", "max_requests_per_minute"]),
        (
            (401, {}, {"error": f"{KEY} is wrong"}),
            {"api_key_env": KEY_ENV},
            1,
            ["status 401", f"set {KEY_ENV} to a key"],
        ),
        ((401, {}, {"error": "Unauthorized"}), {}, 1, ["status 401", "api_key_env"]),
        ((403, {}, b""), {"api_key_env": KEY_ENV}, 1, ["status 403", KEY_ENV]),
        (
            (404, {}, {"error": {"message": "The model `a` does not exist."}}),
            {"model": "a"},
            1,
            ["status 404", "does not exist", "/v1/models", "teacher.endpoint.model, now 'a'"],
        ),
        (
            (400, {}, {"error": {"message": f"with {KEY}: at most 20\nlogprobs"}}),
            {"api_key_env": KEY_ENV},
            1,
            ["status 400", "with (the key): at most 20", "--max-logprobs"],
        ),
        (tokens(0, 1), {}, 1, ["token ids with log-probabilities", "vLLM's server", "api=chat"]),
    ],
    ids=["500", "429", "401", "401-without", "403", "404", "400", "no-logprobs"],
)
def test_check_reports_failures_in_one_line(answer: Answer, endpoint: dict[str, Any], requests: int, words: list[str]):
    with serving(lambda *_: answer) as server:
        error = check(server.teacher(**endpoint), logprobs=2)
        assert len(server.requests) == requests
        for word in ["teacher.endpoint http://127.0.0.1", *words]:
            assert word in error
        (reply,) = request_answers(server.teacher(**endpoint), PROMPTS[:1], DRAWN)
    assert set(reply) == {"error"}
    assert KEY not in error + reply["error"]


def test_unset_key_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_ENV)
    with serving(complete_answer) as server:
        error = check(server.teacher(api_key_env=KEY_ENV))
        assert not server.requests
    assert KEY_ENV in error and socket.gethostname() in error and "every node" in error


@pytest.mark.parametrize(
    "key", ["sk-planted-one\nsk-planted-two", "sk-planted one", "sk-planted\x7f", "sk-planted\u2026"]
)
def test_malformed_key_is_not_sent(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_ENV, key)
    with serving(complete_answer) as server:
        teacher = server.teacher(api_key_env=KEY_ENV)
        error = check(teacher)
        assert not server.requests
        (reply,) = request_answers(teacher, PROMPTS[:1], GREEDY)
    for word in (KEY_ENV, "no key has", socket.gethostname(), "every node"):
        assert word in error
    assert "planted" not in error + str(reply) + str([request.headers for request in server.requests])


def test_whitespace_around_a_key_is_stripped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_ENV, f" {KEY}\n")
    with serving(complete_answer) as server:
        assert check(server.teacher(api_key_env=KEY_ENV)) == ""
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_invalid_header_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    # The OpenAI client sends this variable as a header.
    monkeypatch.setenv("OPENAI_ORG_ID", "org-planted\nanother")
    with serving(complete_answer) as server:
        error = check(server.teacher())
        assert not server.requests
    assert "LocalProtocolError" in error and "planted" not in error


def test_unreachable_server_is_reported():
    with serving(complete_answer) as server:
        pass
    error = check(server.teacher())
    for word in ("cannot be reached", socket.gethostname(), "2 times (teacher.endpoint.max_retries)"):
        assert word in error


def test_hanging_request_times_out():
    over = threading.Event()

    def respond(request: ReceivedRequest, number: int) -> Answer:
        if request.body["prompt"] == PROMPTS[0]:
            over.wait(30)
        return complete_answer(request)

    with serving(respond) as server:
        hung, whole = request_answers(server.teacher(), PROMPTS, GREEDY, timeout_s=1)
        over.set()
    assert hung == {"error": "no answer within 1 s (teacher.timeout_s)"}
    assert whole["text"] == "17\n#### 4"


BEST = {"token_id:1": -0.5, "token_id:2": -1.0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad gateway</html>",
        [],
        {},
        {"choices": []},
        {"choices": [{"text": "a"}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": None}]},
        {"choices": [{"text": None, "finish_reason": "stop", "token_ids": [1]}]},
        {"choices": [{"text": "a", "finish_reason": None, "token_ids": [1]}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": ["b"]}]},
        b'{"choices": [{"text": "\\ud800", "finish_reason": "stop", "token_ids": [1]}]}',
        # Log-probabilities that are missing for a token, too few, keyed by strings, or not numbers.
        tokens(1, 2, logprobs={"top_logprobs": [BEST]})[2],
        tokens(1, logprobs={"top_logprobs": [{"token_id:1": -0.5}]})[2],
        tokens(1, logprobs={"top_logprobs": [{" It": -0.5, " is": -1.0}]})[2],
        tokens(1, logprobs={"top_logprobs": [{"token_id:1": float("nan"), "token_id:2": -1.0}]})[2],
        tokens(1, logprobs={"top_logprobs": [None]})[2],
        tokens(1, logprobs=None)[2],
    ],
)
def test_malformed_response_is_an_error_of_its_row(body: Any):
    with serving(lambda *_: (200, {}, body)) as server:
        (reply,) = request_answers(server.teacher(), PROMPTS[:1], DRAWN)
    assert set(reply) == {"error"}
    assert "unexpected response, expected token ids" in reply["error"] and "\n" not in reply["error"]


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_message_without_text_is_an_error_of_its_row(text: Any):
    with serving(lambda *_: message(text)) as server:
        (reply,) = request_answers(server.teacher(api="chat"), HELLO, GREEDY)
    assert "expected text" in reply["error"]


def test_rate_limit_includes_retries():
    def respond(request: ReceivedRequest, number: int) -> Answer:
        return (503, {"Retry-After": "0.01"}, b"") if number in (1, 2) else complete_answer(request)

    started_s = time.monotonic()
    with serving(respond) as server:
        replies = request_answers(server.teacher(max_requests_per_minute=300), [[n] for n in range(6)], GREEDY)
    assert not any("error" in reply for reply in replies)
    times = sorted(request.at_s for request in server.requests)
    assert len(times) == 6 + 2
    # 300 a minute are one every 0.2 s. Compared with the start, because the first request may be recorded late.
    assert times[-1] - started_s >= 7 * 0.2


def test_concurrent_requests_are_limited():
    gate = threading.Barrier(3, timeout=5)

    def respond(request: ReceivedRequest, number: int) -> Answer:
        # Each group of three concurrent requests passes the barrier.
        gate.wait()
        return complete_answer(request)

    with serving(respond) as server:
        replies = request_answers(server.teacher(max_concurrent_requests=3), [[n] for n in range(9)], GREEDY)
    assert not any("error" in reply for reply in replies)
    assert server.max_concurrent == 3


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *itertools.product(
            ["url"], ["", "host:8000", "ftp://host/v1", "http://", "http://[", "http://h:99999"], ["addr"]
        ),
        ("url", "https://me:sesame@host/v1", "api_key_env"),
        ("url", "https://sesame@host/v1", "api_key_env"),
        ("url", "https://host/v1?key=sesame", "api_key_env"),
        ("url", "https://host/v1#sesame", "api_key_env"),
        ("api_key_env", "sk-sesame", "not the key itself"),
        ("api_key_env", "gsk_sesame", "not the key itself"),
        ("api", "responses", "'completions' or 'chat'"),
        ("max_requests_per_minute", 0, "greater than 0"),
        ("max_concurrent_requests", 0, "greater than or equal to 1"),
        ("max_retries", -1, "greater than or equal to 0"),
    ],
)
def test_invalid_endpoint_is_refused_without_its_secret(field: str, value: Any, words: str):
    with pytest.raises(ValidationError) as caught:
        Endpoint.model_validate({"url": "http://host/v1", field: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (field,) and words in error["msg"]
    assert "sesame" not in error["msg"]


def test_trailing_slash_is_ignored():
    assert Endpoint(url="http://host:8000/v1/").url == "http://host:8000/v1"
    assert os.environ["OPENAI_API_KEY"]


def test_check_requests_the_log_probabilities_of_rows():
    with serving(complete_answer) as server:
        assert check(server.teacher(), logprobs=3, prompt_logprobs=5) == ""
    (request,) = server.requests
    wanted: Callable[[str], Any] = request.body.get
    assert (wanted("logprobs"), wanted("prompt_logprobs"), wanted("max_tokens"), wanted("return_token_ids")) == (
        3,
        5,
        1,
        True,
    )
