"""A folder of Parquet parts and, once all rows are there, a manifest.

A part appears under its name whole or not at all, so a stage that was killed resumes from the rows on disk. The name of
a part is the digest of its content. The manifest holds its own digest and that of every part, so that a truncated or
altered file is refused.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# Its functions are made when it is loaded, where no type checker sees them.
pc: Any = pyarrow.compute
MANIFEST = "manifest.json"
_PART_GLOB = "part-*.parquet"


def write_part(folder: Path, table: pa.Table) -> Path:
    """Writes rows as one part, named by what it holds: the same rows written twice are one part."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP_SIZE)
    content = buffer.getvalue()
    path = folder / f"part-{hashlib.sha256(content).hexdigest()[:20]}.parquet"
    filesystem.put(path, content.to_pybytes())
    return path


def list_parts(folder: Path) -> list[Path]:
    """The whole parts of a folder, in the order of their names."""
    if filesystem.is_remote(folder):
        return [folder / name for name in sorted(filesystem.file_states(folder)) if fnmatch.fnmatch(name, _PART_GLOB)]
    return sorted(folder.glob(_PART_GLOB))


def stream_rows(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a folder part by part, of which there may be tens of thousands.

    Not by `pyarrow.dataset`, which reads all of them ahead of whoever takes them one by one, and keeps 60 KB of each.

    Args:
        folder: of rows.
        schema: theirs.
        columns: those that are wanted; None for all.

    Raises:
        UserError: where a part is cut or altered, with its path and what to do.
    """
    for file, source, found in _open_parts(list_parts(folder)):
        if f"part-{found[:20]}.parquet" != file.name:
            raise UserError(f"{file} was cut or altered after it was written; {_remedy(file)}")
        with pq.ParquetFile(source) as opened:
            if not opened.schema_arrow.equals(schema):
                raise UserError(f"{file} has other columns than this version of raykd writes; delete its folder")
            table = opened.read(columns, use_threads=False)
        yield table


def _open_parts(files: list[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Each file, what Arrow reads it from, and the digest of what it holds; of a bucket a file is asked for once."""
    if not files or not filesystem.is_remote(files[0]):
        yield from ((file, file, file_digest(file)) for file in files)
        return
    for file, content in zip(files, filesystem.read_all(files), strict=True):
        yield file, pa.BufferReader(content), hashlib.sha256(content).hexdigest()


def read_rows(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a folder; arguments and errors as those of `stream_rows`."""
    nothing = schema.empty_table().select(columns or schema.names)
    return pa.concat_tables([nothing, *stream_rows(folder, schema, columns)]).combine_chunks()


def done_ids(folder: Path, schema: pa.Schema, id_column: str) -> set[str]:
    """The ids of all rows of a folder that carry no error."""
    done: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        done.update(rows.filter(_has_no_error(rows))[id_column].to_pylist())
    return done


def check_failures(folder: Path, schema: pa.Schema, id_column: str, whose: str, option: str, limit: float) -> int:
    """Merges a folder, and returns how many of its rows failed and were not answered later.

    Args:
        folder: of rows.
        schema: theirs.
        id_column: the column that names a row.
        whose: how the message begins.
        option: what sets the limit.
        limit: the share of the rows that may fail.

    Raises:
        StageError: where more failed, naming some, and why.
    """
    total = merge(folder, schema, id_column)
    failed = {
        row[id_column]: f"{row['problem_id']}: {row['error']}"
        for rows in stream_rows(folder, schema, [id_column, "problem_id", "error"])
        for row in rows.filter(pc.invert(_has_no_error(rows))).to_pylist()
    }
    errors = sorted(failed)
    if len(errors) > limit * total:
        shown = "; ".join(failed[each] for each in errors[:3])
        raise StageError(
            f"{whose}: {len(errors)} of {total} rows failed, more than {option}={limit:g} allows ({shown}); the others "
            f"are kept in {folder}, and the same command asks the failed ones again"
        )
    return len(errors)


def num_failed(folder: Path, schema: pa.Schema) -> int:
    """How many rows of a merged folder failed."""
    return sum(pc.sum(pc.invert(_has_no_error(rows))).as_py() or 0 for rows in stream_rows(folder, schema, ["error"]))


def merge(folder: Path, schema: pa.Schema, id_column: str) -> int:
    """Leaves each row of a folder once, and returns how many there are.

    Rows that failed and were answered later are there twice, and so are those that were asked by two: by a run that
    was killed and went on for a moment, and by the next.
    """
    # 8 bytes a row: there may be millions, of which few are there twice.
    hashes = np.concatenate(
        [np.zeros(0, np.int64), *(_id_hashes(each, id_column) for each in stream_rows(folder, schema, [id_column]))]
    )
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return len(hashes)
    answered: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        again = rows.filter(np.isin(_id_hashes(rows, id_column), twice))
        answered.update(again.filter(_has_no_error(again))[id_column].to_pylist())
    # What was declared complete earlier is about to change.
    (folder / MANIFEST).unlink(missing_ok=True)
    count, seen = 0, set[str]()
    written: set[Path] = set()
    for file, source, _ in _open_parts(list_parts(folder)):
        if file in written:
            # What was left of another part, from here or from a merge that was broken off.
            continue
        table = pq.read_table(source)
        doubled = np.isin(_id_hashes(table, id_column), twice)
        keep = []
        for row_id, error, is_doubled in zip(
            table[id_column].to_pylist(), table["error"].to_pylist(), doubled, strict=True
        ):
            keep.append(not is_doubled or (row_id not in seen and (not error or row_id not in answered)))
            if is_doubled and keep[-1]:
                seen.add(row_id)
        count += sum(keep)
        if not all(keep):
            if any(keep):
                written.add(write_part(folder, table.filter(pa.array(keep))))
            file.unlink()
    return count


def _has_no_error(rows: pa.Table) -> Any:
    return pc.equal(rows["error"], "")


def _id_hashes(rows: pa.Table, id_column: str) -> np.ndarray:
    return np.fromiter(map(hash, rows[id_column].to_pylist()), np.int64, len(rows))


def finalize(folder: Path, schema: pa.Schema, id_column: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Declares a folder of rows complete: merges it, and writes its manifest.

    Returns:
        The manifest as written, with `rows`, their number.
    """
    # What was declared complete earlier may be about to change.
    (folder / MANIFEST).unlink(missing_ok=True)
    rows = merge(folder, schema, id_column)
    if filesystem.is_remote(folder):
        # Nothing is written beside, and to count again would be to read all of it again.
        return write_manifest(folder, {**manifest, "rows": rows}, list_parts(folder))
    for leftover in folder.glob(".tmp-*"):
        leftover.unlink()
    assert rows == sum(num_rows(file) for file in list_parts(folder)), "merging loses no row"
    return write_manifest(folder, {**manifest, "rows": rows}, list_parts(folder))


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Declares a folder complete.

    Args:
        folder: the folder.
        manifest: what is to be known of it.
        files: what it holds; their digests go into the manifest, and that of the manifest itself.

    Returns:
        The manifest as written; of a bucket also `states`, by which it is told that a file is still the same without
        reading it.
    """
    is_remote, files = filesystem.is_remote(folder), list(files)
    # Asked before the files are read: what is altered in between is read again by whoever looks.
    states = filesystem.file_states(folder) if is_remote else {}
    whole = {**manifest, "parts": {file.name: found for file, _, found in _open_parts(files)}}
    if is_remote:
        whole["states"] = {file.name: states[file.name] for file in files}
    whole["digest"] = content_key(whole)
    write_json(folder / MANIFEST, whole)
    return whole


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where there is none yet.

    Raises:
        UserError: where it, or a part that it names, was cut, altered or removed.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    manifest = read_json(file)
    if manifest.get("digest") != content_key({name: each for name, each in manifest.items() if name != "digest"}):
        raise UserError(f"{file} was altered after it was written; delete it, and the stage is done again")
    is_remote, same = filesystem.is_remote(folder), manifest.get("states", {})
    # One request for a thousand files, where one for each would take minutes.
    states = filesystem.file_states(folder) if is_remote else {}
    for name, known in manifest["parts"].items():
        part = folder / name
        if (name not in states) if is_remote else not part.is_file():
            raise UserError(f"{part} is gone; delete {file}, and what is missing is made again")
        if is_remote and states[name] == same.get(name):
            continue
        if file_digest(part) != known:
            raise UserError(f"{part} was cut or altered after it was written; {_remedy(part)}")
    return manifest


def _remedy(part: Path) -> str:
    return f"delete it and {part.parent / MANIFEST}, and what is missing is made again"
