"""Row store: a folder of Parquet parts and, once all rows are written, a manifest.

Parts are written atomically, so that a killed stage resumes from the rows on disk. The name of a part is the digest of
its content. The manifest holds its own digest and the digest of every part: what is read from a complete folder is
exactly what its manifest names, and a truncated, modified, missing or additional part is refused by name.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from raykd.errors import StageError, UserError
from raykd.storage import filesystem
from raykd.storage.files import ROW_GROUP_SIZE, num_rows, read_json, write_json
from raykd.storage.hashing import content_key, file_digest
from raykd.storage.provenance import provenance

# pyarrow.compute creates its functions at import, so type checkers do not find them.
pc: Any = pyarrow.compute
MANIFEST = "manifest.json"
MADE_WITH = b"made_with"
_PART_GLOB = "part-*.parquet"


def write_part(folder: Path, table: pa.Table) -> Path:
    """Write rows as one part and return its file. The same rows written twice are one part.

    The metadata of the part's schema say which software made the rows (`provenance`).
    """
    if MADE_WITH not in (table.schema.metadata or {}):
        table = table.replace_schema_metadata({MADE_WITH: json.dumps(provenance())})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP_SIZE)
    content = buffer.getvalue()
    path = folder / f"part-{hashlib.sha256(content).hexdigest()[:20]}.parquet"
    filesystem.put(path, content.to_pybytes())
    return path


def list_parts(folder: Path) -> list[Path]:
    """Return the parts of a folder, sorted by name: of a complete folder those that its manifest names.

    Raises:
        UserError: if the manifest was modified, or a part is missing, is not a file or is not named by the manifest.
    """
    manifest = _load_manifest(folder)
    found = _find_parts(folder)
    if manifest is not None:
        _refuse_additional(folder, manifest, found)
        if missing := sorted(set(manifest["parts"]) - found):
            raise _missing(folder / missing[0])
        return [folder / name for name in sorted(manifest["parts"])]
    return [folder / name for name in sorted(found)]


def reopen(folder: Path) -> None:
    """Remove the manifest of a complete folder, to which a stage is about to add rows."""
    (folder / MANIFEST).unlink(missing_ok=True)


def _find_parts(folder: Path) -> set[str]:
    """Return the names of the parts in a folder.

    Raises:
        UserError: if one is not a file. Opening a named pipe, for instance, would wait for ever.
    """
    if filesystem.is_remote(folder):
        return {name for name in filesystem.file_states(folder) if fnmatch.fnmatch(name, _PART_GLOB)}
    parts = list(folder.glob(_PART_GLOB))
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part} is not a file; remove it and re-run the command")
    return {part.name for part in parts}


def _refuse_additional(folder: Path, manifest: Mapping[str, Any], found: set[str]) -> None:
    """Raise UserError if a complete folder has a part that its manifest does not name."""
    if additional := sorted(found - set(manifest["parts"])):
        raise UserError(
            f"{folder / additional[0]} is not named by the folder's {MANIFEST}: it was added after the folder was "
            "complete; remove it and re-run the command"
        )


def _load_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder; None if there is none.

    Raises:
        UserError: if it was modified.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    manifest = read_json(file)
    if manifest.get("digest") != content_key({name: value for name, value in manifest.items() if name != "digest"}):
        raise UserError(f"{file} was modified after it was written; delete it and re-run the command")
    parts = manifest.get("parts")
    if not isinstance(parts, dict) or not all(_is_part(name, digest) for name, digest in parts.items()):
        raise UserError(f"{file} has no valid list of parts; delete it and re-run the command")
    return manifest


def _is_part(name: str, digest: Any) -> bool:
    """Return whether an entry of a manifest is a name in its own folder, with the digest of a file."""
    is_name = re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None
    return is_name and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def stream_rows(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a folder, one table for each part.

    There may be tens of thousands of parts. `pyarrow.dataset` would read all of them ahead of the consumer, and keep
    60 KB of each in memory.

    Args:
        folder: the row store.
        schema: the schema of its rows.
        columns: names of the columns to read; None for all.

    Raises:
        UserError: if a part is truncated, modified or of another schema, with its path and the remedy.
    """
    for file, source, digest in _open_parts(list_parts(folder)):
        if f"part-{digest[:20]}.parquet" != file.name:
            raise UserError(f"{file} was truncated or modified after it was written; {_remedy(file)}")
        with pq.ParquetFile(source) as opened:
            if not opened.schema_arrow.equals(schema):
                raise UserError(
                    f"{file} was written by another version of raykd, with other columns; delete its folder"
                )
            table = opened.read(columns, use_threads=False)
        yield table


def _open_parts(files: list[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Yield each file with a source for Arrow and the digest of its content; files in a bucket are requested once."""
    if not files or not filesystem.is_remote(files[0]):
        yield from ((file, file, file_digest(file)) for file in files)
        return
    for file, content in zip(files, filesystem.read_all(files), strict=True):
        yield file, pa.BufferReader(content), hashlib.sha256(content).hexdigest()


def read_rows(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of a folder as one table; arguments and errors as in `stream_rows`."""
    empty = schema.empty_table().select(columns or schema.names)
    return pa.concat_tables([empty, *stream_rows(folder, schema, columns)]).combine_chunks()


def done_ids(folder: Path, schema: pa.Schema, id_column: str) -> set[str]:
    """Return the ids of all rows without an error."""
    done: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        done.update(rows.filter(_has_no_error(rows))[id_column].to_pylist())
    return done


def check_failures(folder: Path, schema: pa.Schema, id_column: str, whose: str, option: str, limit: float) -> int:
    """Merge a folder and return the number of failed rows that no retry replaced.

    Args:
        folder: the row store.
        schema: the schema of its rows.
        id_column: the column with the id of a row.
        whose: the beginning of the error message.
        option: the dotted path of the option that sets the limit.
        limit: the share of rows that may fail, 0 to 1.

    Raises:
        StageError: if more rows failed, with some of them and their errors.
    """
    total = merge(folder, schema, id_column)
    failed = {
        row[id_column]: f"{row['problem_id']}: {row['error']}"
        for rows in stream_rows(folder, schema, [id_column, "problem_id", "error"])
        for row in rows.filter(pc.invert(_has_no_error(rows))).to_pylist()
    }
    errors = sorted(failed)
    if len(errors) > limit * total:
        shown = "; ".join(failed[row_id] for row_id in errors[:3])
        raise StageError(
            f"{whose}: {len(errors)} of {total} rows failed, more than {option}={limit:g} allows ({shown}); the other "
            f"rows are kept in {folder}. Re-run the same command to retry the failed rows"
        )
    return len(errors)


def num_failed(folder: Path, schema: pa.Schema) -> int:
    """Return the number of failed rows of a merged folder."""
    return sum(pc.sum(pc.invert(_has_no_error(rows))).as_py() or 0 for rows in stream_rows(folder, schema, ["error"]))


def merge(folder: Path, schema: pa.Schema, id_column: str) -> int:
    """Remove duplicate rows of a folder and return the number of rows left.

    Duplicates arise when a failed row is retried, or when a killed run writes its last rows while the next one starts.
    Of duplicate rows one without an error is kept, if there is one.
    """
    # 8 bytes a row instead of the id: there may be millions of rows, of which few are duplicates.
    hashes = np.concatenate(
        [np.zeros(0, np.int64), *(_id_hashes(rows, id_column) for rows in stream_rows(folder, schema, [id_column]))]
    )
    ordered = np.sort(hashes)
    duplicated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(duplicated):
        return len(hashes)
    succeeded: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        duplicates = rows.filter(np.isin(_id_hashes(rows, id_column), duplicated))
        succeeded.update(duplicates.filter(_has_no_error(duplicates))[id_column].to_pylist())
    # The parts are about to change, so an earlier manifest becomes invalid.
    (folder / MANIFEST).unlink(missing_ok=True)
    count, seen = 0, set[str]()
    written: set[Path] = set()
    for file, source, _ in _open_parts(list_parts(folder)):
        if file in written:
            # The remainder of another part, written by this merge or by an interrupted one.
            continue
        table = pq.read_table(source)
        is_duplicated = np.isin(_id_hashes(table, id_column), duplicated)
        keep = []
        for row_id, error, is_duplicate in zip(
            table[id_column].to_pylist(), table["error"].to_pylist(), is_duplicated, strict=True
        ):
            keep.append(not is_duplicate or (row_id not in seen and (not error or row_id not in succeeded)))
            if is_duplicate and keep[-1]:
                seen.add(row_id)
        count += sum(keep)
        if not all(keep):
            if any(keep):
                written.add(write_part(folder, table.filter(pa.array(keep))))
            file.unlink()
    return count


def retain(folder: Path, schema: pa.Schema, columns: Sequence[str], is_kept: Callable[[pa.Table], list[bool]]) -> None:
    """Remove the rows of a folder for which a predicate is false; a folder that changes is complete no longer.

    Args:
        folder: the row store.
        schema: the schema of its rows.
        columns: names of the columns that the predicate reads.
        is_kept: a function of the rows of one part, with one value for each row.
    """
    files = list_parts(folder)
    for file, rows in zip(files, stream_rows(folder, schema, columns), strict=True):
        if all(kept := is_kept(rows)):
            continue
        reopen(folder)
        if any(kept):
            ((_, source, _),) = _open_parts([file])
            write_part(folder, pq.read_table(source).filter(pa.array(kept)))
        file.unlink()


def _has_no_error(rows: pa.Table) -> Any:
    return pc.equal(rows["error"], "")


def _id_hashes(rows: pa.Table, id_column: str) -> np.ndarray:
    return np.fromiter(map(hash, rows[id_column].to_pylist()), np.int64, len(rows))


def finalize(folder: Path, schema: pa.Schema, id_column: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a folder of rows and write its manifest, which marks it as complete.

    Args:
        folder: the row store.
        schema: the schema of its rows.
        id_column: the column with the id of a row.
        manifest: further entries of the manifest.

    Returns:
        The manifest as written, with the number of `rows`.
    """
    # The merge may change parts, so an earlier manifest becomes invalid.
    (folder / MANIFEST).unlink(missing_ok=True)
    rows = merge(folder, schema, id_column)
    if filesystem.is_remote(folder):
        # A bucket has no temporary files, and counting again would read all parts again.
        return write_manifest(folder, {**manifest, "rows": rows}, list_parts(folder))
    for leftover in folder.glob(".tmp-*"):
        leftover.unlink()
    assert rows == sum(num_rows(file) for file in list_parts(folder)), "merging loses no row"
    return write_manifest(folder, {**manifest, "rows": rows}, list_parts(folder))


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Write the manifest of a folder, which marks it as complete.

    Args:
        folder: the folder.
        manifest: its entries.
        files: the files of the folder. The manifest holds their digests and its own.

    Returns:
        The manifest as written. In a bucket it also holds the `states` of the files, so that unchanged files need not
        be read again.
    """
    is_remote, files = filesystem.is_remote(folder), list(files)
    # Requested before the files are read: `read_manifest` then reads a file again that changed in between.
    states = filesystem.file_states(folder) if is_remote else {}
    whole = {**manifest, "parts": {file.name: digest for file, _, digest in _open_parts(files)}}
    if is_remote:
        whole["states"] = {file.name: states[file.name] for file in files}
    whole["digest"] = content_key(whole)
    write_json(folder / MANIFEST, whole)
    return whole


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete folder; None if the folder is not complete.

    Raises:
        UserError: if the manifest or one of its files was truncated, modified or removed, or a part was added.
    """
    manifest = _load_manifest(folder)
    if manifest is None:
        return None
    _refuse_additional(folder, manifest, _find_parts(folder))
    is_remote, written_states = filesystem.is_remote(folder), manifest.get("states", {})
    # One request for a thousand files; a request for each file would take minutes.
    states = filesystem.file_states(folder) if is_remote else {}
    for name, digest in manifest["parts"].items():
        part = folder / name
        if (name not in states) if is_remote else not part.is_file():
            raise _missing(part)
        if is_remote and states[name] == written_states.get(name):
            continue
        if file_digest(part) != digest:
            raise UserError(f"{part} was truncated or modified after it was written; {_remedy(part)}")
    return manifest


def _missing(part: Path) -> UserError:
    manifest = part.parent / MANIFEST
    return UserError(f"{part} is missing; delete {manifest} and re-run the command to write the missing rows")


def manifest_digest(folder: Path) -> str:
    """Return the digest of a complete folder's manifest, which covers the content of all parts; empty for no manifest.

    Raises:
        UserError: if the manifest was modified.
    """
    return (_load_manifest(folder) or {}).get("digest", "")


def _remedy(part: Path) -> str:
    return f"delete it and {part.parent / MANIFEST}, then re-run the command to write the missing rows"
