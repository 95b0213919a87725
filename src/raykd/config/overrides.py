"""Dotted paths into the configuration tree, such as `train.learning_rate`."""

from collections.abc import Iterator, Mapping
from typing import Any

from raykd.config.errors import one_line
from raykd.errors import UserError


def flatten(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their dotted paths; an empty mapping yields nothing.

    Args:
        tree: nested mappings.
        path: the dotted path of `tree`; empty for the root.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def format_hparams(point: Mapping[str, Any]) -> str:
    """Return a point of a sweep on one line, such as `train.learning_rate=0.0002, train.epochs=2`."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in point.items()
    )


def all_paths(tree: Any, path: str) -> list[str]:
    """Return the dotted paths of all fields and sections of a tree.

    Args:
        tree: nested mappings.
        path: the dotted path of `tree`; empty for the root.
    """
    paths = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            paths += all_paths(value, f"{path}.{key}" if path else key)
    return paths


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of nested mappings, and create the missing mappings.

    Raises:
        UserError: if the path leads through a value that is not a mapping.
    """
    # The key of an axis in sweep.space is itself a dotted path.
    axis = path.removeprefix("sweep.space.")
    *parents, last = path.split(".") if axis == path else ("sweep", "space", axis)
    for depth, parent in enumerate(parents):
        # In YAML an empty section, such as `prompt:`, is null.
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            parent_path = ".".join(parents[: depth + 1])
            raise UserError(one_line(f"{path}: {parent_path} is a value and has no keys below it"))
    tree[last] = value
