"""Dotted paths into the configuration tree, such as `train.learning_rate`."""

from collections.abc import Iterator, Mapping
from typing import Any

from raykd.config.errors import one_line
from raykd.errors import UserError


def flatten(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted path, below `path`; an empty mapping says nothing."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def format_hparams(point: Mapping[str, Any]) -> str:
    """A point of a sweep on one line."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in point.items()
    )


def all_paths(tree: Any, path: str) -> list[str]:
    """The dotted paths of all fields and sections of a tree."""
    found = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += all_paths(value, f"{path}.{key}" if path else key)
    return found


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets `value` at a dotted path of nested mappings, making those that are missing."""
    # An axis of a sweep has the dotted name of the field that it is over.
    axis = path.removeprefix("sweep.space.")
    *parents, last = path.split(".") if axis == path else ("sweep", "space", axis)
    for depth, parent in enumerate(parents):
        # `prompt:` with nothing after it is null in YAML, and stands for an empty section.
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            value_at = ".".join(parents[: depth + 1])
            raise UserError(one_line(f"{path}: {value_at} is a value and has no keys below it"))
    tree[last] = value
