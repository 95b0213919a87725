"""Engine: how vLLM is started for a model, how many times, and how it writes."""

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raykd.tree import Section

SECRET = re.compile(r"token$|secret|password|api_?key|access_?key|credential", re.IGNORECASE)
# Arguments of vLLM that say how fast and in how much memory it answers, not what.
SPEED_ARGUMENTS = frozenset(
    [
        "max_num_seqs",
        "max_num_batched_tokens",
        "performance_mode",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "enforce_eager",
        "disable_log_stats",
    ]
)


def check_accelerator(accelerator: str, accelerator_type: str | None) -> None:
    """Raises ValueError where a kind of GPU is named for what runs on the CPU."""
    if accelerator == "cpu" and accelerator_type:
        raise ValueError(f"accelerator_type {accelerator_type!r} is a kind of GPU, and accelerator is cpu: drop one")


class Sampling(Section):
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    """Completion tokens at most; what is cut there has finish_reason `length`."""
    seed: int = 0
    """Seed of each request where temperature > 0."""

    def bearing(self) -> dict[str, Any]:
        """The fields without what plays no part: greedy answers have no chance in them."""
        return self.model_dump() if self.temperature else {"temperature": 0.0, "max_tokens": self.max_tokens}


class Replicas(Section):
    min: int = Field(default=1, ge=0)
    max: int = Field(default=1, ge=1)
    """Ray Serve scales between the two by the requests in flight."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Engine(Section):
    """How vLLM is started for a model."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: GPUs where the cluster has any, else the CPU."""
    accelerator_type: str | None = None
    """Kind of GPU where a cluster has several, as Ray names it: `A10G`, `L4`, `A100-80G`, `H100`; null for any."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed on to vLLM unchanged (https://docs.vllm.ai/en/latest/configuration/engine_args/)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the engine's processes, such as VLLM_CPU_KVCACHE_SPACE (GiB)."""

    @model_validator(mode="after")
    def _of_a_kind(self) -> Self:
        check_accelerator(self.accelerator, self.accelerator_type)
        return self

    @model_validator(mode="after")
    def _trusts_by_name(self) -> Self:
        if "trust_remote_code" in self.engine_kwargs:
            raise ValueError("engine_kwargs.trust_remote_code: is set beside the model's name, for all that loads it")
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        # Whatever is configured is written into the experiment's folder and its report.
        for where, names in (("env", self.env), ("engine_kwargs", self.engine_kwargs)):
            if secret := next((name for name in names if SECRET.search(str(name))), None):
                raise ValueError(
                    f"{where}.{secret}: what is secret is not configured, for the configuration is written down; set "
                    "it in the environment of the cluster's nodes"
                )
        return self

    @property
    def arguments_of_answers(self) -> dict[str, Any]:
        """Those of `engine_kwargs` that bear on what is answered."""
        return {name: value for name, value in self.engine_kwargs.items() if name not in SPEED_ARGUMENTS}
