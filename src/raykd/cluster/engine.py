"""vLLM engine arguments and environment variables, with the defaults that a CPU needs."""

import math
from typing import Any

from raykd.cluster.resources import Accelerator
from raykd.compat import ENGINE_START_TIMEOUT_ENV
from raykd.config.engine import Engine

# Of an engine for which nothing else is said.
START_TIMEOUT_S = 3600


def engine_settings(
    engine: Engine, kind: Accelerator, start_timeout_s: float = START_TIMEOUT_S
) -> tuple[dict[str, Any], dict[str, str]]:
    """vLLM's arguments and environment for an engine, with what a CPU needs added where it is not set.

    Args:
        engine: its configuration.
        kind: what it runs on.
        start_timeout_s: seconds that it may take to load.

    Returns:
        Engine arguments and environment variables.
    """
    kwargs = {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        # Sampling is what the experiment says; by default vLLM takes what it leaves open (top_k, a repetition penalty)
        # from the model's generation_config.json. The tokens that end an answer are read from there all the same.
        "generation_config": "vllm",
        # Never by pickle, which can hold code; by default vLLM takes that where there is nothing else.
        "load_format": "safetensors",
        # Nobody waits for the single answer: twice the sequences and tokens in a step that vLLM would take as a server.
        "performance_mode": "throughput",
    }
    timeout = str(math.ceil(start_timeout_s))
    env = {
        "VLLM_LOGGING_LEVEL": "INFO",
        # vLLM gives up after ten minutes by itself, in which hundreds of gigabytes are not always read.
        "VLLM_ENGINE_READY_TIMEOUT_S": timeout,
        ENGINE_START_TIMEOUT_ENV: timeout,
    }
    if kind == "cpu":
        kwargs["enforce_eager"] = True
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return kwargs | engine.engine_kwargs, env | engine.env
