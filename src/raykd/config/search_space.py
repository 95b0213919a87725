"""Search space: the values that a sweep may choose for one field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import model_validator

from raykd.config.base import ConfigModel
from raykd.errors import UserError
from raykd.storage import hashing


class Axis(ConfigModel):
    """The values of one searched field. Set exactly one of these; the names are those of Ray Tune."""

    grid: tuple[Any, ...] = ()
    """List of values; every one is combined with every sampled point. Not with `search: optuna`."""
    choice: tuple[Any, ...] = ()
    """List of values, from which one is sampled for each point."""
    uniform: tuple[float, float] | None = None
    """Bounds [low, high] of a number with a uniform distribution."""
    loguniform: tuple[float, float] | None = None
    """Bounds [low, high] of a number whose logarithm has a uniform distribution. Both are above 0."""
    randint: tuple[int, int] | None = None
    """Bounds [low, high) of an integer; high is excluded."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        names = list(type(self).model_fields)
        given_names = [name for name in names if getattr(self, name)]
        if len(given_names) != 1:
            found = ", ".join(given_names) or "none"
            raise UserError(f"has {found} with values: set exactly one of {', '.join(names)}")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and bounds[0] >= bounds[1]:
            raise UserError(
                f"{given_names[0]}=[{bounds[0]:g}, {bounds[1]:g}]: the first bound must be below the second"
            )
        if self.loguniform and self.loguniform[0] <= 0:
            raise UserError(f"loguniform=[{self.loguniform[0]:g}, ...]: both bounds must be above 0")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values to validate: all listed values, or both ends of a range and one value between them."""
        if self.randint:
            return self.randint[0], self.randint[1] - 1
        if bounds := self.uniform or self.loguniform:
            # The value between them is not an integer, so that validation refuses a field that takes integers only.
            return *bounds, bounds[0] + (bounds[1] - bounds[0]) / math.e
        return self.grid or self.choice

    @property
    def values(self) -> Sequence[Any]:
        """All values of a finite axis; empty for a range of floats."""
        return range(*self.randint) if self.randint else self.grid or self.choice


def hparams_key(values: Mapping[str, Any]) -> str:
    """Return the id of a point of a search: 8 hexadecimal digits, distinct for distinct values."""
    return hashing.content_key(dict(values))[:8]
