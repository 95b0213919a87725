"""Messages for invalid configurations: one line with the place in the tree, the problem and the remedy."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from raykd.config.secrets import mask_secrets
from raykd.display import display
from raykd.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
Record = TypeVar("Record")


def format_validation_error(error: ValidationError, model: type[BaseModel] | None) -> str:
    """Return one line with the dotted path, the problem and the remedy of each error.

    Args:
        error: the validation error.
        model: the model that was validated, for the names of its keys; None for a typed dictionary.
    """
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
            if model is not None:
                known = _sibling_keys(model, problem["loc"])
                message += f"{did_you_mean(str(problem['loc'][-1]), known)}; known: {', '.join(known)}"
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] != "value_error":
            message = f"{message}, not {display(mask_secrets(repr(problem['input'])), limit=100)}"
        lines.append(f"{place}: {message}" if place else message)
    return display("; ".join(lines))


def validated(model: type[Model], tree: Any, where: str) -> Model:
    """Return a validated model.

    Args:
        model: the model's class.
        tree: its keys and values.
        where: the file and the section, with which the message begins.

    Raises:
        UserError: with each invalid field.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {format_validation_error(error, model)}") from None


def validated_dict(adapter: TypeAdapter[Record], tree: Any, where: str) -> Record:
    """Return a validated typed dictionary.

    Args:
        adapter: of the dictionary's type.
        tree: its keys and values.
        where: the file, with which the message begins.

    Raises:
        UserError: with each invalid field.
    """
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{where} is damaged: {format_validation_error(error, None)}") from None


def _sibling_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the known keys beside an unknown key.

    Args:
        model: the root of the tree.
        location: the keys down to the unknown key.
    """
    for part in location[:-1]:
        if field := model.model_fields.get(str(part)):
            # The section may be wrapped in Optional, a tuple or a mapping.
            types = [field.annotation, *get_args(field.annotation)]
            models = (kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel))
            model = next(models, model)
    return sorted(model.model_fields)


def did_you_mean(word: str, known: Iterable[str] | Mapping[str, Any]) -> str:
    """Return the most similar known word as a question to append; empty if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
