"""Experiment: the configuration of one experiment, its arms, and the checks across sections."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from raykd.config.base import EXPAND_HOME, NAME_PATTERN, RUNTIME_ONLY, ConfigModel, is_runtime_only
from raykd.config.errors import did_you_mean, format_validation_error
from raykd.config.overrides import all_paths, flatten, flatten_arm, format_hparams, set_path
from raykd.config.search_space import Axis
from raykd.config.secrets import find_secret
from raykd.config.sections import Attention, Dataset, Evaluate, Prices, Sweep, Teacher
from raykd.config.strategies import BUILT_IN, Prompt, Strategy
from raykd.config.training import Loss, Student, Targets, Train
from raykd.errors import UserError
from raykd.storage import filesystem

BASE = "base"
Tracker = Literal["mlflow", "wandb"]
# Sections and fields in which arms may differ. Arms share all others, so that their results can be compared.
ARM_SECTIONS = (
    "teacher.sampling",
    "teacher.num_samples",
    "prompt.strategy",
    "targets",
    "loss",
    "student.lora",
    "train",
)
# Fields of ARM_SECTIONS that determine the requests to the teacher.
TEACHER_FIELDS = (
    "teacher.sampling",
    "teacher.num_samples",
    "prompt.strategy",
    "targets.source",
    "targets.kind",
    "targets.top_k",
)
MAX_TEACHER_VALUES = 100
# Every pair of arms is compared.
MAX_ARMS = 200


class Experiment(ConfigModel):
    """One experiment, as a YAML file holds it."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the experiment and of its folder in `storage`/experiments. Letters, digits, '.', '_' and '-'."""
    storage: Annotated[str, EXPAND_HOME, RUNTIME_ONLY] = "storage"
    """Folder that all nodes of the cluster share, or a bucket: s3://, gs:// or abfs://BUCKET/PREFIX. Set credentials,
    and the address of an S3-compatible server, in the environment of the nodes."""
    dataset: Dataset = Dataset(num_train=1000, num_test=300)
    """The problems."""
    teacher: Teacher
    """The teacher model."""
    student: Student
    """The student model and its adapter."""
    prompt: Prompt = Prompt()
    """What the teacher and the student are prompted with."""
    targets: Targets = Targets()
    """What the student is trained on."""
    loss: Loss = Loss()
    """The loss for soft targets."""
    train: Train = Train()
    """Training of the student."""
    evaluate: Evaluate = Evaluate()
    """Evaluation on the test problems."""
    attention: Attention | None = Attention()
    """Attention statistics of the students, measured by default. null: not measured."""
    arms: dict[str, dict[str, Any]] = Field(default={"default": {}})
    """Arms by name. Each holds its overrides by dotted path, such as `prompt.strategy: teacher`."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Random seeds, from 0 to 2**32 - 1. Each arm is trained once with each seed."""
    max_concurrent_trials: Annotated[int | None, RUNTIME_ONLY] = Field(default=None, ge=1)
    """Maximum number of concurrent trials. null: as many as fit on the cluster."""
    prices: Annotated[Prices, RUNTIME_ONLY] = Prices()
    """Prices of processors."""
    tracking: Annotated[Tracker | None, RUNTIME_ONLY] = None
    """Experiment tracker to log trials to, in addition to TensorBoard. `mlflow`: a database in the experiment's folder,
    or the server of `MLFLOW_TRACKING_URI`. `wandb`: offline files, or the online service if `WANDB_API_KEY` is set.
    null: TensorBoard only."""
    sweep: Sweep | None = None
    """Hyperparameter search for every arm. null: each arm is trained as configured."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_secrets(cls, tree: Any) -> Any:
        if path := find_secret(tree):
            raise UserError(
                f"{path}: holds a key or a password, and the configuration is written down: remove it, and set it in "
                "the environment of the cluster's nodes"
            )
        return tree

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        filesystem.check_uri(self.storage)
        if not self.arms:
            raise UserError("arms is empty: define at least one arm, such as `none: {}`")
        if len(self.arms) > MAX_ARMS:
            raise UserError(
                f"arms: {len(self.arms):,} are more than {MAX_ARMS}: search over values with a section `sweep` instead"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds={list(self.seeds)} has a seed twice: remove it")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds should be between 0 and 2**32 - 1, not {list(self.seeds)}")
        for name in self.arms:
            if not re.fullmatch(NAME_PATTERN, name) or name == BASE:
                raise UserError(
                    f"arms: name {name!r} is not valid: use letters, digits, '.', '_' and '-' only, and not {BASE!r}, "
                    "the name of the student without an adapter"
                )
        for name in self.arms:
            self.arm(name)
        return self

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if self.sweep is None:
            return self
        if not self.dataset.num_validation:
            raise UserError("sweep needs validation problems to choose points by: set dataset.num_validation above 0")
        for path, axis in self.sweep.space.items():
            for name, overrides in self.arms.items():
                self._check_axis(path, axis, name, overrides)
        for name in self.arms:
            is_independent = self.sweep.scheduler == "none" and self.sweep.search == "random"
            if self.arm(name).targets.source == "student" and not is_independent:
                raise UserError(
                    f"sweep: arm {name!r} has targets.source=student, whose trials run their rounds together, so that "
                    "early stopping and a search by results are not supported: set sweep.scheduler=none and "
                    "sweep.search=random"
                )
        return self

    def _check_axis(self, path: str, axis: Axis, name: str, overrides: Mapping[str, Any]) -> None:
        """Refuse a searched field that is not searchable, or not in one arm.

        Args:
            path: the field's dotted path.
            axis: its values.
            name: the arm's name.
            overrides: the arm's overrides.

        Raises:
            UserError: with the reason.
        """
        place = f"sweep.space.{path}"
        known_paths = all_paths(json.loads(self.arm(name).model_dump_json()), "")
        if path not in known_paths or not _may_vary_by_arm(path):
            searchable = [known for known in known_paths if _may_vary_by_arm(known)]
            raise UserError(
                f"{place}: is not a field in which arms may differ{did_you_mean(path, searchable)}; choose one below "
                f"{', '.join(ARM_SECTIONS)}"
            )
        if is_runtime_only(Train, path.removeprefix("train.")):
            raise UserError(f"{place}: does not change results and cannot be searched: set it for all arms")
        has_few_values = 1 <= len(axis.values) <= MAX_TEACHER_VALUES
        if self.sweep and self.sweep.search == "optuna" and affects_teacher(path) and not has_few_values:
            raise UserError(
                f"{place}: search=optuna needs a list of at most {MAX_TEACHER_VALUES} values for this field, because "
                "the teacher's completions with each of them are generated before the first trial: use choice, or set "
                "sweep.search=random"
            )
        if any(("targets.source", "student") in flatten({path: value}, "") for value in axis.extremes):
            raise UserError(f"{place}: targets.source=student cannot be searched: define an arm with it")
        for overridden, _ in flatten(overrides, ""):
            if f"{overridden}.".startswith(f"{path}.") or f"{path}.".startswith(f"{overridden}."):
                raise UserError(f"{place}: arm {name!r} sets {overridden}, too: remove one of the two")
        for value in axis.extremes:
            try:
                self._build_arm(name, {path: value})
            except ValidationError as error:
                # An error without the field's location comes from a combination, which other values may avoid.
                if any(problem["loc"] and _is_under(problem["loc"], path) for problem in error.errors()):
                    raise UserError(f"{place}: {format_validation_error(error, Arm)}") from None

    def _check_soft_targets(self, arm: str, top_k: int) -> None:
        """Refuse an arm with soft targets for which the teacher returns no suitable log-probabilities.

        Args:
            arm: the arm's name.
            top_k: the number of log-probabilities for each token.

        Raises:
            UserError: with the setting that prevents it.
        """
        if self.teacher.uses_chat_api:
            raise UserError(
                f"arm {arm!r}: targets.kind=top_k needs token ids with log-probabilities, which "
                "teacher.endpoint.api=chat does not return: set targets.kind=hard, or "
                "teacher.endpoint.api=completions for a vLLM server or one with the same interface"
            )
        if self.teacher.endpoint:
            return
        kwargs = self.teacher.engine.engine_kwargs
        limit, mode = kwargs.get("max_logprobs", top_k), kwargs.get("logprobs_mode", "raw_logprobs")
        if not isinstance(limit, int):
            raise UserError(f"teacher.engine.engine_kwargs.max_logprobs: should be an integer, not {limit!r}")
        if limit != -1 and limit < top_k:
            raise UserError(
                f"arm {arm!r}: targets.top_k={top_k} is above teacher.engine.engine_kwargs.max_logprobs={limit}: "
                "lower top_k or remove max_logprobs"
            )
        if mode != "raw_logprobs":
            raise UserError(
                f"arm {arm!r}: teacher.engine.engine_kwargs.logprobs_mode must be raw_logprobs, not {mode!r}, because "
                "soft targets are the model's distribution before temperature and top-p: remove logprobs_mode"
            )

    @property
    def strategies(self) -> dict[str, Strategy]:
        """The built-in and the experiment's own strategies, by name."""
        return BUILT_IN | self.prompt.strategies

    def arm(self, name: str, point: Mapping[str, Any] = MappingProxyType({})) -> "Arm":
        """Return an arm with its overrides applied.

        Args:
            name: the arm's name.
            point: values of searched fields by dotted path; they are applied after the overrides.

        Raises:
            UserError: if a value or a combination is not valid.
        """
        whose = f"arm {name!r}" + (f" at {format_hparams(point)}" if point else "")
        for path in flatten_arm(name, self.arms[name]):
            if not _may_vary_by_arm(path):
                raise UserError(
                    f"arm {name!r} overrides {path!r}, but arms share problems, models and evaluation: override only "
                    f"fields of {', '.join(ARM_SECTIONS)}"
                )
        try:
            arm = self._build_arm(name, point)
        except ValidationError as error:
            raise UserError(f"{whose}: {format_validation_error(error, Arm)}") from None
        if arm.prompt.strategy not in self.strategies:
            raise UserError(
                f"{whose}: unknown strategy {arm.prompt.strategy!r}"
                f"{did_you_mean(arm.prompt.strategy, self.strategies)}; known: "
                f"{', '.join(sorted(self.strategies))}; add your own under prompt.strategies"
            )
        if arm.targets.kind == "top_k":
            self._check_soft_targets(name, arm.targets.top_k)
        return arm

    def _build_arm(self, name: str, point: Mapping[str, Any]) -> "Arm":
        tree: dict[str, Any] = {key: getattr(self, key).model_dump() for key in Arm.model_fields}
        # `targets: {kind: top_k}` means the same as `targets.kind: top_k`: it keeps the section's other fields.
        for path, value in [*flatten(self.arms[name], ""), *flatten(dict(point), "")]:
            set_path(tree, path, value)
        return Arm.model_validate(tree)


class Arm(ConfigModel):
    """The sections of an experiment from which the trials of one arm are made."""

    teacher: Teacher
    student: Student
    prompt: Prompt
    targets: Targets
    loss: Loss
    train: Train

    @property
    def needs_teacher(self) -> bool:
        """Whether the arm uses the teacher: to write completions, or to score the tokens of other sequences."""
        return self.targets.source == "teacher" or self.targets.kind == "top_k"

    @property
    def warmup(self) -> "Arm | None":
        """The arm during its warm-up rounds on the reference solutions; None if it has no warm-up rounds."""
        if self.targets.source != "student" or not self.targets.warmup_rounds:
            return None
        return self.model_copy(update={"targets": self.targets.model_copy(update={"source": "reference"})})

    @property
    def divergence(self) -> str:
        """The divergence, with the default for `loss.divergence: null`."""
        return self.loss.divergence or ("reverse_kl" if self.targets.source == "student" else "forward_kl")


def _may_vary_by_arm(path: str) -> bool:
    """Return whether arms may differ in a field."""
    return any(path == section or path.startswith(section + ".") for section in ARM_SECTIONS)


def affects_teacher(path: str) -> bool:
    """Return whether a field or a section of an arm determines the requests to the teacher."""
    return any(f"{field}.".startswith(f"{path}.") or f"{path}.".startswith(f"{field}.") for field in TEACHER_FIELDS)


def _is_under(location: tuple[int | str, ...], path: str) -> bool:
    return ".".join(map(str, location)).startswith(path)
