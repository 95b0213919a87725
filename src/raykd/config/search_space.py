"""Space: how one field of a sweep is chosen."""

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from raykd.config.base import ConfigModel
from raykd.errors import UserError
from raykd.storage import hashing


class Axis(ConfigModel):
    """The values that a field may take: exactly one of the ways below, by Ray Tune's names for them."""

    grid: tuple[Any, ...] = ()
    """Every one of these, at every point that is drawn of the other fields."""
    choice: tuple[Any, ...] = ()
    """One of these, drawn for each point."""
    uniform: tuple[float, float] | None = None
    """A number from the first to the second."""
    loguniform: tuple[float, float] | None = None
    """A number whose logarithm is uniform, from the first to the second, both above 0."""
    randint: tuple[int, int] | None = None
    """A whole number from the first up to, and without, the second."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in type(self).model_fields if getattr(self, name)]
        if len(ways) != 1:
            names = ", ".join(type(self).model_fields)
            raise UserError(f"give exactly one of {names}, and values to it, not {', '.join(ways) or 'none'}")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and bounds[0] >= bounds[1]:
            raise UserError(f"{ways[0]} [{bounds[0]:g}, {bounds[1]:g}]: the first must be below the second")
        if self.loguniform and self.loguniform[0] <= 0:
            raise UserError(f"loguniform [{self.loguniform[0]:g}, ...]: both must be above 0")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that must all be legal: those that are listed, or both ends of a range and one between them."""
        if self.randint:
            return self.randint[0], self.randint[1] - 1
        if bounds := self.uniform or self.loguniform:
            # No whole number, so that a field which takes nothing else is told apart.
            return *bounds, bounds[0] + (bounds[1] - bounds[0]) / math.e
        return self.grid or self.choice

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, of a way that has finitely many."""
        return tuple(range(*self.randint)) if self.randint else self.grid or self.choice


def hparams_key(values: Mapping[str, Any]) -> str:
    """The name of a point of a search: the same for equal values only, however alike they look."""
    return hashing.content_key(dict(values))[:8]
