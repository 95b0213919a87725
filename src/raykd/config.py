"""Config: what an experiment is. One YAML file, one tree, frozen; unknown keys are refused."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from raykd import location
from raykd.faults import UserError
from raykd.mistakes import did_you_mean, explain, from_yaml, on_one_line
from raykd.sections import (
    NAME_PATTERN,
    Attention,
    Evaluate,
    Loss,
    Prices,
    Problems,
    Prompt,
    Section,
    Student,
    Sweep,
    Targets,
    Teacher,
    Train,
)
from raykd.space import Axis
from raykd.strategies import BUILT_IN, Strategy
from raykd.tree import RUNTIME_ONLY, is_runtime_only

UNTOUCHED = "untouched"
Tracker = Literal["mlflow", "wandb"]
# What may differ between arms. All else is shared, so that arms differ in nothing but what names them.
ARM_SECTIONS = (
    "teacher.sampling",
    "teacher.samples",
    "prompt.strategy",
    "targets",
    "loss",
    "student.lora",
    "train",
)
# Those fields of them that bear on what the teacher is asked.
ASKED = ("teacher.sampling", "teacher.samples", "prompt.strategy", "targets.sequence", "targets.kind", "targets.top_k")


class Experiment(Section):
    """One experiment: the tree that a YAML file holds."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the experiment's folder below `storage`: letters, digits, '.', '_' and '-'."""
    storage: Annotated[str, RUNTIME_ONLY] = "storage"
    """A folder that every node of the cluster sees, or a bucket: s3://, gs:// or abfs://BUCKET/PREFIX. Keys, and the
    address of another server than the cloud's, come from the environment of the nodes."""
    problems: Problems = Problems(num_train=1000, num_test=300)
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
        location.check(self.storage)
        if not self.arms:
            raise UserError("arms is empty: name at least one, such as `none: {}`")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds holds a seed twice: {list(self.seeds)}")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds should be between 0 and 2**32 - 1: {list(self.seeds)}")
        for name in self.arms:
            if not re.match(NAME_PATTERN, name) or name == UNTOUCHED:
                raise UserError(
                    f"arm name {name!r}: letters, digits, '.', '_' and '-' only, and not {UNTOUCHED!r}, "
                    "which is the student without an adapter and always there"
                )
        for name in self.arms:
            self.arm(name)
        return self

    @model_validator(mode="after")
    def _swept(self) -> Self:
        if self.sweep is None:
            return self
        if not self.problems.num_validation:
            raise UserError(
                "sweep: points are chosen by validation problems, which are cut from train: set problems.num_validation"
            )
        for path, axis in self.sweep.space.items():
            for name, overrides in self.arms.items():
                self._check_axis(path, axis, name, overrides)
        for name in self.arms:
            told = (self.sweep.scheduler, self.sweep.search)
            if self.arm(name).targets.sequence == "student" and told != ("none", "random"):
                raise UserError(
                    f"arm {name!r} learns from its own answers, in rounds that all students take in step, so none of "
                    "them can be stopped before the others, or chosen by what others reached: set "
                    "sweep.scheduler=none and sweep.search=random"
                )
        return self

    def _check_axis(self, path: str, axis: Axis, name: str, overrides: Mapping[str, Any]) -> None:
        """Raises UserError where a field cannot be searched, or not for an arm."""
        where = f"sweep.space.{path}"
        known = _paths(json.loads(self.arm(name).model_dump_json()), "")
        if path not in known or not _may_differ(path):
            can = [each for each in known if _may_differ(each)]
            raise UserError(
                f"{where}: no field in which arms may differ{did_you_mean(path, can)}; those are below "
                f"{', '.join(ARM_SECTIONS)}"
            )
        if is_runtime_only(Train, path.removeprefix("train.")):
            raise UserError(f"{where}: how a trial is carried out changes nothing of what it is; set it for all")
        if self.sweep and self.sweep.search == "optuna" and bears_on_the_teacher(path) and not axis.values:
            raise UserError(
                f"{where}: the teacher is asked before the first trial, so what optuna may choose of this must be "
                "listed: give choice, or set sweep.search=random"
            )
        if any(("targets.sequence", "student") in leaves({path: value}, "") for value in axis.extremes):
            raise UserError(f"{where}: a student's own answers are trained on in rounds; make it an arm of its own")
        for named, _ in leaves(overrides, ""):
            if f"{named}.".startswith(f"{path}.") or f"{path}.".startswith(f"{named}."):
                raise UserError(f"{where}: arm {name!r} sets {named}; what is searched is not set by an arm")
        for value in axis.extremes:
            try:
                self._arm(name, {path: value})
            except ValidationError as error:
                # What does not go with other fields may go with other values of those.
                if any(each["loc"] and _is_below(each["loc"], path) for each in error.errors()):
                    raise UserError(f"{where}: {explain(error, Arm)}") from None

    def _teacher_gives(self, arm: str, top_k: int) -> None:
        """Raises UserError where the teacher cannot give an arm's soft targets, or its engine is told not to."""
        if self.teacher.is_sent_messages:
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
        whose = f"arm {name!r}" + (f" at {shown(point)}" if point else "")
        for path, _ in leaves(self.arms[name], ""):
            if not _may_differ(path):
                raise UserError(
                    f"arm {name!r} overrides {path!r}; arms may differ in {', '.join(ARM_SECTIONS)} only, "
                    "for they share problems, models and evaluation"
                )
        try:
            arm = self._arm(name, point)
        except ValidationError as error:
            raise UserError(f"{whose}: {explain(error, Arm)}") from None
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
        for path, value in [*leaves(self.arms[name], ""), *leaves(dict(point), "")]:
            set_path(tree, path, value)
        return Arm.model_validate(tree)


class Arm(Section):
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
        return self.targets.sequence == "teacher" or self.targets.kind == "top_k"

    @property
    def warmup(self) -> "Arm | None":
        """The arm in its warm-up rounds, on the reference solutions; None where it has none."""
        if self.targets.sequence != "student" or not self.targets.warmup_rounds:
            return None
        return self.model_copy(update={"targets": self.targets.model_copy(update={"sequence": "reference"})})

    @property
    def divergence(self) -> str:
        """The divergence that is trained with."""
        return self.loss.divergence or ("reverse_kl" if self.targets.sequence == "student" else "forward_kl")


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted path, below `path`; an empty mapping says nothing."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def shown(point: Mapping[str, Any]) -> str:
    """A point of a sweep on one line."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in point.items()
    )


def _may_differ(path: str) -> bool:
    """Whether arms may differ in a field."""
    return any(path == section or path.startswith(section + ".") for section in ARM_SECTIONS)


def bears_on_the_teacher(path: str) -> bool:
    """Whether a field or a section of an arm bears on what the teacher is asked."""
    return any(f"{each}.".startswith(f"{path}.") or f"{path}.".startswith(f"{each}.") for each in ASKED)


def _paths(tree: Any, path: str) -> list[str]:
    """The dotted paths of all fields and sections of a tree."""
    found = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += _paths(value, f"{path}.{key}" if path else key)
    return found


def _is_below(location: tuple[int | str, ...], path: str) -> bool:
    return ".".join(map(str, location)).startswith(path)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Reads an experiment from a YAML file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; the values are read as YAML.

    Raises:
        UserError: with the file, the key, and the way out.
    """
    try:
        text = (Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8")
        tree = from_yaml(text)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file; `configs/` holds experiments to start from") from None
    except OSError as error:
        raise UserError(on_one_line(f"{path}: cannot be read: {error.strerror or error}")) from None
    except ValueError as error:
        raise UserError(on_one_line(f"{path}: {error}")) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for an experiment") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: an experiment is a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: write key.path=value")
        try:
            told = from_yaml(value)
        except (UserError, RecursionError):
            raise UserError(f"override {override!r}: the value is not YAML") from None
        set_path(tree, key, told)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Experiment)}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for an experiment") from None


def dump(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(json.loads(experiment.model_dump_json()), sort_keys=False, allow_unicode=True)


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets `value` at a dotted path of nested mappings, making those that are missing."""
    # An axis of a sweep has the dotted name of the field that it is over.
    axis = path.removeprefix("sweep.space.")
    *parents, last = path.split(".") if axis == path else ("sweep", "space", axis)
    for depth, parent in enumerate(parents):
        # `prompt:` with nothing after it is null in YAML, and stands for an empty section.
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            value_at = ".".join(parents[: depth + 1])
            raise UserError(on_one_line(f"{path}: {value_at} is a value and has no keys below it"))
    tree[last] = value
