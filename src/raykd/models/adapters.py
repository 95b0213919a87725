"""Check a LoRA adapter folder before it is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from raykd.errors import UserError
from raykd.storage import files, filesystem, hashing

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# With these fields peft imports modules, or reads other files, that the configuration names.
_CODE_FIELDS = ("auto_mapping", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")


def adapter_digest(folder: Path) -> str:
    """Return the digest of an adapter's configuration and weights: 20 hexadecimal digits.

    Raises:
        UserError: if one of the two files is missing.
    """
    return hashing.content_key({file.name: hashing.file_digest(file) for file in _files(folder)})


def check_digest(folder: Path, digest: str) -> None:
    """Check that an adapter is the one that was trained.

    Args:
        folder: the adapter in peft's format.
        digest: its digest after training.

    Raises:
        UserError: if a file is missing or was modified.
    """
    if adapter_digest(folder) != digest:
        raise _invalid(folder, "was modified after it was trained")


def check_adapter(folder: Path, rank: int) -> None:
    """Check that a folder holds a LoRA adapter as raykd writes it.

    Weights are read as safetensors only: other formats can contain code.

    Args:
        folder: the adapter in peft's format.
        rank: rank of all pairs of matrices.

    Raises:
        UserError: the folder differs from that; the message names the file.
    """
    config, weights = _files(folder)
    if unexpected := sorted(file.name for file in folder.iterdir() if file.name not in (CONFIG_FILE, WEIGHTS_FILE)):
        raise _invalid(folder / unexpected[0], "does not belong to an adapter")
    fields = files.read_json(config)
    for name, expected in (("peft_type", "LORA"), ("r", rank)):
        if fields.get(name) != expected:
            raise _invalid(config, f"{name} is {str(fields.get(name))[:40]!r}, not {expected!r}")
    for name in _CODE_FIELDS:
        if fields.get(name):
            raise _invalid(config, f"{name} is set")
    try:
        with filesystem.local_copy(weights) as local, safe_open(local, framework="np") as file:
            shapes = {name: _shape(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise _invalid(weights, f"is damaged ({error})") from None
    if not shapes:
        raise _invalid(weights, "holds no tensor")
    for name, shape in shapes.items():
        kind, other_kind = ("lora_A", "lora_B") if "lora_A" in name else ("lora_B", "lora_A")
        partner = shapes.get(name.replace(kind, other_kind))
        # A is (rank, inputs), B is (outputs, rank).
        actual_rank = shape[0] if kind == "lora_A" else shape[-1]
        if kind not in name or partner is None or len(shape) != 2 or actual_rank != rank:
            raise _invalid(weights, f"{name[:80]!r} {list(shape)} is not half of a pair of rank {rank}")


def _files(folder: Path) -> tuple[Path, Path]:
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in files:
        if not file.is_file():
            raise _invalid(file, "is missing")
    return files


def _shape(tensor: Any) -> tuple[int, ...]:
    if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(tensor).all():
        raise ValueError("a tensor has values that are not finite floats")
    return tensor.shape


def _invalid(file: Path, problem: str) -> UserError:
    trial = next((parent for parent in file.parents if parent.parent.name == "trials"), file.parent)
    return UserError(f"{file}: {problem}; delete {trial} to train the student again")


# The values that vLLM accepts for `max_lora_rank`.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def padded_rank(rank: int) -> int:
    """Return the rank that vLLM reserves memory for: the next that it supports."""
    return next((supported for supported in LORA_RANKS if supported >= rank), rank)
