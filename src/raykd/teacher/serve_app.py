"""Serve application: the teacher of an experiment behind OpenAI's protocol, on a network port.

Run `serve run raykd.teacher.serve_app:app experiment=configs/quickstart.yaml`, or apply a RayService
(cluster/kuberay/rayservice.yaml). `raykd run` serves its own teacher without a network port and does not need this.
"""

from typing import Any

import ray
from pydantic import field_validator

from raykd.cluster import resources
from raykd.cluster.capacity import capacity
from raykd.config.base import ConfigModel
from raykd.config.loading import load_experiment
from raykd.config.parsing import parse_yaml
from raykd.config.sections import Teacher
from raykd.teacher.server import llm_config


class TeacherService(ConfigModel):
    """Arguments of the application: `args` in Serve's configuration, or `key=value` of `serve run`."""

    experiment: str
    """The experiment's YAML file; every node must have it."""
    overrides: tuple[str, ...] = ()
    """Overrides as for `raykd run`, `teacher.engine.tensor_parallel_size=8`; for `serve run` a YAML list."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return parse_yaml(value) if isinstance(value, str) else value


def app(args: TeacherService) -> Any:
    """Return the application: OpenAI's protocol (`/v1/chat/completions`, ...) for the model `teacher`.

    It checks no API key: keep Serve's port in a private network.

    Args:
        args: the experiment and its overrides.

    Raises:
        UserError: the experiment cannot be read; the message names the remedy.
    """
    # Loads vLLM, which takes seconds.
    from ray.serve.llm import build_openai_app

    teacher = load_experiment(args.experiment, args.overrides).teacher
    if not ray.is_initialized():
        # `serve run` connects later, but the accelerator is resolved here.
        ray.init(namespace="serve")
    kind = resources.resolve_accelerator(teacher.engine.accelerator, capacity(is_existing=True))
    return build_openai_app({"llm_configs": [llm_config(one_prompt_per_call(teacher), 0, kind)]})


def one_prompt_per_call(teacher: Teacher) -> Teacher:
    """Return the section for OpenAI's protocol, where a call is one prompt: as many prompts at a time in more calls."""
    return teacher.model_copy(update={"concurrency": teacher.concurrency * teacher.batch_size, "batch_size": 1})
