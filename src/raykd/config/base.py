"""Base: the base class of all sections of the configuration, and the mark of runtime-only fields."""

from pydantic import BaseModel, ConfigDict

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names that become parts of paths and of applications' names: experiments, arms, strategies."""


class ConfigModel(BaseModel):
    """A section of the configuration. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RuntimeOnly:
    """The type of `RUNTIME_ONLY`."""

    def __repr__(self) -> str:
        return "RUNTIME_ONLY"


RUNTIME_ONLY = RuntimeOnly()
"""Marks a field that changes how a run is executed but not its results: `Annotated[int, RUNTIME_ONLY]`. No content key
includes such a field (`raykd.identity`); every other field is part of one."""


def is_runtime_only(section: type[ConfigModel], name: str) -> bool:
    """Return whether a field of a section is marked by `RUNTIME_ONLY`."""
    field = section.model_fields.get(name)
    return field is not None and any(isinstance(mark, RuntimeOnly) for mark in field.metadata)
