"""File system: local folders and buckets behave alike, and configurations hold no credentials."""

import pickle
import re
import stat
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

import s3_server
from raykd.storage import filesystem


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("http://host/x", "storage 'http://': is not supported.*s3://, gs://, abfs://"),
        ("S3://bucket", "is not supported"),
        ("file:///x", "is not supported"),
        ("s3://", "s3://BUCKET/PREFIX"),
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "s3://BUCKET/PREFIX"),
        ("s3://bucket/../other", "s3://BUCKET/PREFIX"),
        ("s3://AKIA:hush@bucket/x", "environment"),
        ("gs://bucket/x?token=hush", "environment"),
        *((f"s3://bucket/{prefix}", "cannot have the character") for prefix in ("x[12]", "*", "a/{b}")),
        ("s3:/bucket/x", "two slashes"),
        ("abfs://container@account.dfs.core.windows.net/hush", "environment"),
    ],
)
def test_invalid_storage_is_refused_without_repeating_secrets(storage: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        filesystem.check_uri(storage)
    assert "hush" not in str(caught.value) and "AKIA" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        filesystem.resolve(storage)


def test_local_storage_is_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert filesystem.resolve("storage") == tmp_path / "storage"
    assert type(filesystem.resolve("storage")) is type(tmp_path)
    assert filesystem.for_arrow(tmp_path) == (str(tmp_path), None)
    assert filesystem.for_engine(tmp_path) == (None, str(tmp_path))
    assert filesystem.scratch(tmp_path) == tmp_path


@pytest.mark.parametrize(("storage", "extra"), [("gs://bucket/x", "gcs"), ("abfs://bucket", "azure"), ("s3://b", "s3")])
def test_missing_bucket_library_names_the_extra(storage: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(filesystem.AZURE_ACCOUNT, "account")
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if "PathFinder" not in str(each)])
    for name in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=re.escape(f"pip install 'raykd[{extra}]'")):
        filesystem.resolve(storage)


@pytest.mark.parametrize("account", [None, ""])
def test_missing_azure_account_is_refused_early(account: str | None, monkeypatch: pytest.MonkeyPatch):
    """The engine's address of an adapter includes the account."""
    monkeypatch.delenv(filesystem.AZURE_ACCOUNT, raising=False)
    if account is not None:
        monkeypatch.setenv(filesystem.AZURE_ACCOUNT, account)
    with pytest.raises(ValueError, match=rf"abfs://container/x.*set {filesystem.AZURE_ACCOUNT} in the environment"):
        filesystem.resolve("abfs://container/x")


def test_scratch_folder_is_private(bucket: str):
    folder = filesystem.resolve(f"{bucket}/logs")
    scratch = filesystem.scratch(folder)
    private = next(parent for parent in scratch.parents if parent.parent == Path(tempfile.gettempdir()))
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert filesystem.scratch(folder) == scratch


def test_bucket_path_keeps_its_uri(bucket: str):
    storage = filesystem.resolve(f"{bucket}/some/where/")
    assert str(storage / "x") == f"{bucket}/some/where/x"
    assert filesystem.is_remote(storage) and pickle.loads(pickle.dumps(storage / "x")) == storage / "x"
    assert {storage / "x": 1}[pickle.loads(pickle.dumps(storage / "x"))] == 1
    with pytest.raises(TypeError):
        # Code that opens the path as a local file must fail, and must not create a folder of that name.
        open(storage / "x")  # noqa: PTH123, SIM115
    assert filesystem.for_engine(storage / "adapter") == ("s3://", f"{bucket.removeprefix('s3://')}/some/where/adapter")


def test_written_file_is_read_back(storage: Path):
    filesystem.put(storage / "deep" / "file", b"one")
    filesystem.put(storage / "deep" / "file", b"two")
    assert filesystem.read_bytes(storage / "deep" / "file") == b"two"
    with filesystem.atomic_write(storage / "written.txt") as local:
        local.write_text("three")
    with filesystem.local_copy(storage / "written.txt") as local:
        assert local.read_text() == "three" and local.name == "written.txt"
    assert filesystem.list_files(storage) == [storage / "deep" / "file", storage / "written.txt"]
    with pytest.raises(FileNotFoundError):
        filesystem.read_bytes(storage / "not there")


def test_interrupted_write_leaves_no_file(storage: Path):
    with pytest.raises(RuntimeError), filesystem.atomic_write(storage / "file") as local:
        local.write_text("half")
        raise RuntimeError
    assert filesystem.list_files(storage) == []


def test_read_all_keeps_the_order(storage: Path):
    paths = [storage / f"{number:03}" for number in range(70)]
    for number, path in enumerate(paths):
        filesystem.put(path, str(number).encode())
    for some in (paths, paths[:1], paths[:33], []):
        assert list(filesystem.read_all(some)) == [str(number).encode() for number in range(len(some))]


def test_atomic_write_dir_replaces_a_folder(storage: Path):
    for content in ("first", "second"):
        with filesystem.atomic_write_dir(storage / "adapter") as local:
            (local / content).write_text(content)
            (local / "deep").mkdir()
            (local / "deep" / "file").write_text(content)
    assert filesystem.list_files(storage / "adapter") == [
        storage / "adapter" / "deep" / "file",
        storage / "adapter" / "second",
    ]
    with filesystem.local_dir(storage / "adapter") as local:
        assert local.name == "adapter" and (local / "deep" / "file").read_text() == "second"
    filesystem.remove(storage / "adapter")
    assert not (storage / "adapter").exists()


def test_listing_of_folders_and_files(storage: Path):
    for name in ("b/it", "a/it", "c/other", "it"):
        filesystem.put(storage / name, b"")
    assert filesystem.list_dirs(storage) == [storage / "a", storage / "b", storage / "c"]
    assert filesystem.find_in_subdirs(storage, "it") == [storage / "a" / "it", storage / "b" / "it"]
    assert filesystem.list_dirs(storage / "not there") == filesystem.find_in_subdirs(storage / "not there", "it") == []


def test_file_state_changes_with_content(bucket: str):
    storage = filesystem.resolve(f"{bucket}/states")
    filesystem.put(storage / "file", b"one")
    before = filesystem.file_states(storage)
    assert before == {"file": filesystem.file_state(storage / "file")}
    filesystem.put(storage / "file", b"two")
    assert filesystem.file_states(storage) != before
    assert filesystem.file_states(storage / "not there") == {}


def test_only_one_of_concurrent_creates_succeeds(bucket: str):
    file = filesystem.resolve(f"{bucket}/created")
    assert [filesystem.create(file, content) for content in (b"first", b"second")] == [True, False]
    assert filesystem.read_bytes(file) == b"first"


def test_create_reports_an_error_if_the_file_disappears(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any, **__: Any) -> None:
        raise FileExistsError

    file = filesystem.resolve(f"{bucket}/deleted")
    monkeypatch.setattr(filesystem, "_store", lambda _: SimpleNamespace(pipe_file=refused))
    assert not filesystem.create(file, b"second") and not file.exists()


def test_replace_requires_the_expected_state(bucket: str, monkeypatch: pytest.MonkeyPatch):
    file = filesystem.resolve(f"{bucket}/replaced")
    filesystem.put(file, b"one")
    seen = filesystem.file_state(file)
    assert filesystem.replace(file, b"two", seen)
    assert not filesystem.replace(file, b"three", seen)
    assert filesystem.read_bytes(file) == b"two"
    file.unlink()
    assert not filesystem.replace(file, b"four", seen) and not file.exists()
    # The file is deleted between the check and the write.
    monkeypatch.setattr(type(file), "exists", lambda _: True)
    assert not filesystem.replace(file, b"five", seen)


def test_pickled_bucket_path_holds_no_credentials(bucket: str):
    storage = filesystem.resolve(f"{bucket}/x")
    for sent in (storage, filesystem.for_arrow(storage)):
        for secret in (s3_server.KEYS["AWS_SECRET_ACCESS_KEY"], s3_server.KEYS["AWS_ACCESS_KEY_ID"]):
            assert secret.encode() not in pickle.dumps(sent)


def test_arrow_reads_and_copies(storage: Path, tmp_path: Path):
    """Ray Data, Train and Tune use the file system in other processes, so it must be picklable."""
    with filesystem.atomic_write(storage / "rows.parquet") as local:
        pq.write_table(pa.table({"a": [1, 2]}), local)
    path, system = filesystem.for_arrow(storage)
    system = pickle.loads(pickle.dumps(system)) or pyarrow.fs.LocalFileSystem()
    assert pq.read_table(f"{path}/rows.parquet", filesystem=system)["a"].to_pylist() == [1, 2]
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "deep" / "file").write_bytes(b"x" * 100)
    system.create_dir(f"{path}/copy")
    pyarrow.fs.copy_files(str(tmp_path / "made"), f"{path}/copy", destination_filesystem=system)
    assert filesystem.list_files(storage / "copy") == [storage / "copy" / "deep" / "file"]
    pyarrow.fs.copy_files(f"{path}/copy", str(tmp_path / "back"), source_filesystem=system)
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == b"x" * 100
    system.delete_dir(f"{path}/copy")
    assert filesystem.list_files(storage / "copy") == []
