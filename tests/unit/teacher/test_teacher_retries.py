"""Calls of served replicas: how long a reply may take, and which failures are retried."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

from raykd.config.sections import Teacher
from raykd.teacher import serve_client, server
from raykd.teacher.serve_client import ServeTeacherClient

UP, DOWN = True, False
REPLY = [{"text": "It is 4."}]
TIMED_OUT = [{"error": "no answer within 0.1 s (teacher.timeout_s)"}]


def serve_replica(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """A Serve handle whose replica is a coroutine function."""
    handle = SimpleNamespace(answer=SimpleNamespace(remote=answer))
    monkeypatch.setattr(server.serve, "get_app_handle", lambda app: handle)


def call(
    monkeypatch: pytest.MonkeyPatch, replicas: dict[str, int], states: list[bool], reply_after_s: float
) -> tuple[list[dict[str, Any]], int]:
    """Return the replies of a call and the number of status requests; each returns the next of `states`.

    The time limits are 0.1 s for a reply and 0.35 s for a start.
    """
    remaining = iter(states)

    async def answer(*_: Any) -> list[dict[str, Any]]:
        await asyncio.sleep(reply_after_s)
        return REPLY

    serve_replica(monkeypatch, answer)
    monkeypatch.setattr(serve_client, "REPLICA_GRACE_S", 0)
    monkeypatch.setattr(server, "has_replica", lambda app: next(remaining))
    monkeypatch.setattr(server, "is_up", lambda app: True)
    teacher = Teacher.model_validate({"model": "raykd/demo-teacher", "replicas": replicas})
    teacher = teacher.model_copy(update={"timeout_s": 0.1, "start_timeout_s": 0.35})

    async def run() -> list[dict[str, Any]]:
        return await ServeTeacherClient("app", teacher, max_calls=2).answer([[1]], {}, teacher.timeout_s)

    replies = asyncio.run(run())
    return replies, len(states) - len(list(remaining))


def test_late_reply_times_out(monkeypatch: pytest.MonkeyPatch):
    one = {"min": 1, "max": 1}
    assert call(monkeypatch, one, [UP] * 9, reply_after_s=0.03) == (REPLY, 0)
    assert call(monkeypatch, one, [UP] * 9, reply_after_s=10) == (TIMED_OUT, 1)


def test_client_waits_for_scale_from_zero(monkeypatch: pytest.MonkeyPatch):
    none = {"min": 0, "max": 1}
    # The reply timeout starts after loading.
    assert call(monkeypatch, none, [DOWN, DOWN, UP, UP], reply_after_s=0.35) == (REPLY, 3)
    assert call(monkeypatch, none, [DOWN, UP, UP], reply_after_s=10) == (TIMED_OUT, 3)
    # `teacher.start_timeout_s` limits the time without a replica.
    assert call(monkeypatch, none, [DOWN] * 9, reply_after_s=10) == (TIMED_OUT, 4)


def test_client_waits_for_replica_replacement(monkeypatch: pytest.MonkeyPatch):
    assert call(monkeypatch, {"min": 1, "max": 1}, [DOWN, UP, UP], reply_after_s=0.25) == (REPLY, 2)


def test_timeout_grows_with_replicas_that_may_be_added(monkeypatch: pytest.MonkeyPatch):
    assert call(monkeypatch, {"min": 1, "max": 4}, [UP] * 9, reply_after_s=0.35) == (REPLY, 0)
    assert call(monkeypatch, {"min": 4, "max": 4}, [UP] * 9, reply_after_s=0.35) == (TIMED_OUT, 1)


class EngineDeadError(Exception):
    """Has the name of vLLM's exception, which the driver may not be able to import."""


def actor_error() -> RayError:
    return RayActorError(error_msg="the replica died")


def task_error(cause: Exception) -> RayError:
    return RayTaskError("answer", "Traceback\nKeyError: x", cause)


@pytest.mark.parametrize(
    ("outcomes", "expected", "num_calls"),
    [
        # Serve replaces a dead replica, so the call is retried.
        ([actor_error(), actor_error(), REPLY], REPLY, 3),
        ([task_error(EngineDeadError()), task_error(EngineDeadError()), REPLY], REPLY, 3),
        # A call that fails twice on a live replica is not retried.
        ([task_error(KeyError("x")), task_error(KeyError("x")), REPLY], [{"error": "RayTaskError: KeyError: x"}], 2),
        (
            [actor_error()] * 9,
            [{"error": "RayActorError: the replica died"}],
            serve_client.INFRASTRUCTURE_RETRIES,
        ),
    ],
)
def test_calls_are_retried_when_the_replica_dies(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[Any], expected: list[dict[str, Any]], num_calls: int
):
    remaining, waits = iter(outcomes), []

    async def answer(*_: Any) -> Any:
        outcome = next(remaining)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    serve_replica(monkeypatch, answer)
    monkeypatch.setattr(serve_client, "MAX_BACKOFF_S", 0)
    monkeypatch.setattr(server, "wait_until_up", lambda app, timeout_s: waits.append(timeout_s))

    async def run() -> list[dict[str, Any]]:
        client = ServeTeacherClient("app", Teacher(model="raykd/demo-teacher"), max_calls=2)
        return await client.answer([[1]], {}, 1.0)

    assert asyncio.run(run()) == expected
    assert len(outcomes) - len(list(remaining)) == num_calls
    # Every retry waits until the teacher is up again.
    assert len(waits) == num_calls - 1
