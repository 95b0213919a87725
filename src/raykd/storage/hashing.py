"""Content keys and digests of configurations, files and model folders."""

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from raykd.storage import filesystem

# The digests of larger files are kept on disk.
_CACHED_BYTES = 64 << 20
# hashlib releases the interpreter's lock.
_NUM_READERS = 8


def content_key(content: Mapping[str, Any]) -> str:
    """Return the content key of JSON values: the first 20 hexadecimal digits of their SHA-256 digest."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text_digest(canonical)[:20]


def text_digest(text: str) -> str:
    """Return the SHA-256 digest of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Return a key for the whole content of a model's folder or of a data file.

    Hidden files (a download leaves some, with timestamps) and Markdown files do not count. Files are read in parallel,
    and a large file only once (`file_digest`).
    """
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_content(file, path))
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        digests = list(pool.map(file_digest, files))
    total = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        total.update(f"{file.relative_to(path)}\0{digest}\0".encode())
    return total.hexdigest()[:20]


def _is_content(file: Path, folder: Path) -> bool:
    return file.suffix != ".md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def file_digest(file: Path) -> str:
    """Return the SHA-256 digest of a file. A local file is read again only after its size, time or inode changed.

    The digests of files above 64 MiB are kept in the user's cache folder (`~/.cache/raykd`), since hashing the weights
    of a model takes from seconds to minutes.
    """
    if filesystem.is_remote(file):
        # Streamed, because the file may be an optimizer state that does not fit into memory.
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    state = file.stat()
    return local_digest(file, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def local_digest(file: Path, device: int, inode: int, size: int, mtime_ns: int) -> str:
    """Return the digest of a local file that is known by its device, inode, size and time of modification."""
    if size < _CACHED_BYTES:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    entry = _cache_folder() / text_digest(f"{device}/{inode}/{size}/{mtime_ns}")
    with suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", digest := entry.read_text()):
            return digest
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file that was written less than two seconds ago may change again within the resolution of its time.
    if time.time_ns() - mtime_ns > 2e9:
        with suppress(OSError):
            filesystem.put(entry, digest.encode())
    return digest


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "raykd" / "digests"
