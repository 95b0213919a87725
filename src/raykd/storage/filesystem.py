"""File system: local folders and buckets behind one `Path` interface, and atomic writes.

A local folder is a `pathlib.Path`. A folder in a bucket is a `upath.UPath`, which has the same methods and is typed as
a `Path`, so that no stage distinguishes the two. A UPath is not an `os.PathLike`: a library that opens files itself
fails at once, and needs `local_copy`, `local_dir` or `for_arrow`.

Every request to a bucket goes through one fsspec library for each kind of bucket, including those of Arrow, Ray Data,
Ray Train and Ray Tune. So credentials and custom endpoints are configured in one way. Only vLLM's engine loads adapters
through Ray's own client.
"""

import functools
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raykd.errors import UserError, as_user_error

# Concurrent requests to a bucket. A request takes tens of milliseconds, whatever the size of the file.
MAX_PARALLEL_REQUESTS = 32


@dataclass(frozen=True)
class _Store:
    """The fsspec library for a kind of bucket."""

    library: str
    extra: str
    options: dict[str, Any]
    """Options of its file system. Listings are not cached, because other processes write, too."""


STORES = {
    "s3": _Store("s3fs", "s3", {"use_listings_cache": False}),
    "gs": _Store("gcsfs", "gcs", {"use_listings_cache": False}),
    # By default adlfs connects anonymously.
    "abfs": _Store("adlfs", "azure", {"use_listings_cache": False, "anon": False}),
}
AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"


def check_uri(storage: str) -> None:
    """Refuse a `storage` that is neither a folder nor a supported bucket.

    Raises:
        UserError: with the reason; also if the URI holds credentials.
    """
    if "\0" in storage:
        raise UserError(f"storage {storage!r}: has a NUL character, which no path can have")
    if "://" not in storage:
        scheme = storage.partition(":/")[0]
        if scheme != storage and scheme in STORES:
            raise UserError(f"storage {storage!r}: write {scheme}://BUCKET/PREFIX, with two slashes")
        return
    scheme = storage.partition("://")[0]
    known = ", ".join(f"{name}://" for name in STORES)
    if scheme not in STORES:
        raise UserError(f"storage {scheme + '://'!r}: is not supported; use a folder that all nodes share, or {known}")
    if any(char in storage for char in "@?#"):
        # The message does not repeat the URI, which may hold credentials.
        raise UserError(
            f"storage {scheme}://…: write {scheme}://BUCKET/PREFIX and nothing else; set credentials and accounts in "
            "the environment of the cluster's nodes, because the configuration is written into the experiment's folder "
            "and its report"
        )
    if pattern := next((char for char in storage if char in "*[]{}"), None):
        # fsspec takes such a name for a pattern: to remove a file would remove the files of others that match.
        raise UserError(f"storage {storage!r}: a prefix cannot have the character {pattern!r}; choose another one")
    with as_user_error(f"storage {storage!r}", ValueError):
        split = urlsplit(storage)
    names = split.path.strip("/").split("/") if split.path.strip("/") else []
    if not split.netloc or any(name in ("", ".", "..") for name in names):
        raise UserError(f"storage {storage!r}: write {scheme}://BUCKET/PREFIX")


def resolve(storage: str) -> Path:
    """Return the storage folder of an experiment.

    Args:
        storage: the field of the configuration: a folder or the URI of a bucket.

    Raises:
        UserError: if the URI is not valid (`check_uri`), its library is not installed, or the environment lacks the
            name of the storage account.
    """
    check_uri(storage)
    if "://" not in storage:
        return Path(storage).absolute()
    scheme = storage.partition("://")[0]
    if scheme == "abfs" and not os.environ.get(AZURE_ACCOUNT):
        # Without this check a run would fail only at evaluation, when the engine loads the adapters.
        raise UserError(
            f"storage {storage!r}: set {AZURE_ACCOUNT} in the environment of every node to the storage account's name, "
            "which the engine needs to load adapters; a connection string is not enough"
        )
    store = STORES[scheme]
    if importlib.util.find_spec(store.library) is None:
        raise UserError(
            f"storage {storage!r}: {store.library} is not installed: pip install 'raykd[{store.extra}]' on every node"
        )
    # The import takes half a second, which local folders do not need.
    from upath import UPath

    path: Any = UPath(storage.rstrip("/"), **store.options)
    return path


def is_remote(path: Path) -> bool:
    """Return whether a path is in a bucket."""
    return not isinstance(path, Path)


def is_read_only(folder: Path) -> bool:
    """Return whether an existing local folder cannot be written; a bucket is not asked."""
    return not is_remote(folder) and folder.is_dir() and not os.access(folder, os.W_OK)


def for_arrow(path: Path) -> tuple[str, Any]:
    """Return a path and its file system for Arrow and Ray; the file system is None for a local path."""
    if not is_remote(path):
        return str(path), None
    # Imported late, so that an invalid configuration is reported quickly.
    from pyarrow import fs as arrow

    return _key(path), arrow.PyFileSystem(arrow.FSSpecHandler(_store(path)))


def for_engine(path: Path) -> tuple[str | None, str]:
    """Return where an engine of Ray Data LLM finds an adapter.

    Returns:
        The root of all adapters (None for a local path), and the adapter's name below it. Ray copies the adapter to the
        engine's node under that name, so it begins with the bucket's name to be unique.
    """
    if not is_remote(path):
        return None, str(path)
    scheme, key = str(path).partition("://")[0], _key(path)
    if scheme != "abfs":
        return f"{scheme}://", key
    container, _, name = key.partition("/")
    return f"azure://{container}@{os.environ.get(AZURE_ACCOUNT, '')}.blob.core.windows.net", name


def read_bytes(path: Path) -> bytes:
    """Return the content of a file."""
    return _store(path).cat_file(_key(path)) if is_remote(path) else path.read_bytes()


def read_all(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the contents of files in order; those of a bucket are requested concurrently."""
    if not paths or not is_remote(paths[0]):
        yield from (path.read_bytes() for path in paths)
        return
    for start in range(0, len(paths), MAX_PARALLEL_REQUESTS):
        chunk = paths[start : start + MAX_PARALLEL_REQUESTS]
        contents = _store(chunk[0]).cat([_key(path) for path in chunk])
        # Some versions of fsspec return the bytes of a single file without a dict.
        if isinstance(contents, dict):
            yield from (contents[_key(path)] for path in chunk)
        else:
            yield contents


def put(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    if is_remote(path):
        _store(path).pipe_file(_key(path), content)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def create(path: Path, content: bytes) -> bool:
    """Create a file in a bucket unless it exists.

    Returns:
        Whether the file was created. Of several concurrent calls exactly one creates it.
    """
    try:
        _store(path).pipe_file(_key(path), content, mode="create")
    except FileExistsError:
        return False
    except OSError:
        # Some stores answer concurrent requests with another error (S3: 409 ConditionalRequestConflict).
        if path.exists():
            return False
        raise
    return True


def replace(path: Path, content: bytes, state: str) -> bool:
    """Replace a file in a bucket if it has not changed.

    Atomic on S3; other stores check first and then write.

    Args:
        path: the file.
        content: its new content.
        state: the expected `file_state`.

    Returns:
        Whether the file was replaced.
    """
    try:
        if str(path).startswith("s3://"):
            _store(path).pipe_file(_key(path), content, IfMatch=f'"{state}"')
            return True
    except OSError:
        # An S3-compatible server without conditional writes fails likewise; then check and write as for other stores.
        if not _has_state(path, state):
            return False
    if not _has_state(path, state):
        return False
    put(path, content)
    return True


def _has_state(path: Path, state: str) -> bool:
    # One request, because the file may be deleted between an `exists` and a read.
    try:
        return file_state(path) == state
    except FileNotFoundError:
        return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary local file for a `with` block, which becomes `path` atomically when the block ends.

    Raises:
        OSError: with `path` as the file name.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            _store(path).put_file(str(temporary), _key(path))
        return
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        # Replace the temporary file's name, or a missing name.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        # The file does not exist if it was renamed or could not be created.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Yield an empty local folder for a `with` block, which becomes `path` when the block ends.

    In a bucket the files appear one by one, so write a marker afterwards that says that the folder is complete.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            remove(path)
            for file in list_files(Path(folder)):
                _store(path).put_file(str(file), f"{_key(path)}/{file.relative_to(folder).as_posix()}")
        return
    temporary = path.parent / f".tmp-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a local copy of a file for a `with` block; a local file itself."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        _store(path).get_file(_key(path), str(copy))
        yield copy


@contextmanager
def local_dir(path: Path) -> Iterator[Path]:
    """Yield a local copy of a folder for a `with` block; a local folder itself."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(folder) / path.name
        for key in _store(path).find(_key(path)):
            copy = copies / key.removeprefix(f"{_key(path)}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            _store(path).get_file(key, str(copy))
        yield copies


def scratch(folder: Path) -> Path:
    """Return a local folder for files that grow, such as logs, which a bucket does not support.

    Returns:
        A temporary folder of this process for a folder in a bucket; otherwise the folder itself.
    """
    return _private_folder() / _key(folder) if is_remote(folder) else folder


@functools.cache
def _private_folder() -> Path:
    """Return a new temporary folder, which only this user can read and whose name nobody knows before."""
    return Path(tempfile.mkdtemp(prefix="raykd-"))


def remove(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder and its content; in a bucket a missing folder is no error.

    Args:
        folder: the folder.
        ignore_errors: whether to suppress all errors of the file system.
    """
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with suppress(OSError if ignore_errors else FileNotFoundError):
        _store(folder).rm(_key(folder), recursive=True)


def list_files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted by path."""
    if not is_remote(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    return [folder / key.removeprefix(f"{_key(folder)}/") for key in sorted(_store(folder).find(_key(folder)))]


def list_dirs(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name."""
    if not is_remote(folder):
        return sorted(path for path in folder.glob("*/") if path.is_dir())
    return sorted(folder / _name(info) for info in _listed(folder) if info["type"] == "directory")


def find_in_subdirs(folder: Path, name: str) -> list[Path]:
    """Return the files called `name` in the direct subfolders of a folder, sorted by path."""
    if not is_remote(folder):
        return sorted(folder.glob(f"*/{name}"))
    return [subdir / name for subdir in list_dirs(folder) if (subdir / name).exists()]


def file_states(folder: Path) -> dict[str, str]:
    """Return the `file_state` of each file in a folder of a bucket, by file name."""
    return {_name(info): _file_state(info) for info in _listed(folder) if info["type"] == "file"}


def file_state(file: Path) -> str:
    """Return the state of a file in a bucket, such as its ETag, which changes with its content."""
    return _file_state(_store(file).info(_key(file)))


def _listed(folder: Path) -> list[dict[str, Any]]:
    """Return fsspec's entries of a folder in a bucket."""
    try:
        entries = _store(folder).ls(_key(folder), detail=True)
    except FileNotFoundError:
        return []
    # Some tools create an object with the folder's own name as a placeholder for an empty folder.
    return [info for info in entries if info["name"].strip("/") != _key(folder)]


def _file_state(info: dict[str, Any]) -> str:
    state = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), None)
    assert state, f"{info['name']} has neither an ETag nor an MD5 hash"
    return str(state).strip('"')


def _name(info: dict[str, Any]) -> str:
    return info["name"].rstrip("/").rsplit("/", 1)[-1]


def _store(path: Any) -> Any:
    return path.fs


def _key(path: Any) -> str:
    return path.path.rstrip("/")
