"""Content keys and digests: what identifies a configuration, a file or a model folder."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raykd.storage import filesystem

# A model's weights count into its fingerprint by content up to this many bytes, above that by their ends.
_FULL_DIGEST_BYTES = 64 << 20


def content_key(content: Mapping[str, Any]) -> str:
    """The name of what is wholly determined by `content` (JSON values): 20 hexadecimal digits of SHA-256."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text_digest(canonical)[:20]


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """What a model's folder or a data file holds, as a key; large files count by size and both ends.

    What a download leaves beside a model (hidden files, which hold times) and what describes it count for nothing.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_content(p, path))
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _FULL_DIGEST_BYTES:
                total.update(stream.read())
            else:
                total.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), os.SEEK_END)
                total.update(stream.read())
    return total.hexdigest()[:20]


def _is_content(file: Path, folder: Path) -> bool:
    return file.suffix != ".md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def file_digest(file: Path) -> str:
    """SHA-256 of what a file holds; of a folder read once for as long as it stays as it is."""
    if filesystem.is_remote(file):
        # Bit by bit: it may be the state of an optimizer.
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    state = file.stat()
    return _file_digest(file, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=1 << 16)
def _file_digest(file: Path, *_: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
