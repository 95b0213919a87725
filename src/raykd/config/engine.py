"""Engine: the configuration of vLLM engines, their replicas, sampling, and OpenAI-compatible servers."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from raykd.config import secrets
from raykd.config.base import RUNTIME_ONLY, ConfigModel
from raykd.errors import UserError

# Arguments of vLLM that must be integers above 0, and one further value: vLLM takes max_model_len=-1 for the longest
# sequence that fits into memory.
SIZES = {"max_model_len": -1, "max_num_seqs": None, "max_num_batched_tokens": None}


def check_accelerator(accelerator: str, accelerator_type: str | None) -> None:
    """Refuse a GPU model for an accelerator that is the CPU.

    Raises:
        UserError: if both are set.
    """
    if accelerator == "cpu" and accelerator_type:
        raise UserError(f"accelerator_type={accelerator_type!r} is a GPU model, but accelerator=cpu: drop one of them")


class Sampling(ConfigModel):
    """How a model samples its answers."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0: greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass of nucleus sampling, above 0 and at most 1. 1: all tokens."""
    max_tokens: int = Field(default=512, ge=1)
    """Maximum length of an answer, in tokens. A longer answer is truncated (`finish_reason: length`)."""
    seed: int = 0
    """Random seed of sampling. Ignored with `temperature: 0`."""


class Replicas(ConfigModel):
    """Number of replicas. Ray Serve scales it with the number of ongoing requests."""

    min: int = Field(default=1, ge=0)
    """Smallest number of replicas."""
    max: int = Field(default=1, ge=1)
    """Largest number of replicas."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min > self.max:
            raise UserError(f"min={self.min} is above max={self.max}")
        return self


class Engine(ConfigModel):
    """A vLLM engine."""

    accelerator: Annotated[Literal["auto", "cpu", "gpu"], RUNTIME_ONLY] = "auto"
    """Processor of the engine. `auto`: GPUs if the cluster has any, otherwise the CPU."""
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = None
    """GPU model by Ray's name, such as `A10G`, `L4`, `A100-80G` or `H100`. null: any."""
    tensor_parallel_size: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    """Number of GPUs over which each layer is split."""
    pipeline_parallel_size: Annotated[int, RUNTIME_ONLY] = Field(default=1, ge=1)
    """Number of groups of GPUs over which the layers are distributed."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments of vLLM, passed on unchanged
    (https://docs.vllm.ai/en/latest/configuration/engine_args/)."""
    env: Annotated[dict[str, str], RUNTIME_ONLY] = Field(default_factory=dict)
    """Environment variables of the engine's processes, such as `VLLM_CPU_KVCACHE_SPACE` (GiB)."""

    @model_validator(mode="after")
    def _check_accelerator(self) -> Self:
        check_accelerator(self.accelerator, self.accelerator_type)
        return self

    @model_validator(mode="after")
    def _check_trust(self) -> Self:
        if "trust_remote_code" in self.engine_kwargs:
            raise UserError(
                "engine_kwargs.trust_remote_code is not read here: set trust_remote_code beside the model's name, "
                "where it holds for vLLM, tokenizer and training alike"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        # The planner computes with these before vLLM can refuse them.
        for name, further_value in SIZES.items():
            value = self.engine_kwargs.get(name)
            if value is None:
                continue
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or (value <= 0 and value != further_value):
                raise UserError(f"engine_kwargs.{name}: should be an integer above 0, not {value!r}")
        share = self.engine_kwargs.get("gpu_memory_utilization")
        if share is not None:
            is_number = isinstance(share, int | float) and not isinstance(share, bool)
            if not is_number or not 0 < share <= 1:
                raise UserError(f"engine_kwargs.gpu_memory_utilization: should be above 0 and at most 1, not {share!r}")
        return self

    @model_validator(mode="after")
    def _refuse_secrets(self) -> Self:
        if name := secrets.find_secret_name(self.engine_kwargs, "engine_kwargs"):
            raise UserError(
                f"{name}: secrets must not be configured, because the configuration is written down; set it in the "
                "environment of the cluster's nodes"
            )
        if name := next((name for name in self.env if not secrets.is_engine_variable(name)), None):
            raise UserError(
                f"env.{name}: is not a known setting of an engine's libraries and may be a secret, and the "
                "configuration is written down: set it in the environment of the cluster's nodes"
            )
        return self


class Endpoint(ConfigModel):
    """An OpenAI-compatible server that replaces the teacher's vLLM engine."""

    url: str
    """Base URL, without `/completions`, such as http://host:8000/v1."""
    identity: str | None = None
    """Your name for what the server serves. Completions are kept by it: those of another server are not used, and those
    of the same server at a new URL are. null: the URL."""
    model: str | None = None
    """Name of the model on the server. null: `teacher.model`."""
    api: Literal["completions", "chat"] = "completions"
    """`completions`: sends token ids and receives token ids, with log-probabilities for soft targets. vLLM's server
    supports it, with its default `--logprobs-mode` and a `--max-logprobs` of at least `targets.top_k`. It needs the
    teacher's tokenizer. `chat`: sends messages and receives text, as commercial APIs do. It supports hard targets only
    and needs no file of the model. The server's defaults hold for all sampling parameters that are not configured."""
    api_key_env: Annotated[str | None, RUNTIME_ONLY] = None
    """Name of the environment variable that holds the API key; set it on every node of the cluster. The key itself is
    never written. null: no key is sent."""
    max_requests_per_minute: Annotated[float | None, RUNTIME_ONLY] = Field(default=None, gt=0)
    """Rate limit, in requests per minute, with one prompt in each request. Requests are evenly spaced. null: no
    limit."""
    max_concurrent_requests: Annotated[int, RUNTIME_ONLY] = Field(default=64, ge=1)
    """Maximum number of concurrent requests."""
    max_retries: Annotated[int, RUNTIME_ONLY] = Field(default=8, ge=0)
    """Maximum number of retries of a request after no answer, too many requests (429) or a server error (5xx). The wait
    is 0.5 s at first and doubles up to 8 s, with up to a quarter of random jitter; `Retry-After` takes precedence."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        # The message does not repeat the URL, which may hold a secret.
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, is_address = None, False
        if parts is None or not is_address:
            raise UserError("should be an address such as http://host:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                "should hold neither user, password nor a query, because the configuration is written down; set "
                "api_key_env to the name of the environment variable that holds the key"
            )
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_variable_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            # The message does not repeat the value, which may be the key.
            raise UserError("should be the name of an environment variable, in capitals, not the key itself")
        return name


def check_num_samples(num_samples: int, sampling: Sampling) -> None:
    """Raise UserError if several samples of one prompt would be identical."""
    if num_samples > 1 and not sampling.temperature:
        raise UserError(
            f"num_samples={num_samples} with sampling.temperature=0 gives identical samples: "
            "set sampling.temperature above 0"
        )
