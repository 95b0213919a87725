"""Load an experiment from YAML with command-line overrides, and dump it back."""

import json
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import ValidationError

from raykd.config.errors import format_validation_error
from raykd.config.experiment import Experiment
from raykd.config.overrides import set_path
from raykd.config.parsing import parse_yaml
from raykd.config.secrets import mask_secrets
from raykd.display import display
from raykd.errors import UserError


def load_experiment(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """Load an experiment from a YAML file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings; the values are parsed as YAML.

    Raises:
        UserError: with the file, the key and the remedy.
    """
    try:
        text = (Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8")
        tree = parse_yaml(text)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; run `raykd init` to write one, or name a shipped one (`raykd --help` lists them)"
        ) from None
    except OSError as error:
        raise UserError(display(f"{path}: cannot be read: {error.strerror or error}")) from None
    except ValueError as error:
        raise UserError(display(f"{path}: {error}")) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: should be a mapping of keys, not {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        shown = display(mask_secrets(override), limit=100)
        if not equals or not key:
            raise UserError(f"override {shown!r}: write key.path=value")
        try:
            parsed = parse_yaml(value, allow_comments=False)
        except UserError as error:
            raise UserError(display(f"override {shown!r}: {error}")) from None
        set_path(tree, key, parsed)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {format_validation_error(error, Experiment)}") from None
    except RecursionError:
        raise UserError(f"{path}: the YAML is nested too deeply") from None


def dump_experiment(experiment: Experiment) -> str:
    """Return an experiment as YAML with all defaults; `load_experiment` reads it back to an equal experiment."""
    return yaml.safe_dump(json.loads(experiment.model_dump_json()), sort_keys=False, allow_unicode=True)
