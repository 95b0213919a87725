"""Variants: the arms of an experiment with the hyperparameters of a sweep's points."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray import tune

from raykd import compat, identity
from raykd.config import overrides
from raykd.config.experiment import Arm, Experiment, affects_teacher
from raykd.config.search_space import Axis, hparams_key
from raykd.config.sections import Sweep
from raykd.storage import hashing

Hparams = dict[str, Any]
# Between an arm's name and a point's key; neither contains it.
POINT_SEPARATOR = "@"


@dataclass(frozen=True)
class Variant:
    """An arm at a point of the sweep; its trials differ in the seed only."""

    arm_name: str
    arm: Arm
    hparams: Hparams = field(default_factory=dict)
    """The searched fields by dotted path, limited to those that affect the arm."""

    @property
    def config_id(self) -> str:
        """The arm's name, followed by the point's key in a sweep."""
        return f"{self.arm_name}{POINT_SEPARATOR}{hparams_key(self.hparams)}" if self.hparams else self.arm_name


def variants(experiment: Experiment, points: Mapping[str, Sequence[Hparams]]) -> list[Variant]:
    """Return every arm at each of its points; without a sweep, the arms alone.

    Points that differ only in fields that do not affect an arm are one variant: a search over loss temperatures trains
    an arm with hard targets once.

    Args:
        experiment: the experiment.
        points: each arm's points (`raykd.tuning.searcher.known_points`).

    Raises:
        UserError: if a point is invalid for an arm.
    """
    if experiment.sweep is None:
        return [Variant(name, experiment.arm(name)) for name in experiment.arms]
    every = [variant_at(experiment, name, point) for name, arm_points in points.items() for point in arm_points]
    return list({variant.config_id: variant for variant in every}.values())


def boundary_configs(experiment: Experiment) -> list[Variant]:
    """Return the bounds of a search that depends on results, for checks before it starts.

    They hold every combination of the fields that affect the teacher, and the extremes of the other fields, one at a
    time.

    Args:
        experiment: the experiment.

    Raises:
        UserError: if one of them is invalid for an arm.
    """
    space = experiment.sweep.space if experiment.sweep else {}
    teacher_axes = {path: axis.values for path, axis in space.items() if affects_teacher(path)}
    other_extremes = {path: axis.extremes for path, axis in space.items() if path not in teacher_axes}
    center = {path: extremes[0] for path, extremes in other_extremes.items()}
    other_points = [center]
    for path, extremes in other_extremes.items():
        other_points += [{**center, path: value} for value in extremes]
    points = [
        {**point, **dict(zip(teacher_axes, values, strict=True))}
        for values in itertools.product(*teacher_axes.values())
        for point in other_points
    ]
    return variants(experiment, dict.fromkeys(experiment.arms, points))


def variant_at(experiment: Experiment, arm_name: str, point: Hparams) -> Variant:
    """Return an arm at a point.

    Args:
        experiment: the experiment.
        arm_name: the arm's name.
        point: the searched fields by dotted path.

    Raises:
        UserError: if the point is invalid for the arm.
    """
    arm = experiment.arm(arm_name, point)
    effective = dict(overrides.flatten(identity.effective_config(arm), ""))
    # Values of the effective configuration, not of the point: two spellings of one setting are one variant.
    hparams = {path: effective[path] for path, _ in overrides.flatten(point, "") if path in effective}
    return Variant(arm_name, arm, hparams)


def arms_by_config_id(variants: Iterable[Variant]) -> dict[str, Arm]:
    """Return the arms by config id; the warm-up of an on-policy arm has the id `<config id>/warmup`."""
    arms = {variant.config_id: variant.arm for variant in variants}
    warmups = {f"{config_id}/warmup": arm.warmup for config_id, arm in arms.items() if arm.warmup}
    return {**arms, **warmups}


def arm_of_config_id(config_id: str) -> str:
    """Return the name of a config id's arm, followed by `/warmup` for the config id of a warm-up."""
    name, _, point = config_id.partition(POINT_SEPARATOR)
    return f"{name}/warmup" if point.endswith("/warmup") else name


def random_points(sweep: Sweep) -> list[Hparams]:
    """Return the points of a random search. More samples only add points to those of fewer."""
    space = {path: tune_domain(axis) for path, axis in sweep.space.items()}
    random = np.random.default_rng(sweep.seed)
    # All combinations of the grids share a draw, so that they can be compared at equal values of the other fields.
    drawn = [
        {path: _plain(value) for path, value in point.items()}
        for _ in range(sweep.num_samples)
        for point in compat.draw_points(space, random)
    ]
    return list({hashing.content_key(point): point for point in drawn}.values())


def tune_domain(axis: Axis) -> Any:
    """Return an axis as a domain of Ray Tune."""
    if axis.grid:
        return tune.grid_search(axis.grid)
    if axis.choice:
        return tune.choice(list(axis.choice))
    if axis.uniform:
        return tune.uniform(*axis.uniform)
    if axis.loguniform:
        return tune.loguniform(*axis.loguniform)
    assert axis.randint, "an axis has exactly one kind"
    return tune.randint(*axis.randint)


def _plain(value: Any) -> Any:
    """Return a value as a Python type: JSON and pydantic reject numpy's types."""
    return value.item() if isinstance(value, np.generic) else value
