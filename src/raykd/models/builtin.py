"""Names and folders of the built-in models."""

from pathlib import Path

MODELS: dict[str, Path] = {
    "raykd/demo-teacher": Path(__file__).parents[1] / "demo" / "models" / "teacher",
    "raykd/demo-student": Path(__file__).parents[1] / "demo" / "models" / "student",
}
"""Folders of the built-in models by name."""


def resolve_model(name: str) -> str:
    """Return the folder of a built-in model; any other name unchanged."""
    return str(MODELS[name]) if name in MODELS else name
