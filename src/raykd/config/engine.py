"""Engine: how vLLM is started for a model, how many times, and how it writes; or where a server elsewhere is asked."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from raykd.config.base import RUNTIME_ONLY, ConfigModel
from raykd.errors import UserError

SECRET = re.compile(r"token$|secret|password|api_?key|access_?key|credential", re.IGNORECASE)
# Arguments of vLLM that are whole numbers; -1 of the first is as long as there is room for.
SIZES = {"max_model_len": -1, "max_num_seqs": None, "max_num_batched_tokens": None}


def check_accelerator(accelerator: str, accelerator_type: str | None) -> None:
    """Raises UserError where a kind of GPU is named for what runs on the CPU."""
    if accelerator == "cpu" and accelerator_type:
        raise UserError(f"accelerator_type {accelerator_type!r} is a kind of GPU, and accelerator is cpu: drop one")


class Sampling(ConfigModel):
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    """Completion tokens at most; what is cut there has finish_reason `length`."""
    seed: int = 0
    """Seed of each request where temperature > 0."""


class Replicas(ConfigModel):
    min: int = Field(default=1, ge=0)
    max: int = Field(default=1, ge=1)
    """Ray Serve scales between the two by the requests in flight."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise UserError(f"min ({self.min}) is above max ({self.max})")
        return self


class Engine(ConfigModel):
    """How vLLM is started for a model."""

    accelerator: Annotated[Literal["auto", "cpu", "gpu"], RUNTIME_ONLY] = "auto"
    """`auto`: GPUs where the cluster has any, else the CPU."""
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = None
    """Kind of GPU where a cluster has several, as Ray names it: `A10G`, `L4`, `A100-80G`, `H100`; null for any."""
    tensor_parallel_size: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    pipeline_parallel_size: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed on to vLLM unchanged (https://docs.vllm.ai/en/latest/configuration/engine_args/)."""
    env: Annotated[dict[str, str], RUNTIME_ONLY] = Field(default_factory=dict)
    """Environment of the engine's processes, such as VLLM_CPU_KVCACHE_SPACE (GiB)."""

    @model_validator(mode="after")
    def _of_a_kind(self) -> Self:
        check_accelerator(self.accelerator, self.accelerator_type)
        return self

    @model_validator(mode="after")
    def _trusts_by_name(self) -> Self:
        if "trust_remote_code" in self.engine_kwargs:
            raise UserError("engine_kwargs.trust_remote_code: is set beside the model's name, for all that loads it")
        return self

    @model_validator(mode="after")
    def _of_some_size(self) -> Self:
        # Reckoned with before vLLM sees them.
        for name, also in SIZES.items():
            value = self.engine_kwargs.get(name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (value is None or (is_whole and (value > 0 or value == also))):
                raise UserError(f"engine_kwargs.{name}: should be a whole number above 0, not {value!r}")
        share = self.engine_kwargs.get("gpu_memory_utilization")
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (share is None or (is_number and 0 < share <= 1)):
            raise UserError(f"engine_kwargs.gpu_memory_utilization: should be above 0, and 1 at most, not {share!r}")
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        # Whatever is configured is written into the experiment's folder and its report.
        for where, names in (("env", self.env), ("engine_kwargs", self.engine_kwargs)):
            if secret := next((name for name in names if SECRET.search(str(name))), None):
                raise UserError(
                    f"{where}.{secret}: what is secret is not configured, for the configuration is written down; set "
                    "it in the environment of the cluster's nodes"
                )
        return self


class Endpoint(ConfigModel):
    """A server that speaks OpenAI's protocol, asked in place of an engine of one's own."""

    url: Annotated[str, RUNTIME_ONLY]
    """What comes before `/completions`, such as http://host:8000/v1."""
    model: str | None = None
    """The model's name on the server; null for `teacher.model`."""
    api: Literal["completions", "chat"] = "completions"
    """`completions`: the prompt's tokens are sent, and the answer's come back, with log-probabilities where they are
    asked for: what vLLM's server does (with its default `--logprobs-mode`, and a `--max-logprobs` of at least the k).
    The teacher's tokenizer must be here. `chat`: messages are sent and text comes back, as vendors have it: for hard
    targets only, and nothing of the model need be here. What sampling this file does not name is the server's own."""
    api_key_env: Annotated[str | None, RUNTIME_ONLY] = None
    """Name of the environment variable that holds the key, on every node of the cluster; null where none is asked for.
    The key itself is written nowhere."""
    max_requests_per_minute: Annotated[float | None, RUNTIME_ONLY] = Field(default=None, gt=0)
    """Requests go at even distances, so many at most, a prompt each; null for no limit."""
    max_concurrent_requests: Annotated[int, RUNTIME_ONLY] = Field(default=64, ge=1)
    """Requests under way at a time."""
    max_retries: Annotated[int, RUNTIME_ONLY] = Field(default=8, ge=0)
    """How often a request is made again that met with no answer, too many requests (429) or a fault of the server
    (5xx), after 0.5 s, then twice that and so on up to 8 s, less a random quarter, or after what `Retry-After` says."""

    @field_validator("url")
    @classmethod
    def _has_no_secret(cls, url: str) -> str:
        # Not repeated in the message: what is secret in it would be written down.
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, is_address = None, False
        if parts is None or not is_address:
            raise UserError("should be an address such as http://host:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "should hold neither user, password nor a query, for the configuration is written down; name the "
                "environment variable that holds the key by api_key_env"
            )
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            # It may be the key.
            raise UserError("should be the name of an environment variable, in capitals, not the key itself")
        return name
