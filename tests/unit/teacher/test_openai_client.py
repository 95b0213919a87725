"""Endpoint: what a server elsewhere is sent, and what is made of its answers, and of what is none."""

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fake_openai_server import KEY, KEY_ENV, Answer, Asked, as_wanted, message, serving, tokens
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
    """What the environment holds: the key, and one of somebody else's, which goes nowhere."""
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(teacher: Teacher, prompts: list[Any], sampling: dict[str, Any], timeout_s: float = 20) -> list[dict[str, Any]]:
    async def asked() -> list[dict[str, Any]]:
        return await OpenAITeacherClient(teacher).answer(prompts, sampling, timeout_s)

    return asyncio.run(asked())


def check(teacher: Teacher, logprobs: int = 0, prompt_logprobs: int = 0) -> str:
    """What is wrong; empty where nothing is."""

    async def checked() -> None:
        await OpenAITeacherClient(teacher).check(logprobs, prompt_logprobs)

    try:
        asyncio.run(checked())
    except StageError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 4}])
def test_vllms_server_samples_by_what_it_is_sent_as_an_engine_would(sampling: dict[str, Any]):
    """Whatever the model's generation_config.json, from which the server takes what is not named."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    with serving(as_wanted) as elsewhere:
        ask(elsewhere.teacher(), PROMPTS[:1], sampling)
    body = elsewhere.asked[0].body
    request = CompletionRequest.model_validate(body)
    assert not request.model_extra, "no field that the server does not know"
    assert (request.prompt, request.model) == (PROMPTS[0], "raykd/demo-teacher")
    assert request.return_token_ids and bool(request.return_tokens_as_token_ids) == bool(sampling.get("logprobs"))
    of_the_model = {"repetition_penalty": 1.5, "top_k": 1, "top_p": 0.5, "min_p": 0.2, "temperature": 3.0}
    found = request.to_sampling_params(sampling["max_tokens"], of_the_model)
    expected = SamplingParams(**{"top_p": 1.0, **sampling})
    names = ("temperature", "seed", "logprobs", "prompt_logprobs", "max_tokens", "top_k", "min_p", "repetition_penalty")
    assert {name: getattr(found, name) for name in names} == {name: getattr(expected, name) for name in names}
    if "top_p" in sampling:
        assert found.top_p == expected.top_p


def test_the_best_of_each_position_come_best_first_without_the_token_that_is_not_among_them():
    places = [
        # The token that was drawn stands first, be it among the best or not.
        {"token_id:7": -1.5, "token_id:3": -0.5},
        {"token_id:9": -6.0, "token_id:4": -0.25, "token_id:2": -2.0},
        {"token_id:1": -0.125, "token_id:8": -9999.0},
    ]
    with serving(lambda *_: tokens(7, 9, 1, finish="length", logprobs={"top_logprobs": places})) as elsewhere:
        (reply,) = ask(elsewhere.teacher(), PROMPTS[:1], DRAWN)
    assert (reply["text"], reply["finish_reason"]) == ("It is 4.", "length")
    assert reply["token_ids"].dtype == reply["topk_ids"].dtype == np.int32
    assert reply["token_ids"].tolist() == [7, 9, 1]
    assert reply["topk_ids"].tolist() == [[3, 7], [4, 2], [1, 8]]
    assert reply["topk_logprobs"].dtype == np.float32
    assert reply["topk_logprobs"].tolist() == [[-0.5, -1.5], [-0.25, -2.0], [-0.125, -9999.0]]


def test_given_tokens_are_scored_but_for_the_first():
    def entry(**logprobs: float) -> dict[str, Any]:
        return {name[1:]: {"logprob": value, "rank": 1, "decoded_token": "x"} for name, value in logprobs.items()}

    scored = [None, entry(_6=-3.0, _1=-0.5, _2=-1.0), entry(_7=-0.25, _3=-2.0)]
    with serving(lambda *_: tokens(0, prompt_logprobs=scored)) as elsewhere:
        (reply,) = ask(elsewhere.teacher(), [[5, 6, 7]], {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 2})
    assert reply["topk_ids"].tolist() == [[1, 2], [7, 3]]
    assert reply["topk_logprobs"].tolist() == [[-0.5, -1.0], [-0.25, -2.0]]


def test_a_vendor_is_sent_messages_and_what_every_vendor_knows():
    with serving(lambda *_: message("It is 4.")) as elsewhere:
        teacher = elsewhere.teacher(api="chat", model="large-1", api_key_env=KEY_ENV)
        (reply,) = ask(teacher, HELLO, GREEDY)
        ask(teacher, HELLO, DRAWN)
        assert check(teacher) == ""
    assert (reply["text"], reply["token_ids"].tolist(), reply["finish_reason"]) == ("It is 4.", [], "stop")
    assert {asked.path for asked in elsewhere.asked} == {"/v1/chat/completions"}
    greedy = {"model": "large-1", "messages": HELLO[0], "max_tokens": 8, "temperature": 0.0}
    assert [asked.body for asked in elsewhere.asked[:2]] == [
        greedy,
        {**greedy, "temperature": 0.7, "top_p": 0.9, "seed": 3},
    ]
    assert {asked.headers["authorization"] for asked in elsewhere.asked} == {f"Bearer {KEY}"}


def test_without_a_key_of_its_own_a_server_is_sent_none():
    with serving(as_wanted) as elsewhere:
        ask(elsewhere.teacher(), PROMPTS, GREEDY)
    assert {asked.headers["authorization"] for asked in elsewhere.asked} == {"Bearer EMPTY"}


def test_too_many_requests_are_made_again_when_the_server_says():
    def says(asked: Asked, number: int) -> Answer:
        return (429, {"Retry-After": "1.5"}, {"error": {"message": "slow down"}}) if not number else as_wanted(asked)

    with serving(says) as elsewhere:
        (reply,) = ask(elsewhere.teacher(), PROMPTS[:1], GREEDY)
    assert reply["text"] == "18\n#### 4"
    first, second = elsewhere.asked
    # By its own the client would have waited for half a second.
    assert second.at_s - first.at_s >= 1.4


def test_what_befalls_one_leaves_the_others_alone():
    def says(asked: Asked, number: int) -> Answer:
        return (500, {}, b"oh no") if asked.body["prompt"] == PROMPTS[0] else as_wanted(asked)

    with serving(says) as elsewhere:
        broken, whole = ask(elsewhere.teacher(max_retries=2), PROMPTS, GREEDY)
        assert whole["text"] == "17\n#### 4"
        assert set(broken) == {"error"} and "failed, status 500" in broken["error"] and "oh no" in broken["error"]
        assert len(elsewhere.asked) == 3 + 1, "tried, and twice again"
        assert check(elsewhere.teacher()) == "", "it is up to the row"


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
def test_what_no_row_is_spared_ends_it_in_one_line(
    answer: Answer, endpoint: dict[str, Any], requests: int, words: list[str]
):
    with serving(lambda *_: answer) as elsewhere:
        said = check(elsewhere.teacher(**endpoint), logprobs=2)
        assert len(elsewhere.asked) == requests
        for word in ["teacher.endpoint http://127.0.0.1", *words]:
            assert word in said
        (reply,) = ask(elsewhere.teacher(**endpoint), PROMPTS[:1], DRAWN)
    assert set(reply) == {"error"}
    assert KEY not in said + reply["error"]


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_ENV)
    with serving(as_wanted) as elsewhere:
        said = check(elsewhere.teacher(api_key_env=KEY_ENV))
        assert not elsewhere.asked
    assert KEY_ENV in said and socket.gethostname() in said and "every node" in said


@pytest.mark.parametrize(
    "key", ["sk-planted-one\nsk-planted-two", "sk-planted one", "sk-planted\x7f", "sk-planted\u2026"]
)
def test_what_is_no_key_is_sent_nowhere_and_told_by_its_variable(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_ENV, key)
    with serving(as_wanted) as elsewhere:
        teacher = elsewhere.teacher(api_key_env=KEY_ENV)
        said = check(teacher)
        assert not elsewhere.asked
        (reply,) = ask(teacher, PROMPTS[:1], GREEDY)
    for word in (KEY_ENV, "no key has", socket.gethostname(), "every node"):
        assert word in said
    assert "planted" not in said + str(reply) + str([asked.headers for asked in elsewhere.asked])


def test_what_stands_around_a_key_is_none_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_ENV, f" {KEY}\n")
    with serving(as_wanted) as elsewhere:
        assert check(elsewhere.teacher(api_key_env=KEY_ENV)) == ""
    assert {asked.headers["authorization"] for asked in elsewhere.asked} == {f"Bearer {KEY}"}


def test_a_header_that_cannot_be_sent_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    # The client sends this one, too.
    monkeypatch.setenv("OPENAI_ORG_ID", "org-planted\nanother")
    with serving(as_wanted) as elsewhere:
        said = check(elsewhere.teacher())
        assert not elsewhere.asked
    assert "LocalProtocolError" in said and "planted" not in said


def test_nobody_there_is_told_as_that():
    with serving(as_wanted) as elsewhere:
        pass
    said = check(elsewhere.teacher())
    for word in ("cannot be reached", socket.gethostname(), "2 times (teacher.endpoint.max_retries)"):
        assert word in said


def test_a_server_that_hangs_is_given_up():
    over = threading.Event()

    def says(asked: Asked, number: int) -> Answer:
        if asked.body["prompt"] == PROMPTS[0]:
            over.wait(30)
        return as_wanted(asked)

    with serving(says) as elsewhere:
        hung, whole = ask(elsewhere.teacher(), PROMPTS, GREEDY, timeout_s=1)
        over.set()
    assert hung == {"error": "no answer within 1 s (teacher.timeout_s)"}
    assert whole["text"] == "17\n#### 4"


BEST = {"token_id:1": -0.5, "token_id:2": -1.0}


@pytest.mark.parametrize(
    "said",
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
        # Without a log-probability for each token, without enough of them, by strings, and none that is a number.
        tokens(1, 2, logprobs={"top_logprobs": [BEST]})[2],
        tokens(1, logprobs={"top_logprobs": [{"token_id:1": -0.5}]})[2],
        tokens(1, logprobs={"top_logprobs": [{" It": -0.5, " is": -1.0}]})[2],
        tokens(1, logprobs={"top_logprobs": [{"token_id:1": float("nan"), "token_id:2": -1.0}]})[2],
        tokens(1, logprobs={"top_logprobs": [None]})[2],
        tokens(1, logprobs=None)[2],
    ],
)
def test_what_is_no_answer_is_an_error_of_its_row(said: Any):
    with serving(lambda *_: (200, {}, said)) as elsewhere:
        (reply,) = ask(elsewhere.teacher(), PROMPTS[:1], DRAWN)
    assert set(reply) == {"error"}
    assert "unexpected response, expected token ids" in reply["error"] and "\n" not in reply["error"]


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_a_message_without_text_is_an_error_of_its_row(text: Any):
    with serving(lambda *_: message(text)) as elsewhere:
        (reply,) = ask(elsewhere.teacher(api="chat"), HELLO, GREEDY)
    assert "expected text" in reply["error"]


def test_requests_go_at_even_distances_those_that_are_made_again_too():
    def says(asked: Asked, number: int) -> Answer:
        return (503, {"Retry-After": "0.01"}, b"") if number in (1, 2) else as_wanted(asked)

    with serving(says) as elsewhere:
        replies = ask(elsewhere.teacher(max_requests_per_minute=300), [[n] for n in range(6)], GREEDY)
    assert not any("error" in reply for reply in replies)
    times = sorted(asked.at_s for asked in elsewhere.asked)
    assert len(times) == 6 + 2
    # 300 a minute are one every 0.2 s; a thread may see one late, and the next not.
    assert times[-1] - times[0] >= 7 * 0.2 - 0.1


def test_no_more_are_under_way_than_may_be():
    gate = threading.Barrier(3, timeout=5)

    def says(asked: Asked, number: int) -> Answer:
        # Three at a time can pass, and do.
        gate.wait()
        return as_wanted(asked)

    with serving(says) as elsewhere:
        replies = ask(elsewhere.teacher(max_concurrent_requests=3), [[n] for n in range(9)], GREEDY)
    assert not any("error" in reply for reply in replies)
    assert elsewhere.most_at_once == 3


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
def test_what_cannot_be_asked_is_refused_and_no_secret_repeated(field: str, value: Any, words: str):
    with pytest.raises(ValidationError) as caught:
        Endpoint.model_validate({"url": "http://host/v1", field: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (field,) and words in error["msg"]
    assert "sesame" not in error["msg"]


def test_a_slash_at_the_end_makes_no_difference():
    assert Endpoint(url="http://host:8000/v1/").url == "http://host:8000/v1"
    assert os.environ["OPENAI_API_KEY"]


def test_each_call_of_the_check_asks_for_what_rows_will_ask_for():
    with serving(as_wanted) as elsewhere:
        assert check(elsewhere.teacher(), logprobs=3, prompt_logprobs=5) == ""
    (asked,) = elsewhere.asked
    wanted: Callable[[str], Any] = asked.body.get
    assert (wanted("logprobs"), wanted("prompt_logprobs"), wanted("max_tokens"), wanted("return_token_ids")) == (
        3,
        5,
        1,
        True,
    )
