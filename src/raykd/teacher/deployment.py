"""Replica: the teacher's engine behind Ray Serve, asked many prompts a call and answering in arrays.

Serve LLM loads the engine, places and watches it. Its own methods speak OpenAI's protocol: an object for each token
and each log-probability, and one bad prompt refuses the whole call.
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

EngineDeadError = compat.engine_dead_error()


class TeacherDeployment(LLMServer):
    """Serve LLM's deployment with a method of our own."""

    async def answer(
        self, prompts: list[list[int]], sampling: dict[str, Any], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Answers prompts, each by itself: what befalls one leaves the others alone.

        Args:
            prompts: token ids.
            sampling: vLLM's sampling parameters, the same for all.
            timeout_s: seconds after which a row is given up.

        Returns:
            for each prompt `text`, `token_ids` (T) int32, `finish_reason`; where `logprobs` or `prompt_logprobs` K were
            asked for, the K best of each position by `topk_ids` and `topk_logprobs` (T, K), of prompt positions but the
            first where it is those; or `error`.

        Raises:
            EngineDeadError: where it is the engine that failed; Serve then replaces the replica.
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
            return {"error": f"refused: {type(cause).__name__}: {' '.join(str(cause).split())}"}


def _reply(output: Any, params: SamplingParams) -> dict[str, Any]:
    (choice,) = output.outputs
    reply = {
        "text": choice.text,
        "token_ids": np.asarray(choice.token_ids, dtype=np.int32),
        "finish_reason": choice.finish_reason,
    }
    for flat, best in ((choice.logprobs, params.logprobs), (output.prompt_logprobs, params.prompt_logprobs)):
        if best and flat is not None:
            # Of each position the token that is there, and then the best, in their order; the prompt's first has none.
            shape = (-1, best + 1)
            reply["topk_ids"] = np.asarray(flat.token_ids, dtype=np.int32).reshape(shape)[:, 1:]
            reply["topk_logprobs"] = np.asarray(flat.logprobs, dtype=np.float32).reshape(shape)[:, 1:]
    return reply
