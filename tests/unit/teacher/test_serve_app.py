"""Serve application: its arguments and its deployment."""

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from raykd.config.loading import load_experiment
from raykd.config.sections import Teacher
from raykd.teacher.serve_app import TeacherService, app, one_prompt_per_call
from raykd.teacher.server import llm_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ({}, ()),
        ({"overrides": ["teacher.engine.tensor_parallel_size=8"]}, ("teacher.engine.tensor_parallel_size=8",)),
        # `serve run` passes the list as a string.
        ({"overrides": "[teacher.model=a, teacher.revision=b]"}, ("teacher.model=a", "teacher.revision=b")),
    ],
)
def test_arguments_are_parsed(arguments: dict[str, object], overrides: tuple[str, ...]):
    assert TeacherService.model_validate({"experiment": "e.yaml", **arguments}).overrides == overrides


@pytest.mark.parametrize(
    "arguments", [{}, {"experiment": "e.yaml", "override": []}, {"experiment": "e", "overrides": "3"}]
)
def test_invalid_arguments_are_refused(arguments: dict[str, object]):
    with pytest.raises(ValidationError):
        TeacherService.model_validate(arguments)


def test_serve_validates_the_arguments():
    # Serve validates the arguments only if the parameter is annotated with a pydantic model.
    (parameter,) = inspect.signature(app).parameters.values()
    assert parameter.annotation is TeacherService


def test_rayservice_manifest_deploys_16_gpu_teacher():
    config = yaml.safe_load((ROOT / "cluster/kuberay/rayservice.yaml").read_text())["spec"]["serveConfigV2"]
    (application,) = yaml.safe_load(config)["applications"]
    assert application["import_path"] == f"{app.__module__}:{app.__name__}"
    args = TeacherService.model_validate(application["args"])
    teacher = load_experiment(ROOT / Path(args.experiment).relative_to("/opt/raykd"), args.overrides).teacher
    found = llm_config(teacher, 0, "gpu")
    assert found.model_id == "teacher"
    assert found.engine_kwargs["tensor_parallel_size"] * found.engine_kwargs["pipeline_parallel_size"] == 16
    assert found.placement_group_config["bundles"] == [{"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}] * 16


def test_replica_capacity_matches_that_of_a_run():
    """In a run, a call has `batch_size` prompts; in an OpenAI request it has one."""
    config = {"model": "raykd/demo-teacher", "concurrency": 3, "batch_size": 5, "replicas": {"min": 1, "max": 4}}
    teacher = Teacher.model_validate(config)
    in_a_run, alone = (llm_config(each, 0, "cpu").deployment_config for each in (teacher, one_prompt_per_call(teacher)))
    assert alone["max_ongoing_requests"] == 5 * in_a_run["max_ongoing_requests"] == 5 * 2 * 3
    figures = [each["autoscaling_config"]["target_ongoing_requests"] for each in (alone, in_a_run)]
    assert figures == [5 * 3, 3]
