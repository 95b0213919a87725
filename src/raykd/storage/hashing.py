"""Content keys and digests of configurations, files and model folders."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raykd.storage import filesystem

# A larger file is fingerprinted by its size and both ends only, because hashing the weights of a model takes minutes.
_FULL_DIGEST_BYTES = 64 << 20


def content_key(content: Mapping[str, Any]) -> str:
    """Return the content key of JSON values: the first 20 hexadecimal digits of their SHA-256 digest."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text_digest(canonical)[:20]


def text_digest(text: str) -> str:
    """Return the SHA-256 digest of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Return a key for the content of a model's folder or of a data file.

    Files above 64 MiB count by their size and both ends. Hidden files (a download leaves some, with timestamps) and
    Markdown files do not count.
    """
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and _is_content(file, path))
    )
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
    """Return the SHA-256 digest of a file. A local file is read again only after its size, time or inode changed."""
    if filesystem.is_remote(file):
        # Streamed, because the file may be an optimizer state that does not fit into memory.
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    state = file.stat()
    return _file_digest(file, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=1 << 16)
def _file_digest(file: Path, *_: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
