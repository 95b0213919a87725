"""Row stores: atomic writes, resumption by id, and errors that name damaged files."""

import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from raykd.errors import UserError
from raykd.storage import files, filesystem, hashing, row_store
from raykd.storage.provenance import provenance

SCHEMA = pa.schema([("row_id", pa.string()), ("value", pa.int64()), ("error", pa.string())])


def rows(*values: tuple[str, int, str]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, value, strict=True)) for value in values], schema=SCHEMA)


def test_content_key_ignores_the_order_of_keys():
    assert hashing.content_key({"a": 1, "b": [2]}) == hashing.content_key({"b": [2], "a": 1})
    assert hashing.content_key({"a": 1}) != hashing.content_key({"a": 2})


def test_same_rows_written_twice_are_one_part(storage: Path):
    for _ in range(2):
        row_store.write_part(storage, rows(("a", 1, ""), ("b", 2, "")))
    assert len(row_store.list_parts(storage)) == 1
    assert len(row_store.read_rows(storage, SCHEMA)) == 2


def test_parts_say_what_made_them(storage: Path):
    part = row_store.write_part(storage, rows(("a", 1, "")))
    made_with = json.loads(files.table_metadata(part)["made_with"])
    assert made_with == provenance()
    assert made_with["versions"]["torch"] == importlib.metadata.version("torch")


def test_retried_rows_replace_failed_rows(storage: Path):
    row_store.write_part(storage, rows(("a", 1, ""), ("b", 0, "timeout"), ("c", 0, "refused")))
    assert row_store.done_ids(storage, SCHEMA, "row_id") == {"a"}
    row_store.write_part(storage, rows(("b", 2, "")))
    manifest = row_store.finalize(storage, SCHEMA, "row_id", {"what": "test"})
    assert manifest["rows"] == 3
    found = {row["row_id"]: row for row in row_store.read_rows(storage, SCHEMA).to_pylist()}
    assert (found["b"]["value"], found["b"]["error"]) == (2, "")
    assert found["c"]["error"] == "refused"
    assert row_store.read_manifest(storage) == manifest


def test_too_many_failures_raise_with_the_remedy(storage: Path):
    schema = SCHEMA.append(pa.field("problem_id", pa.string()))
    made = rows(("a", 1, ""), ("b", 0, "timeout"), ("c", 0, "refused"), ("d", 1, ""))
    table = made.append_column("problem_id", pa.array(["p1", "p2", "p3", "p4"]))
    row_store.write_part(storage, table)
    assert row_store.check_failures(storage, schema, "row_id", "students", "evaluate.max_error_rate", 0.5) == 2
    with pytest.raises(RuntimeError) as caught:
        row_store.check_failures(storage, schema, "row_id", "students", "evaluate.max_error_rate", 0.4)
    for words in ("students: 2 of 4 rows", "evaluate.max_error_rate=0.4", "p2: timeout", "p3: refused", str(storage)):
        assert words in str(caught.value)
    # Rows that were answered later do not count as failed.
    row_store.write_part(storage, table.slice(1, 1).set_column(2, "error", pa.array([""])))
    assert row_store.check_failures(storage, schema, "row_id", "students", "evaluate.max_error_rate", 0.4) == 1


def truncate(content: bytes) -> bytes:
    return content[:-20]


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def edit_rows(content: bytes) -> bytes:
    """Write a valid Parquet file with the same number of rows."""
    table = pa.parquet.read_table(pa.BufferReader(content))
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(table.set_column(1, "value", pa.array([100] * len(table))), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("damage", [truncate, flip_bit, edit_rows])
def test_damaged_part_is_refused_by_name(storage: Path, damage, is_complete: bool):
    row_store.write_part(storage, rows(("a", 1, "")))
    part = row_store.write_part(storage, rows(("b", 2, "")))
    if is_complete:
        row_store.finalize(storage, SCHEMA, "row_id", {})
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ValueError, match=f"{part.name} was truncated or modified.*delete it"):
        row_store.read_rows(storage, SCHEMA)
    if is_complete:
        with pytest.raises(ValueError, match=f"{part.name} was truncated or modified.*delete it"):
            row_store.read_manifest(storage)
    # The message says to delete the part.
    part.unlink()
    if is_complete:
        with pytest.raises(ValueError, match=f"{part.name} is missing"):
            row_store.read_manifest(storage)
    (storage / row_store.MANIFEST).unlink(missing_ok=True)
    assert row_store.done_ids(storage, SCHEMA, "row_id") == {"a"}


@pytest.mark.parametrize("written", ['{"rows": ', '{"rows": 2, "parts": {}}', "[]", ""])
def test_damaged_manifest_is_refused_by_name(storage: Path, written: str):
    (storage / row_store.MANIFEST).write_text(written)
    with pytest.raises(ValueError, match=r"manifest\.json (is damaged|was modified)"):
        row_store.read_manifest(storage)


def test_part_added_to_a_complete_folder_is_refused_by_name(storage: Path):
    row_store.write_part(storage, rows(("a", 1, "")))
    row_store.finalize(storage, SCHEMA, "row_id", {})
    late = row_store.write_part(storage, rows(("a", 2, ""), ("b", 2, "")))
    for read in (
        lambda: row_store.read_rows(storage, SCHEMA),
        lambda: row_store.done_ids(storage, SCHEMA, "row_id"),
        lambda: row_store.read_manifest(storage),
    ):
        with pytest.raises(UserError, match=f"{late.name} is not named by the folder's manifest.json.*remove it"):
            read()
    late.unlink()
    assert row_store.read_rows(storage, SCHEMA)["value"].to_pylist() == [1]
    # A stage that adds rows reopens the folder first.
    row_store.reopen(storage)
    row_store.write_part(storage, rows(("b", 2, "")))
    assert row_store.done_ids(storage, SCHEMA, "row_id") == {"a", "b"}
    assert row_store.finalize(storage, SCHEMA, "row_id", {})["rows"] == 2


@pytest.mark.parametrize("is_complete", [False, True])
def test_part_that_is_not_a_file_is_refused_by_name(tmp_path: Path, is_complete: bool):
    row_store.write_part(tmp_path, rows(("a", 1, "")))
    if is_complete:
        row_store.finalize(tmp_path, SCHEMA, "row_id", {})
    os.mkfifo(tmp_path / "part-0.parquet")
    with pytest.raises(UserError, match=r"part-0\.parquet is not a file; remove it"):
        row_store.read_rows(tmp_path, SCHEMA)


@pytest.mark.parametrize("name", ["../other/part-0.parquet", "/etc/passwd", "", ".."])
def test_manifest_names_files_of_its_own_folder_only(storage: Path, name: str):
    manifest = {"rows": 1, "parts": {name: "0" * 64}}
    files.write_json(storage / row_store.MANIFEST, {**manifest, "digest": hashing.content_key(manifest)})
    for read in (row_store.list_parts, row_store.read_manifest):
        with pytest.raises(UserError, match=r"manifest\.json has no valid list of parts"):
            read(storage)


def test_modified_manifest_is_refused(storage: Path):
    row_store.write_part(storage, rows(("a", 1, ""), ("b", 2, "")))
    row_store.finalize(storage, SCHEMA, "row_id", {"correct": 1})
    file = storage / row_store.MANIFEST
    file.write_text(file.read_text().replace('"correct": 1', '"correct": 2'))
    with pytest.raises(ValueError, match=r"manifest\.json was modified"):
        row_store.read_manifest(storage)


def test_merge_removes_duplicate_rows(storage: Path):
    row_store.write_part(storage, rows(("a", 1, ""), ("b", 2, "")))
    row_store.write_part(storage, rows(("b", 2, ""), ("c", 0, "timeout"), ("d", 0, "refused")))
    row_store.write_part(storage, rows(("c", 3, ""), ("d", 0, "timeout")))
    assert row_store.finalize(storage, SCHEMA, "row_id", {})["rows"] == 4
    found = row_store.read_rows(storage, SCHEMA).to_pylist()
    assert sorted((row["row_id"], row["value"]) for row in found) == [("a", 1), ("b", 2), ("c", 3), ("d", 0)]


@pytest.mark.parametrize("seed", range(12))
def test_interrupted_merge_loses_no_row(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    """The order of parts depends on their content."""
    row_store.write_part(tmp_path, rows(("a", 0, f"timeout {seed}"), ("b", seed, "")))
    row_store.write_part(tmp_path, rows(("a", seed, ""), ("c", seed, "")))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            row_store.merge(tmp_path, SCHEMA, "row_id")
    assert row_store.finalize(tmp_path, SCHEMA, "row_id", {})["rows"] == 3
    found = row_store.read_rows(tmp_path, SCHEMA).to_pylist()
    assert sorted((row["row_id"], row["value"], row["error"]) for row in found) == [
        (name, seed, "") for name in ("a", "b", "c")
    ]


def test_fingerprint_follows_content_and_names(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"abc")
    first = hashing.fingerprint(folder)
    (folder / "weights").write_bytes(b"abd")
    assert hashing.fingerprint(folder) != first
    (folder / "weights").rename(folder / "other")
    (folder / "other").write_bytes(b"abc")
    assert hashing.fingerprint(folder) != first


def test_fingerprint_covers_whole_files_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    content = bytearray(65 << 20)
    file.write_bytes(content)
    hour_ago = time.time() - 3600
    os.utime(file, (hour_ago, hour_ago))
    first = hashing.fingerprint(file.parent)
    (entry,) = (tmp_path / "cache" / "raykd" / "digests").iterdir()
    assert entry.read_text() == hashlib.sha256(content).hexdigest()
    # An entry of the cache is used in the next process.
    entry.write_text("0" * 64)
    hashing.local_digest.cache_clear()
    assert hashing.fingerprint(file.parent) != first
    entry.write_text("damaged")
    hashing.local_digest.cache_clear()
    assert hashing.fingerprint(file.parent) == first
    content[33 << 20] = 1
    file.write_bytes(content)
    assert hashing.fingerprint(file.parent) != first
    # A cache that cannot be written changes nothing.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    os.utime(file, (hour_ago - 1, hour_ago - 1))
    assert hashing.fingerprint(file.parent) != first


def test_fingerprint_ignores_hidden_files_and_documentation(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    before = hashing.fingerprint(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "download").write_text("a timestamp")
    (tmp_path / "README.md").write_text("a description")
    assert hashing.fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert hashing.fingerprint(tmp_path) != before


def test_unchanged_bucket_files_are_not_read_again(bucket: str):
    folder = filesystem.resolve(f"{bucket}/finalized")
    part = row_store.write_part(folder, rows(("a", 1, "")))
    manifest = row_store.finalize(folder, SCHEMA, "row_id", {})
    assert manifest["states"] == {part.name: filesystem.file_state(part)}
    # If the part were read, this digest would be refused.
    files.write_json(folder / row_store.MANIFEST, with_fields(manifest, parts={part.name: "0" * 64}))
    assert row_store.read_manifest(folder)
    files.write_json(folder / row_store.MANIFEST, manifest)
    content = part.read_bytes()
    part.write_bytes(truncate(content))
    with pytest.raises(ValueError, match="was truncated or modified"):
        row_store.read_manifest(folder)
    # In another bucket, a copied file has another state, and its content is compared.
    part.write_bytes(content)
    files.write_json(folder / row_store.MANIFEST, with_fields(manifest, states={}))
    assert row_store.read_manifest(folder) == with_fields(manifest, states={})


def with_fields(manifest: dict, **other: dict) -> dict:
    fields = {name: each for name, each in manifest.items() if name != "digest"} | other
    return fields | {"digest": hashing.content_key(fields)}


def test_rows_can_be_removed_by_a_predicate(storage: Path):
    row_store.write_part(storage, rows(("a", 1, ""), ("b", 2, "")))
    row_store.write_part(storage, rows(("c", 1, "")))
    untouched = row_store.write_part(storage, rows(("d", 3, "")))
    row_store.finalize(storage, SCHEMA, "row_id", {})
    row_store.retain(storage, SCHEMA, ["value"], lambda part: [value > 0 for value in part["value"].to_pylist()])
    assert row_store.read_manifest(storage) is not None
    row_store.retain(storage, SCHEMA, ["value"], lambda part: [value > 1 for value in part["value"].to_pylist()])
    assert row_store.read_manifest(storage) is None
    assert sorted(row_store.read_rows(storage, SCHEMA)["row_id"].to_pylist()) == ["b", "d"]
    assert untouched in row_store.list_parts(storage)
