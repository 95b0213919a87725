"""Dotted paths into the configuration tree, such as `train.learning_rate`."""

from collections.abc import Iterator, Mapping
from typing import Any

from raykd.display import display
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
    if arm := _arm_of_path(tree, path):
        # An override of an arm replaces what the arm has there, however it is written.
        field = path.removeprefix(f"arms.{arm}.")
        kept = flatten_arm(arm, tree["arms"][arm])
        kept = {other: each for other, each in kept.items() if not f"{other}.".startswith(f"{field}.")}
        tree["arms"][arm] = {**kept, field: value}
        return
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
            raise UserError(display(f"{path}: {parent_path} is a value and has no keys below it"))
    tree[last] = value


def flatten_arm(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return an arm's overrides by dotted path; `targets: {kind: top_k}` is `targets.kind: top_k`.

    Args:
        name: the arm's name.
        overrides: its section of the configuration.

    Raises:
        UserError: if a field occurs twice.
    """
    fields: dict[str, Any] = {}
    for path, value in flatten(overrides, ""):
        if path in fields:
            raise UserError(f"arm {name!r}: {path} occurs twice, as a dotted path and in a section: remove one")
        fields[path] = value
    return fields


def _arm_of_path(tree: Mapping[str, Any], path: str) -> str:
    """Return the name of the existing arm that a path such as `arms.NAME.train.epochs` leads into; empty for none."""
    arms = tree.get("arms")
    if not path.startswith("arms.") or not isinstance(arms, dict):
        return ""
    names = [name for name in arms if path.startswith(f"arms.{name}.") and isinstance(arms[name], dict)]
    return max(names, key=len, default="")
