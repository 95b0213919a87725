"""Variants: all that is trained on: every arm, at every point of the sweep where there is one."""

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
# Between an arm's name and that of a point; it is in neither.
POINT_SEPARATOR = "@"


@dataclass(frozen=True)
class Variant:
    """An arm at a point of the sweep: what its trials have in common but for the seed."""

    arm_name: str
    arm: Arm
    hparams: Hparams = field(default_factory=dict)
    """The searched fields by dotted path, without those that play no part in the arm."""

    @property
    def config_id(self) -> str:
        """What it is called."""
        return self.arm_name + (f"{POINT_SEPARATOR}{hparams_key(self.hparams)}" if self.hparams else "")


def variants(experiment: Experiment, drawn: Mapping[str, Sequence[Hparams]]) -> list[Variant]:
    """Every arm at every one of its points; without a sweep, as it stands.

    Points that differ in nothing that bears on an arm are one to it: a search over temperatures trains an arm with hard
    targets once.

    Args:
        experiment: the experiment.
        drawn: each arm's points (`raykd.tuning.searcher.known_points`).

    Raises:
        UserError: where a point and an arm do not go together.
    """
    if experiment.sweep is None:
        return [Variant(name, experiment.arm(name)) for name in experiment.arms]
    found = [variant_at(experiment, name, point) for name, points in drawn.items() for point in points]
    return list({each.config_id: each for each in found}.values())


def boundary_configs(experiment: Experiment) -> list[Variant]:
    """What bounds a search whose points are chosen by results: all that it may ask of the teacher, and the ends of the
    other fields, one at a time.

    Raises:
        UserError: where some of it and an arm do not go together.
    """
    space = experiment.sweep.space if experiment.sweep else {}
    asked = {path: axis.values for path, axis in space.items() if affects_teacher(path)}
    others = {path: axis.extremes for path, axis in space.items() if path not in asked}
    middle = {path: ends[0] for path, ends in others.items()}
    star = [middle, *({**middle, path: end} for path, ends in others.items() for end in ends)]
    found = [
        {**point, **dict(zip(asked, values, strict=True))}
        for values in itertools.product(*asked.values())
        for point in star
    ]
    return variants(experiment, dict.fromkeys(experiment.arms, found))


def variant_at(experiment: Experiment, name: str, point: Hparams) -> Variant:
    """An arm at a point.

    Raises:
        UserError: where they do not go together.
    """
    arm = experiment.arm(name, point)
    bearing = dict(overrides.flatten(identity.effective_config(arm), ""))
    # As they bear on it: two ways of saying one thing are one point.
    hparams = {path: bearing[path] for path, _ in overrides.flatten(point, "") if path in bearing}
    return Variant(name, arm, hparams)


def arms_by_config_id(variants: Iterable[Variant]) -> dict[str, Arm]:
    """What is trained on by name, and as `<name>/warmup` what those learn first that begin with something else."""
    arms = {each.config_id: each.arm for each in variants}
    begun = {f"{name}/warmup": arm.warmup for name, arm in arms.items() if arm.warmup}
    return {**arms, **begun}


def arm_of_config_id(lesson: str) -> str:
    """The arm that a lesson is of, with `/warmup` where it is what the arm begins with."""
    name, _, point = lesson.partition(POINT_SEPARATOR)
    return name + "/warmup" * point.endswith("/warmup")


def random_points(sweep: Sweep) -> list[Hparams]:
    """The points of a random search: the same for the same sweep, and for more samples the same and more."""
    space = {path: tune_domain(axis) for path, axis in sweep.space.items()}
    random = np.random.default_rng(sweep.seed)
    # One draw serves all combinations of the grids, so that they can be compared at equal values of the rest.
    drawn = [
        {path: _plain(value) for path, value in point.items()}
        for _ in range(sweep.num_samples)
        for point in compat.draw_points(space, random)
    ]
    return list({hashing.content_key(point): point for point in drawn}.values())


def tune_domain(axis: Axis) -> Any:
    """An axis in Ray Tune's terms."""
    if axis.grid:
        return tune.grid_search(axis.grid)
    if axis.choice:
        return tune.choice(list(axis.choice))
    if axis.uniform:
        return tune.uniform(*axis.uniform)
    if axis.loguniform:
        return tune.loguniform(*axis.loguniform)
    assert axis.randint, "an axis has one way"
    return tune.randint(*axis.randint)


def _plain(value: Any) -> Any:
    """A value without numpy's types, which neither JSON nor pydantic takes."""
    return value.item() if isinstance(value, np.generic) else value
