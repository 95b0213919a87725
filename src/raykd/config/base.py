"""Base: the base class of all sections of the configuration, and the mark of runtime-only fields."""

from pathlib import Path

from pydantic import AfterValidator, BaseModel, ConfigDict

from raykd.errors import UserError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names that become parts of paths and of applications' names: experiments, arms, strategies."""


class ConfigModel(BaseModel):
    """A section of the configuration. It is immutable and rejects unknown keys and numbers that are not finite, which
    JSON cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _expand_home(path: str | None) -> str | None:
    """Return a path with the home folder for a leading `~`, as a shell would.

    Raises:
        UserError: if the path is empty, or names a user that does not exist.
    """
    if path is None:
        return None
    if not path.strip():
        raise UserError("is empty: give a path or a name")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise UserError(f"{path.partition('/')[0]!r} is no user's home folder here: write the whole path") from None


EXPAND_HOME = AfterValidator(_expand_home)
"""Marks a field that may hold a local path: `Annotated[str, EXPAND_HOME]`."""


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
