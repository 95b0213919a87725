"""Serving: the teacher of an experiment alone, as an application of Ray Serve that speaks OpenAI's protocol.

`serve run raykd.serving:app experiment=configs/quickstart.yaml`, or a RayService (cluster/kuberay/rayservice.yaml). A run
serves its own teacher, on no network port, and needs none of this.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator

from raykd import config
from raykd.teacher import llm_config
from raykd.tree import Section


class Service(Section):
    """What the application is built from: `args` in Serve's configuration, or `key=value` of `serve run`."""

    experiment: str
    """The experiment's YAML file, on the nodes."""
    overrides: tuple[str, ...] = ()
    """As on the command line: `teacher.engine.tensor_parallel_size=8`; on that of `serve run` as a list in YAML."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        return yaml.safe_load(value) if isinstance(value, str) else value


def engines(experiment: str | Path, overrides: Sequence[str] = ()) -> list[Any]:
    """The Serve LLM configurations of an experiment's teacher: one, named `teacher`.

    Args:
        experiment: the YAML file.
        overrides: `key.path=value`.

    Raises:
        ValueError: where that is no experiment, with the way out.
    """
    teacher = config.load(experiment, overrides).teacher
    # A service that scales from no node has none yet of which `auto` could be told.
    kind = "cpu" if teacher.engine.accelerator == "cpu" else "gpu"
    return [llm_config(teacher, 0, kind)]


def app(args: Service) -> Any:
    """The application: `/v1/chat/completions` and the others of OpenAI's protocol, for the model `teacher`.

    It asks for no token: keep the port that Serve listens on in a network of its own.
    """
    # Loads vLLM, which takes seconds.
    from ray.serve.llm import build_openai_app

    return build_openai_app({"llm_configs": engines(args.experiment, args.overrides)})
