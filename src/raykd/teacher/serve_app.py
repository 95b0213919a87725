"""The teacher of an experiment as a Ray Serve application with OpenAI's protocol.

Run `serve run raykd.teacher.serve_app:app experiment=configs/quickstart.yaml`, or apply a RayService
(cluster/kuberay/rayservice.yaml). `raykd run` serves its own teacher without a network port and does not need this.
"""

from typing import Any

import ray
from pydantic import field_validator

from raykd.cluster import resources
from raykd.cluster.capacity import capacity
from raykd.config.base import ConfigModel
from raykd.config.errors import parse_yaml
from raykd.config.loading import load_experiment
from raykd.config.sections import Teacher
from raykd.teacher.server import llm_config


class TeacherService(ConfigModel):
    """What the application is built from: `args` in Serve's configuration, or `key=value` of `serve run`."""

    experiment: str
    """The experiment's YAML file, on the nodes."""
    overrides: tuple[str, ...] = ()
    """As on the command line of a run, `teacher.engine.tensor_parallel_size=8`; on that of `serve run`, a YAML list."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return parse_yaml(value) if isinstance(value, str) else value


def app(args: TeacherService) -> Any:
    """The application: `/v1/chat/completions` and the others of OpenAI's protocol, for the model `teacher`.

    It asks for no token: keep the port that Serve listens on in a network of its own.

    Raises:
        UserError: where there is no such experiment, with the way out.
    """
    # Loads vLLM, which takes seconds.
    from ray.serve.llm import build_openai_app

    teacher = load_experiment(args.experiment, args.overrides).teacher
    if not ray.is_initialized():
        # As `serve run` does afterwards; what there is to run on is asked now.
        ray.init(namespace="serve")
    kind = resources.resolve_accelerator(teacher.engine.accelerator, capacity(is_existing=True))
    return build_openai_app({"llm_configs": [llm_config(by_prompt(teacher), 0, kind)]})


def by_prompt(teacher: Teacher) -> Teacher:
    """The teacher as it is asked over OpenAI's protocol, where a call is one prompt: as many prompts, so more calls."""
    return teacher.model_copy(update={"concurrency": teacher.concurrency * teacher.batch_size, "batch_size": 1})
