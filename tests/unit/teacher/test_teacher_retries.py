"""Asking a teacher that is not there yet: how long a call waits, and for what."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

from raykd.config.sections import Teacher
from raykd.teacher import client, server

HERE, GONE = True, False


def asked(
    monkeypatch: pytest.MonkeyPatch, replicas: dict[str, int], seen: list[bool], answers_after_s: float, **told: Any
) -> tuple[Any, int]:
    """What comes of a call, and how often it was looked whether there is a replica: each time the next of `seen`.

    Seconds are hundredths.
    """
    looks = iter(seen)
    monkeypatch.setattr(client, "REPLICA_GRACE_S", 0)
    monkeypatch.setattr(server.serve, "get_app_handle", lambda app: _Handle())
    monkeypatch.setattr(server, "has_replica", lambda app: next(looks))
    section = Teacher.model_validate({"model": "raykd/demo-teacher", "replicas": replicas})
    section = section.model_copy(update={"timeout_s": 0.1, "start_timeout_s": 0.35} | told)
    asking = client.TeacherClient("app", "experiment", section, [], in_flight=2)

    async def answer() -> str:
        await asyncio.sleep(answers_after_s / 100)
        return "answered"

    async def run() -> Any:
        try:
            return await asking._patiently(answer())
        except TimeoutError:
            return "given up"

    found = asyncio.run(run())
    return found, len(seen) - len(list(looks))


class _Handle:
    class answer:
        remote: Callable[..., Awaitable[Any]]

        @staticmethod
        async def remote(*_: Any) -> None:
            return None


def test_an_answer_may_take_as_long_as_is_told_and_no_longer(monkeypatch: pytest.MonkeyPatch):
    one = {"min": 1, "max": 1}
    assert asked(monkeypatch, one, [HERE] * 9, answers_after_s=3) == ("answered", 0)
    assert asked(monkeypatch, one, [HERE] * 9, answers_after_s=1000) == ("given up", 1)


def test_a_teacher_that_scales_from_none_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    none = {"min": 0, "max": 1}
    # It loads for longer than an answer may take, and has as long for it afterwards.
    assert asked(monkeypatch, none, [GONE, GONE, HERE, HERE], answers_after_s=35) == ("answered", 3)
    assert asked(monkeypatch, none, [GONE, HERE, HERE], answers_after_s=1000) == ("given up", 3)
    # But no longer than it may take to load.
    assert asked(monkeypatch, none, [GONE] * 9, answers_after_s=1000) == ("given up", 4)


def test_a_replica_that_is_replaced_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    assert asked(monkeypatch, {"min": 1, "max": 1}, [GONE, HERE, HERE], answers_after_s=25) == ("answered", 2)


def test_calls_for_replicas_that_load_still_may_queue_before_those_that_are_there(monkeypatch: pytest.MonkeyPatch):
    assert asked(monkeypatch, {"min": 1, "max": 4}, [HERE] * 9, answers_after_s=35) == ("answered", 0)
    assert asked(monkeypatch, {"min": 4, "max": 4}, [HERE] * 9, answers_after_s=35) == ("given up", 1)


class EngineDeadError(Exception):
    """As vLLM's is called, which the driver need not have."""


def lost() -> RayError:
    return RayActorError(error_msg="the replica died")


def refused(cause: Exception) -> RayError:
    return RayTaskError("answer", "Traceback\nso it says", cause)


@pytest.mark.parametrize(
    ("outcomes", "expected", "num_calls"),
    [
        # A replica that died is no fault of the rows: Serve replaces it.
        ([lost(), lost(), "answered"], "answered", 3),
        ([refused(EngineDeadError()), refused(EngineDeadError()), "answered"], "answered", 3),
        # What fails twice on a replica that lives is up to the call.
        ([refused(KeyError("x")), refused(KeyError("x")), "answered"], "RayTaskError: so it says", 2),
        ([lost()] * 9, "RayActorError: the replica died", client.INFRASTRUCTURE_RETRIES),
    ],
)
def test_a_call_whose_replica_dies_is_made_again(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[Any], expected: str, num_calls: int
):
    left, looks = iter(outcomes), []

    class Handle:
        class answer:
            @staticmethod
            async def remote(*_: Any) -> Any:
                outcome = next(left)
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

    monkeypatch.setattr(client, "MAX_BACKOFF_S", 0)
    monkeypatch.setattr(server, "wait_until_up", lambda app, timeout_s: looks.append(timeout_s))
    monkeypatch.setattr(server.serve, "get_app_handle", lambda app: Handle())
    section = Teacher(model="raykd/demo-teacher")
    row = {"messages": "", "prompt_token_ids": np.array([1]), "given_token_ids": np.array([2])}

    async def run() -> Any:
        asking = client.TeacherClient("app", "experiment", section, [], in_flight=2)
        return await asking._call([row], SimpleNamespace(top_k=1))

    assert asyncio.run(run()) == expected
    assert len(outcomes) - len(list(left)) == num_calls
    # Before each further call the teacher must be up again.
    assert len(looks) == num_calls - 1
