"""Names and folders of the built-in models."""

from pathlib import Path

MODELS: dict[str, Path] = {
    "raykd/demo-teacher": Path(__file__).parents[1] / "demo" / "models" / "teacher",
    "raykd/demo-student": Path(__file__).parents[1] / "demo" / "models" / "student",
}
"""The built-in models' names, and the folders where they lie."""


def resolve_model(name: str) -> str:
    """The folder of a built-in model; any other name is returned as it is."""
    return str(MODELS[name]) if name in MODELS else name
