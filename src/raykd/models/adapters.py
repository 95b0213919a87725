"""Check a LoRA adapter folder before it is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from raykd.errors import UserError
from raykd.storage import files, filesystem

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# By these peft would import modules, or look into other files, that a configuration names.
_CODE_FIELDS = ("auto_mapping", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config")


def check_adapter(folder: Path, rank: int) -> None:
    """Raises UserError where a folder does not hold a LoRA adapter of a rank as raykd writes it, naming the file.

    Weights are read as safetensors only: other formats can hold code.

    Args:
        folder: in peft's format.
        rank: of every pair of matrices.
    """
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config, weights):
        if not file.is_file():
            raise _invalid(file, "is not there")
    if strange := sorted(file.name for file in folder.iterdir() if file.name not in (CONFIG_FILE, WEIGHTS_FILE)):
        raise _invalid(folder / strange[0], "does not belong there")
    told = files.read_json(config)
    for name, wanted in (("peft_type", "LORA"), ("r", rank)):
        if told.get(name) != wanted:
            raise _invalid(config, f"{name} is {str(told.get(name))[:40]!r}, not {wanted!r}")
    for name in _CODE_FIELDS:
        if told.get(name):
            raise _invalid(config, f"{name} is set")
    try:
        with filesystem.local_copy(weights) as local, safe_open(local, framework="np") as file:
            shapes = {name: _shape(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise _invalid(weights, f"is damaged ({error})") from None
    if not shapes:
        raise _invalid(weights, "holds nothing")
    for name, shape in shapes.items():
        first, second = ("lora_A", "lora_B") if "lora_A" in name else ("lora_B", "lora_A")
        pair = shapes.get(name.replace(first, second))
        # A is rank x inputs, B outputs x rank.
        inner = shape[0] if first == "lora_A" else shape[-1]
        if first not in name or pair is None or len(shape) != 2 or inner != rank:
            raise _invalid(weights, f"{name[:80]!r} {list(shape)} is no half of a pair of rank {rank}")


def _shape(tensor: Any) -> tuple[int, ...]:
    if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(tensor).all():
        raise ValueError("not all of it is finite numbers")
    return tensor.shape


def _invalid(file: Path, why: str) -> UserError:
    return UserError(f"{file}: {why}; delete {file.parent.parent}, and the student is trained anew")


# vLLM makes room for adapters of these ranks only.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def padded_rank(rank: int) -> int:
    """The rank that vLLM makes room for."""
    return next((each for each in LORA_RANKS if each >= rank), rank)
