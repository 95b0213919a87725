"""vLLM engine arguments and environment variables, with the defaults for CPUs."""

import math
from typing import Any

from raykd.cluster.resources import Accelerator
from raykd.compat import ENGINE_START_TIMEOUT_ENV
from raykd.config.engine import Engine

# Default limit for loading an engine.
START_TIMEOUT_S = 3600


def engine_settings(
    engine: Engine, kind: Accelerator, start_timeout_s: float = START_TIMEOUT_S
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return vLLM's arguments and environment variables of an engine; the configuration's own values take precedence.

    Args:
        engine: the engine's configuration.
        kind: accelerator that the engine runs on.
        start_timeout_s: seconds that the engine may take to load.

    Returns:
        Engine arguments, and environment variables.
    """
    kwargs = {
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        # Sampling parameters come from the experiment alone. By default vLLM fills unset ones (top_k, a repetition
        # penalty) from the model's generation_config.json; it reads the end-of-sequence tokens there in either case.
        "generation_config": "vllm",
        # Pickle files can hold code; by default vLLM loads them where there are no safetensors.
        "load_format": "safetensors",
        # Latency does not matter: doubles the sequences and tokens in a step of vLLM's server defaults.
        "performance_mode": "throughput",
    }
    timeout = str(math.ceil(start_timeout_s))
    env = {
        "VLLM_LOGGING_LEVEL": "INFO",
        # vLLM's default of ten minutes is too short to read hundreds of gigabytes.
        "VLLM_ENGINE_READY_TIMEOUT_S": timeout,
        ENGINE_START_TIMEOUT_ENV: timeout,
    }
    if kind == "cpu":
        kwargs["enforce_eager"] = True
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return kwargs | engine.engine_kwargs, env | engine.env
