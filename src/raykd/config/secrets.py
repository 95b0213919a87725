"""Secrets: what in a configuration looks like one, and is therefore refused.

The configuration is written into the experiment's folder and its report, and Ray shows the environment of its workers
on the dashboard. Secrets belong into the environment of the cluster's nodes.
"""

import re
from collections.abc import Iterator
from typing import Any

# Names of settings that hold secrets.
_NAME = re.compile(
    r"secret|passw|passphrase|credential|authorization|bearer|cookie|token$|pwd$|connection_?string"
    r"|(?:api|access|private|account|storage|signing|encryption)[_-]?key|(?:^|[_-])(?:pat|auth|keys?|sas|dsn)$",
    re.IGNORECASE,
)
# User and password in an address, and the forms of well-known keys.
_VALUE = re.compile(
    r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)"
    r"|(?<![A-Za-z0-9])(?:[spr]k-[A-Za-z0-9_-]{8,}|hf_[A-Za-z0-9]{8,}|gh[opsur]_[A-Za-z0-9]{8,}|github_pat_\w{8,}"
    r"|A[KS]IA[A-Z0-9]{12,}|AIza[\w-]{20,}|xox[a-z]-[\w-]{8,}|eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*|(?<=Bearer )\S+"
)
# Prefixes of environment variables that configure an engine's libraries. All others are refused, because a list of the
# names of secrets is never complete.
_ENGINE_VARIABLES = (
    *("VLLM_", "RAY_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "FLASHINFER_", "FLASH_ATTN", "XFORMERS_"),
    *("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_", "NVTE_", "HIP_", "ROCR_", "ROCM_"),
    *("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "MPI_", "OMPI_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "DNNL_"),
    *("HSA_", "ONEDNN_", "NUMEXPR_", "MALLOC_", "LD_", "PYTHON", "XDG_", "LC_", "AWS_REGION", "AWS_DEFAULT_REGION"),
)
_ENGINE_VARIABLE_NAMES = ("PATH", "LANG", "TZ", "TMPDIR", "HOME", "USER")
MASK = "(secret)"


def is_secret_name(name: str) -> bool:
    """Return whether a setting with this name holds a secret, as `aws_secret_access_key` does."""
    return _NAME.search(name) is not None


def is_engine_variable(name: str) -> bool:
    """Return whether an environment variable is a known setting of an engine's libraries, and no secret."""
    is_known = name.startswith(_ENGINE_VARIABLES) or name in _ENGINE_VARIABLE_NAMES
    return is_known and not is_secret_name(name)


def mask_secrets(text: str) -> str:
    """Return a text with `(secret)` for what has the form of a key, or is the user and the password of an address."""
    return _VALUE.sub(MASK, text)


def find_secret(tree: Any) -> str | None:
    """Return the dotted path of the first text in nested mappings and lists that has the form of a secret."""
    return next((path for path, _, text in _texts(tree, "", "") if _VALUE.search(text)), None)


def find_secret_name(tree: Any, path: str) -> str | None:
    """Return the dotted path of the first text whose key says that it holds a secret.

    Args:
        tree: nested mappings and lists.
        path: the dotted path of `tree`.
    """
    return next((place for place, name, _ in _texts(tree, path, "") if is_secret_name(name)), None)


def _texts(tree: Any, path: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted path, the key and the text of each text; the items of a list have the list's key."""
    if isinstance(tree, str):
        yield path, name, tree
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, child in children:
        yield from _texts(child, f"{path}.{key}" if path else str(key), str(key) if isinstance(tree, dict) else name)
