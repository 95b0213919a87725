"""Teacher deployment: the teacher's engine behind Ray Serve, with many prompts a call and replies in arrays.

Serve LLM loads, places and monitors the engine. Its own methods use OpenAI's protocol: an object for each token and
each log-probability, and one invalid prompt fails the whole call.
"""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.serve.llm.deployment import LLMServer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from raykd import compat
from raykd.display import summary

EngineDeadError = compat.engine_dead_error()


class TeacherDeployment(LLMServer):
    """Serve LLM's deployment with the method `answer`."""

    async def answer(
        self, prompts: list[list[int]], sampling: dict[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Answer prompts independently: an error of one does not affect the others.

        Args:
            prompts: token ids of each prompt.
            sampling: vLLM's sampling parameters, the same for all prompts.
            timeout_s: seconds for each prompt.

        Returns:
            for each prompt `text`, `token_ids` (T) int32 and `finish_reason`, or `error`. With `logprobs` or
            `prompt_logprobs` K, also `topk_ids` and `topk_logprobs` (T, K): the K best tokens of each position. With
            `prompt_logprobs` the positions are those of the prompt, without the first.

        Raises:
            EngineDeadError: the engine died; Serve then replaces the replica.
        """
        return await asyncio.gather(*(self._answer(prompt, sampling, timeout_s) for prompt in prompts))

    async def _answer(self, prompt: list[int], sampling: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True)
        client = compat.engine_client(self)
        try:
            async with asyncio.timeout(timeout_s):
                async for output in client.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                    return _reply(output, params)
            return {"error": "the engine sent no answer"}
        except TimeoutError:
            return {"error": f"no answer within {timeout_s:g} s (teacher.timeout_s)"}
        except EngineDeadError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            return {"error": f"refused: {type(cause).__name__}: {summary(cause)}"}


def _reply(output: Any, params: SamplingParams) -> dict[str, Any]:
    """Return the reply to one prompt from vLLM's `RequestOutput`."""
    (choice,) = output.outputs
    reply = {
        "text": choice.text,
        "token_ids": np.asarray(choice.token_ids, dtype=np.int32),
        "finish_reason": choice.finish_reason,
    }
    for flat_logprobs, top_k in (
        (choice.logprobs, params.logprobs),
        (output.prompt_logprobs, params.prompt_logprobs),
    ):
        if top_k and flat_logprobs is not None:
            # A position holds the token of the text, then the k best in order. A prompt's first position is empty.
            shape = (-1, top_k + 1)
            reply["topk_ids"] = np.asarray(flat_logprobs.token_ids, dtype=np.int32).reshape(shape)[:, 1:]
            reply["topk_logprobs"] = np.asarray(flat_logprobs.logprobs, dtype=np.float32).reshape(shape)[:, 1:]
    return reply
