"""Config: what an experiment is. One YAML file, one tree, frozen; unknown keys are refused."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raykd.config.base import NAME_PATTERN, RUNTIME_ONLY, ConfigModel, is_runtime_only
from raykd.config.errors import did_you_mean, format_validation_error
from raykd.config.overrides import all_paths, flatten, format_hparams, set_path
from raykd.config.search_space import Axis
from raykd.config.sections import (
    Attention,
    Dataset,
    Evaluate,
    Loss,
    Prices,
    Student,
    Sweep,
    Targets,
    Teacher,
    Train,
)
from raykd.config.strategies import BUILT_IN, Prompt, Strategy
from raykd.errors import UserError
from raykd.storage import filesystem

BASE = "base"
Tracker = Literal["mlflow", "wandb"]
# What may differ between arms. All else is shared, so that arms differ in nothing but what names them.
ARM_SECTIONS = (
    "teacher.sampling",
    "teacher.num_samples",
    "prompt.strategy",
    "targets",
    "loss",
    "student.lora",
    "train",
)
# Those fields of them that bear on what the teacher is asked.
TEACHER_FIELDS = (
    "teacher.sampling",
    "teacher.num_samples",
    "prompt.strategy",
    "targets.source",
    "targets.kind",
    "targets.top_k",
)


class Experiment(ConfigModel):
    """One experiment: the tree that a YAML file holds."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the experiment's folder below `storage`: letters, digits, '.', '_' and '-'."""
    storage: Annotated[str, RUNTIME_ONLY] = "storage"
    """A folder that every node of the cluster sees, or a bucket: s3://, gs:// or abfs://BUCKET/PREFIX. Keys, and the
    address of another server than the cloud's, come from the environment of the nodes."""
    dataset: Dataset = Dataset(num_train=1000, num_test=300)
    teacher: Teacher
    student: Student
    prompt: Prompt = Prompt()
    targets: Targets = Targets()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    attention: Attention | None = Attention()
    """How the students' attention is measured; null where it is not."""
    arms: dict[str, dict[str, Any]] = Field(default={"default": {}})
    """Each arm's overrides by dotted path, such as `prompt.strategy: teacher`."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Every arm is trained once with each."""
    max_concurrent_trials: Annotated[int | None, RUNTIME_ONLY] = Field(default=None, ge=1)
    """Trials at a time; null for as many as the cluster's free resources hold."""
    prices: Annotated[Prices, RUNTIME_ONLY] = Prices()
    tracking: Annotated[Tracker | None, RUNTIME_ONLY] = None
    """Who is told of the trials, besides TensorBoard: MLflow, below the experiment's folder unless MLFLOW_TRACKING_URI
    names a server, or Weights & Biases, offline unless WANDB_API_KEY is set."""
    sweep: Sweep | None = None
    """What is searched for every arm; null where arms are trained as they stand."""

    @model_validator(mode="after")
    def _arms(self) -> Self:
        filesystem.check_uri(self.storage)
        if not self.arms:
            raise UserError("arms is empty: name at least one, such as `none: {}`")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds holds a seed twice: {list(self.seeds)}")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds should be between 0 and 2**32 - 1: {list(self.seeds)}")
        for name in self.arms:
            if not re.match(NAME_PATTERN, name) or name == BASE:
                raise UserError(
                    f"arm name {name!r}: letters, digits, '.', '_' and '-' only, and not {BASE!r}, "
                    "which is the student without an adapter and always there"
                )
        for name in self.arms:
            self.arm(name)
        return self

    @model_validator(mode="after")
    def _swept(self) -> Self:
        if self.sweep is None:
            return self
        if not self.dataset.num_validation:
            raise UserError(
                "sweep: points are chosen by validation problems, which are cut from train: set dataset.num_validation"
            )
        for path, axis in self.sweep.space.items():
            for name, overrides in self.arms.items():
                self._check_axis(path, axis, name, overrides)
        for name in self.arms:
            told = (self.sweep.scheduler, self.sweep.search)
            if self.arm(name).targets.source == "student" and told != ("none", "random"):
                raise UserError(
                    f"arm {name!r} learns from its own answers, in rounds that all students take in step, so none of "
                    "them can be stopped before the others, or chosen by what others reached: set "
                    "sweep.scheduler=none and sweep.search=random"
                )
        return self

    def _check_axis(self, path: str, axis: Axis, name: str, overrides: Mapping[str, Any]) -> None:
        """Raises UserError where a field cannot be searched, or not for an arm."""
        where = f"sweep.space.{path}"
        known = all_paths(json.loads(self.arm(name).model_dump_json()), "")
        if path not in known or not _may_vary_by_arm(path):
            can = [each for each in known if _may_vary_by_arm(each)]
            raise UserError(
                f"{where}: no field in which arms may differ{did_you_mean(path, can)}; those are below "
                f"{', '.join(ARM_SECTIONS)}"
            )
        if is_runtime_only(Train, path.removeprefix("train.")):
            raise UserError(f"{where}: how a trial is carried out changes nothing of what it is; set it for all")
        if self.sweep and self.sweep.search == "optuna" and affects_teacher(path) and not axis.values:
            raise UserError(
                f"{where}: the teacher is asked before the first trial, so what optuna may choose of this must be "
                "listed: give choice, or set sweep.search=random"
            )
        if any(("targets.source", "student") in flatten({path: value}, "") for value in axis.extremes):
            raise UserError(f"{where}: a student's own answers are trained on in rounds; make it an arm of its own")
        for named, _ in flatten(overrides, ""):
            if f"{named}.".startswith(f"{path}.") or f"{path}.".startswith(f"{named}."):
                raise UserError(f"{where}: arm {name!r} sets {named}; what is searched is not set by an arm")
        for value in axis.extremes:
            try:
                self._arm(name, {path: value})
            except ValidationError as error:
                # What does not go with other fields may go with other values of those.
                if any(each["loc"] and _is_under(each["loc"], path) for each in error.errors()):
                    raise UserError(f"{where}: {format_validation_error(error, Arm)}") from None

    def _teacher_gives(self, arm: str, top_k: int) -> None:
        """Raises UserError where the teacher cannot give an arm's soft targets, or its engine is told not to."""
        if self.teacher.uses_chat_api:
            raise UserError(
                f"arm {arm!r}: targets.kind=top_k: soft targets, and the scoring of given tokens, need token ids with "
                "log-probabilities, which teacher.endpoint.api=chat does not give; set targets.kind=hard, or "
                "teacher.endpoint.api=completions where the server is vLLM's or does as much"
            )
        if self.teacher.endpoint:
            return
        told = self.teacher.engine.engine_kwargs
        limit, mode = told.get("max_logprobs", top_k), told.get("logprobs_mode", "raw_logprobs")
        if not isinstance(limit, int):
            raise UserError(f"teacher.engine.engine_kwargs.max_logprobs: should be a whole number, not {limit!r}")
        if limit != -1 and limit < top_k:
            raise UserError(
                f"arm {arm!r}: targets.top_k={top_k} is above teacher.engine.engine_kwargs.max_logprobs={limit}; "
                "lower the one or leave the other out"
            )
        if mode != "raw_logprobs":
            raise UserError(
                f"arm {arm!r}: soft targets are the model's own distribution, before temperature and top-p: "
                f"teacher.engine.engine_kwargs.logprobs_mode must be raw_logprobs, not {mode!r}"
            )

    @property
    def strategies(self) -> dict[str, Strategy]:
        """The built-in strategies and the experiment's own, by name."""
        return BUILT_IN | self.prompt.strategies

    def arm(self, name: str, point: Mapping[str, Any] = MappingProxyType({})) -> "Arm":
        """The experiment with the named arm's overrides in place, and the values of a point of the sweep.

        Raises:
            UserError: where they do not go together.
        """
        whose = f"arm {name!r}" + (f" at {format_hparams(point)}" if point else "")
        for path, _ in flatten(self.arms[name], ""):
            if not _may_vary_by_arm(path):
                raise UserError(
                    f"arm {name!r} overrides {path!r}; arms may differ in {', '.join(ARM_SECTIONS)} only, "
                    "for they share problems, models and evaluation"
                )
        try:
            arm = self._arm(name, point)
        except ValidationError as error:
            raise UserError(f"{whose}: {format_validation_error(error, Arm)}") from None
        if arm.prompt.strategy not in self.strategies:
            raise UserError(
                f"{whose}: unknown strategy {arm.prompt.strategy!r}"
                f"{did_you_mean(arm.prompt.strategy, self.strategies)}; known: "
                f"{', '.join(sorted(self.strategies))}; add your own under prompt.strategies"
            )
        if arm.targets.kind == "top_k":
            self._teacher_gives(name, arm.targets.top_k)
        return arm

    def _arm(self, name: str, point: Mapping[str, Any]) -> "Arm":
        tree: dict[str, Any] = {key: getattr(self, key).model_dump() for key in Arm.model_fields}
        # `targets: {kind: top_k}` says as much as `targets.kind: top_k`: what it does not name stays as it is.
        for path, value in [*flatten(self.arms[name], ""), *flatten(dict(point), "")]:
            set_path(tree, path, value)
        return Arm.model_validate(tree)


class Arm(ConfigModel):
    """What a trial is made from: the sections that arms share or override."""

    teacher: Teacher
    student: Student
    prompt: Prompt
    targets: Targets
    loss: Loss
    train: Train

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is asked of the teacher: not where the tokens are the targets and others wrote them."""
        return self.targets.source == "teacher" or self.targets.kind == "top_k"

    @property
    def warmup(self) -> "Arm | None":
        """The arm in its warm-up rounds, on the reference solutions; None where it has none."""
        if self.targets.source != "student" or not self.targets.warmup_rounds:
            return None
        return self.model_copy(update={"targets": self.targets.model_copy(update={"source": "reference"})})

    @property
    def divergence(self) -> str:
        """The divergence that is trained with."""
        return self.loss.divergence or ("reverse_kl" if self.targets.source == "student" else "forward_kl")


def _may_vary_by_arm(path: str) -> bool:
    """Whether arms may differ in a field."""
    return any(path == section or path.startswith(section + ".") for section in ARM_SECTIONS)


def affects_teacher(path: str) -> bool:
    """Whether a field or a section of an arm bears on what the teacher is asked."""
    return any(f"{each}.".startswith(f"{path}.") or f"{path}.".startswith(f"{each}.") for each in TEACHER_FIELDS)


def _is_under(location: tuple[int | str, ...], path: str) -> bool:
    return ".".join(map(str, location)).startswith(path)
