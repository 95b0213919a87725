"""Location: where things lie, in a folder or in a bucket, and how they come to be there whole or not at all.

A folder is a `pathlib.Path`. What lies in a bucket is a `upath.UPath`, which has the same methods and is typed as one,
so that no stage has to know. It is no `os.PathLike`: whoever hands it to a library that opens files itself fails there
and then, and wants `here`, `folder_here` or `for_arrow`.

All requests go through one library for each kind of bucket, those of Arrow, Ray Data, Ray Train and Ray Tune too: keys
are found, and other servers named, in one and the same way. Only the engine of vLLM fetches adapters through Ray's own.
"""

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

# Files that are asked of a bucket at a time: each takes tens of milliseconds, whatever it holds.
MAX_PARALLEL_REQUESTS = 32


@dataclass(frozen=True)
class _Store:
    """A kind of bucket."""

    library: str
    extra: str
    options: dict[str, Any]
    """What its file system is told. Lists of files are asked anew each time, for other processes write too."""


STORES = {
    "s3": _Store("s3fs", "s3", {"use_listings_cache": False}),
    "gs": _Store("gcsfs", "gcs", {"use_listings_cache": False}),
    # Without a word it would ask for what is public only.
    "abfs": _Store("adlfs", "azure", {"use_listings_cache": False, "anon": False}),
}
AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"


def check_uri(storage: str) -> None:
    """Raises UserError where a storage is neither a folder nor a bucket that is known, or holds a key."""
    if "\0" in storage:
        raise UserError(f"storage {storage!r}: holds a character that no path has")
    if "://" not in storage:
        return
    scheme = storage.partition("://")[0]
    known = ", ".join(f"{each}://" for each in STORES)
    if scheme not in STORES:
        raise UserError(f"storage {scheme + '://'!r}: not known; give a folder that every node sees, or one of {known}")
    if any(each in storage for each in "@?#"):
        # What may be a key is not repeated.
        raise UserError(
            f"storage {scheme}://…: write {scheme}://BUCKET/PREFIX and nothing else: keys and accounts belong into the "
            "environment of the cluster's nodes, for a configuration is written into the experiment's folder and its "
            "report"
        )
    with as_user_error(f"storage {storage!r}", ValueError):
        split = urlsplit(storage)
    names = split.path.strip("/").split("/") if split.path.strip("/") else []
    if not split.netloc or any(name in ("", ".", "..") for name in names):
        raise UserError(f"storage {storage!r}: write {scheme}://BUCKET/PREFIX")


def resolve(storage: str) -> Path:
    """Where an experiment's `storage` is.

    Raises:
        UserError: where it cannot be (`check`), what reads such buckets is not installed, or the environment does not
            say whose it is.
    """
    check_uri(storage)
    if "://" not in storage:
        return Path(storage).absolute()
    scheme = storage.partition("://")[0]
    if scheme == "abfs" and not os.environ.get(AZURE_ACCOUNT):
        # Else it would show when students that are trained are to be asked.
        raise UserError(
            f"storage {storage!r}: set {AZURE_ACCOUNT} in the environment of every node to the storage account's name, "
            "by which the engine finds adapters; a connection string alone does not do"
        )
    store = STORES[scheme]
    if importlib.util.find_spec(store.library) is None:
        raise UserError(
            f"storage {storage!r}: {store.library} is not installed: pip install 'raykd[{store.extra}]' on every node"
        )
    # Half a second that a folder does not need.
    from upath import UPath

    found: Any = UPath(storage.rstrip("/"), **store.options)
    return found


def is_remote(path: Path) -> bool:
    """Whether something lies in a bucket."""
    return not isinstance(path, Path)


def for_arrow(path: Path) -> tuple[str, Any]:
    """A path and the file system that it is of, as Arrow and Ray want them; None for this machine's own."""
    if not is_remote(path):
        return str(path), None
    # A mistake in a configuration is told sooner without it.
    from pyarrow import fs as arrow

    return _key(path), arrow.PyFileSystem(arrow.FSSpecHandler(_store(path)))


def for_engine(path: Path) -> tuple[str | None, str]:
    """Where an engine of Ray Data finds an adapter: what all names are in, None for this machine, and the name.

    Ray copies it to the engine's node, under that name: so it begins with the bucket's.
    """
    if not is_remote(path):
        return None, str(path)
    scheme, key = str(path).partition("://")[0], _key(path)
    if scheme != "abfs":
        return f"{scheme}://", key
    container, _, name = key.partition("/")
    return f"azure://{container}@{os.environ.get(AZURE_ACCOUNT, '')}.blob.core.windows.net", name


def make_folder(path: Path) -> None:
    """Makes a folder, and those it is in; a bucket has none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def read_bytes(path: Path) -> bytes:
    """What a file holds."""
    return _store(path).cat_file(_key(path)) if is_remote(path) else path.read_bytes()


def read_all(paths: Sequence[Path]) -> Iterator[bytes]:
    """What files hold, one after the other; of a bucket several are asked at a time."""
    for start in range(0, len(paths), MAX_PARALLEL_REQUESTS if paths and is_remote(paths[0]) else 1):
        some = paths[start : start + MAX_PARALLEL_REQUESTS]
        if not is_remote(some[0]):
            yield some[0].read_bytes()
            continue
        found = _store(some[0]).cat([_key(each) for each in some])
        # A single one comes without its name in some versions.
        yield from (found[_key(each)] for each in some) if isinstance(found, dict) else [found]


def put(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    if is_remote(path):
        _store(path).pipe_file(_key(path), content)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def create(path: Path, content: bytes) -> bool:
    """Writes a file of a bucket where there is none, and returns whether there was none: of several, one is told so."""
    try:
        _store(path).pipe_file(_key(path), content, mode="create")
    except FileExistsError:
        return False
    except OSError:
        # Some stores answer those who come at the same moment with an error of another kind.
        if path.exists():
            return False
        raise
    return True


def replace(path: Path, content: bytes, seen: str) -> bool:
    """Writes a file of a bucket where it is as it was seen, and returns whether it was.

    S3 looks and writes in one; elsewhere a moment lies in between.
    """
    try:
        if str(path).startswith("s3://"):
            _store(path).pipe_file(_key(path), content, IfMatch=f'"{seen}"')
            return True
    except OSError:
        # A server that does not know the condition answers likewise.
        if not _is_still(path, seen):
            return False
    if not _is_still(path, seen):
        return False
    put(path, content)
    return True


def _is_still(path: Path, seen: str) -> bool:
    # In one request: between two it may go.
    try:
        return file_state(path) == seen
    except FileNotFoundError:
        return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a file of this machine to write for a `with` block; after that it is there whole, or not at all."""
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
        # Without the name of the temporary file, or of none.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        # Where there is nowhere to write there is nothing to tidy up either.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Gives an empty folder of this machine to fill for a `with` block; after that it is there as `path`.

    A bucket has it file by file: whether all of it is there must be told by something that is written afterwards.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            remove(path)
            for file in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
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
    """Gives a file as one of this machine for a `with` block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        _store(path).get_file(_key(path), str(copy))
        yield copy


@contextmanager
def local_dir(path: Path) -> Iterator[Path]:
    """Gives a folder as one of this machine for a `with` block."""
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
    """A folder of this machine for what cannot be written in a bucket bit by bit, such as a log; else the folder."""
    if not is_remote(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"raykd-{os.getuid()}" / _key(folder)


def remove(folder: Path, ignore_errors: bool = False) -> None:
    """Removes a folder with all that is in it; of a bucket also where there is none."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with suppress(OSError if ignore_errors else FileNotFoundError):
        _store(folder).rm(_key(folder), recursive=True)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, in the order of their names."""
    if not is_remote(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    return [folder / key.removeprefix(f"{_key(folder)}/") for key in sorted(_store(folder).find(_key(folder)))]


def list_dirs(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names."""
    if not is_remote(folder):
        return sorted(each for each in folder.glob("*/") if each.is_dir())
    return sorted(folder / _name(each) for each in _listed(folder) if each["type"] == "directory")


def find_in_subdirs(folder: Path, name: str) -> list[Path]:
    """The files of a name in the folders of a folder."""
    if not is_remote(folder):
        return sorted(folder.glob(f"*/{name}"))
    return [each / name for each in list_dirs(folder) if (each / name).exists()]


def file_states(folder: Path) -> dict[str, str]:
    """What changes with the content of each file in a folder of a bucket, by the file's name."""
    return {_name(each): _file_state(each) for each in _listed(folder) if each["type"] == "file"}


def file_state(file: Path) -> str:
    """What changes with the content of a file in a bucket."""
    return _file_state(_store(file).info(_key(file)))


def _listed(folder: Path) -> list[dict[str, Any]]:
    try:
        found = _store(folder).ls(_key(folder), detail=True)
    except FileNotFoundError:
        return []
    # What stands for a folder that is empty bears its name.
    return [each for each in found if each["name"].strip("/") != _key(folder)]


def _file_state(info: dict[str, Any]) -> str:
    found = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), None)
    assert found, f"every store tells what its files hold, but not of {info['name']}"
    return str(found).strip('"')


def _name(info: dict[str, Any]) -> str:
    return info["name"].rstrip("/").rsplit("/", 1)[-1]


def _store(path: Any) -> Any:
    return path.fs


def _key(path: Any) -> str:
    return path.path.rstrip("/")
