"""Tree: what all parts of a configuration have in common."""

from pydantic import BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """A part of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RuntimeOnly:
    """The type of `RUNTIME_ONLY`."""

    def __repr__(self) -> str:
        return "RUNTIME_ONLY"


RUNTIME_ONLY = RuntimeOnly()
"""Marks a field that changes how a run is carried out but none of its results: `Annotated[int, RUNTIME_ONLY]`. Such a
field is in no key (`raykd.identity`); every other field is."""


def is_runtime_only(section: type[ConfigModel], name: str) -> bool:
    """Return whether a field of a section is marked by `RUNTIME_ONLY`."""
    field = section.model_fields.get(name)
    return field is not None and any(isinstance(each, RuntimeOnly) for each in field.metadata)
