"""Mistakes: what is wrong with a configuration, in one line that names the place and the way out."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from raykd.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def format_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One line that names each place in the tree, what is wrong there, and the way out."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _sibling_keys(model, problem["loc"])
            message = f"unknown key{did_you_mean(str(problem['loc'][-1]), known)}; known: {', '.join(known)}"
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] != "value_error":
            message = f"{message}, not {problem['input']!r}"
        lines.append(f"{place}: {message}" if place else message)
    return one_line("; ".join(lines))


def validated(model: type[Model], tree: Any, where: str) -> Model:
    """Return a model of a tree that a user may have written.

    Args:
        model: what the tree should be.
        tree: keys and values.
        where: the file and the section, for the message.

    Raises:
        UserError: with each place in the tree that is wrong.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {format_validation_error(error, model)}") from None


def parse_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        UserError: where it is none; PyYAML has other errors too, for a day that no month has or a number too long.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None


def one_line(text: str) -> str:
    """A text with what cannot be seen, such as the end of a line, as it is written in code."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _sibling_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that stand where an unknown one was found."""
    for part in location[:-1]:
        if field := model.model_fields.get(str(part)):
            # The section itself, or what an optional one, a tuple or a mapping holds.
            types = [field.annotation, *get_args(field.annotation)]
            model = next((each for each in types if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return sorted(model.model_fields)


def did_you_mean(word: str, known: Iterable[str] | Mapping[str, Any]) -> str:
    """The nearest known word, as a question to append; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
