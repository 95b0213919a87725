"""Serve client: call the teacher's replicas through Ray Serve, with retries and timeouts."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError

from raykd import compat
from raykd.config.sections import Teacher
from raykd.teacher import server

# Attempts of a call whose replica died. Serve notices a dead replica after three health checks; until then it may route
# further attempts to the same replica, and these fail at once.
INFRASTRUCTURE_RETRIES = 6
# A replica applies `teacher.timeout_s` to each row itself; only a replica that hangs reaches this.
REPLICA_GRACE_S = 60
MAX_BACKOFF_S = 8


class ServeTeacherClient:
    """The client of one Serve application with the teacher's replicas.

    Args:
        app: the application's name.
        teacher: the `teacher` section.
        max_calls: calls that may wait for an answer at the same time.
    """

    def __init__(self, app: str, teacher: Teacher, max_calls: int) -> None:
        self._app, self._teacher = app, teacher
        self._remote_answer = serve.get_app_handle(app).answer.remote
        self._slots = asyncio.Semaphore(max_calls)
        self._start_lock = asyncio.Lock()
        # With `replicas.min` of 0, the application counts as up while no replica runs.
        self._had_replica = teacher.replicas.min > 0

    async def wait_until_up(self) -> None:
        """Wait until the teacher accepts calls.

        Raises:
            StageError: as for `server.wait_until_up`.
        """
        async with self._start_lock:
            await asyncio.to_thread(server.wait_until_up, self._app, self._teacher.start_timeout_s)

    async def answer(
        self, prompts: Sequence[Any], sampling: Mapping[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Return the replies of `raykd.teacher.deployment.TeacherDeployment.answer`; a call that fails gives errors.

        Args:
            prompts: token ids of each prompt.
            sampling: vLLM's sampling parameters, the same for all prompts.
            timeout_s: seconds for each prompt.
        """
        failure = ""
        for attempt in range(INFRASTRUCTURE_RETRIES):
            if attempt:
                await asyncio.sleep(min(2**attempt, MAX_BACKOFF_S))
                # Loading a large model takes longer than `timeout_s`.
                await self.wait_until_up()
            try:
                # A call that waits for a slot does not use up its timeout.
                async with self._slots:
                    replies = await self._wait_for_reply(self._remote_answer(prompts, sampling, timeout_s))
                self._had_replica = True
                return replies
            except TimeoutError:
                failure = f"no answer within {timeout_s:g} s (teacher.timeout_s)"
                if await asyncio.to_thread(server.is_up, self._app):
                    break
            except RayError as error:
                failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                if attempt and not _is_replica_failure(error):
                    break
        return [{"error": failure} for _ in prompts]

    async def _wait_for_reply(self, response: Any) -> list[dict[str, Any]]:
        """Return a replica's replies; time without a replica does not count against `teacher.timeout_s`.

        Raises:
            TimeoutError: a replica ran all the time and did not reply, or none started within
                `teacher.start_timeout_s`.
        """
        teacher = self._teacher
        # While other replicas load, the calls meant for them queue at those that run.
        timeout_s = (teacher.timeout_s + REPLICA_GRACE_S) * math.ceil(
            teacher.replicas.max / max(1, teacher.replicas.min)
        )
        started, had_replica = time.monotonic(), self._had_replica
        reply = asyncio.ensure_future(_result(response))
        try:
            while not (await asyncio.wait([reply], timeout=timeout_s))[0]:
                # A teacher that scales from zero starts, or waits for nodes, because of this pending call: giving it up
                # would cancel the scale-up.
                has_replica = await asyncio.to_thread(server.has_replica, self._app)
                waited_s = time.monotonic() - started
                if (has_replica and had_replica) or (not has_replica and waited_s > teacher.start_timeout_s):
                    raise TimeoutError
                had_replica = has_replica
            return reply.result()
        finally:
            reply.cancel()


async def _result(response: Any) -> Any:
    """Return the result of a Serve response, which is awaitable but no coroutine."""
    return await response


def _is_replica_failure(error: RayError) -> bool:
    """Return whether the replica or its engine died; any other error is the call's own and repeats."""
    return not isinstance(error, RayTaskError) or type(error.cause).__name__ == compat.ENGINE_DEAD_ERROR
