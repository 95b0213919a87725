"""Storage: where things lie, under which key, and how they are written so that nothing half-written is read.

A folder of rows is a set of Parquet parts and, once all rows are there, a manifest. A part appears under its
name whole or not at all, so a stage that was killed goes on from the rows that are there. The name of a part is
the digest of its content, and a manifest holds that of itself and of every part: what was cut or altered is refused.
"""

import fnmatch
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from raykd import location
from raykd.faults import StageError, UserError

# Its functions are made when it is loaded, where no type checker sees them.
pc: Any = pyarrow.compute
MANIFEST = "manifest.json"
_PART_GLOB = "part-*.parquet"
# Rows. Small groups, so that a reader can stream and can split one file over several tasks.
ROW_GROUP = 1024
# A model's weights count into its fingerprint by content up to this many bytes, above that by their ends.
_WHOLE_FILE_BYTES = 64 << 20


def content_key(content: Mapping[str, Any]) -> str:
    """The name of what is wholly determined by `content` (JSON values): 20 hexadecimal digits of SHA-256."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digest(canonical)[:20]


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """What a model's folder or a data file holds, as a key; large files count by size and both ends.

    What a download leaves beside a model (hidden files, which hold times) and what describes it count for nothing.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _bears(p, path))
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_FILE_BYTES:
                total.update(stream.read())
            else:
                total.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), os.SEEK_END)
                total.update(stream.read())
    return total.hexdigest()[:20]


def _bears(file: Path, folder: Path) -> bool:
    return file.suffix != ".md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    location.put(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_text` writes text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: where the file is cut or altered, with its path and what to do.
    """
    return _object(location.read(path), str(path), "delete it, and the stage is done again")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON, an object a line.

    Raises:
        UserError: where a line is cut or altered, with its place and what to do.
    """
    lines = location.read(path).split(b"\n")
    return [
        _object(line, f"{path}, line {number}", "delete the file's folder")
        for number, line in enumerate(lines, start=1)
        if line or number < len(lines)
    ]


def _object(content: bytes, where: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    # A number of thousands of digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged (no object, but {str(found)[:40]!r}); {remedy}")
    return found


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    location.put(path, content)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a Parquet file that is there whole or not at all."""
    with location.written(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file; None for all columns."""
    path, system = location.for_arrow(file)
    return pq.read_table(path, columns=list(columns) if columns else None, filesystem=system)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Reads a Parquet file bit by bit."""
    with location.here(file) as local, pq.ParquetFile(local) as opened:
        yield from opened.iter_batches()


def num_rows(file: Path) -> int:
    """How many rows a Parquet file holds, without reading them."""
    path, system = location.for_arrow(file)
    return pq.read_metadata(path, filesystem=system).num_rows


def write_part(folder: Path, table: pa.Table) -> Path:
    """Writes rows as one part, named by what it holds: the same rows written twice are one part."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP)
    content = buffer.getvalue()
    path = folder / f"part-{hashlib.sha256(content).hexdigest()[:20]}.parquet"
    location.put(path, content.to_pybytes())
    return path


def parts(folder: Path) -> list[Path]:
    """The whole parts of a folder, in the order of their names."""
    if location.is_remote(folder):
        return [folder / name for name in sorted(location.states(folder)) if fnmatch.fnmatch(name, _PART_GLOB)]
    return sorted(folder.glob(_PART_GLOB))


def file_digest(file: Path) -> str:
    """SHA-256 of what a file holds; of a folder read once for as long as it stays as it is."""
    if location.is_remote(file):
        # Bit by bit: it may be the state of an optimizer.
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    state = file.stat()
    return _file_digest(file, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=1 << 16)
def _file_digest(file: Path, *_: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    for file, source, found in _opened(parts(folder)):
        if f"part-{found[:20]}.parquet" != file.name:
            raise UserError(f"{file} was cut or altered after it was written; {_remedy(file)}")
        with pq.ParquetFile(source) as opened:
            if not opened.schema_arrow.equals(schema):
                raise UserError(f"{file} has other columns than this version of raykd writes; delete its folder")
            table = opened.read(columns, use_threads=False)
        yield table


def _opened(files: list[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Each file, what Arrow reads it from, and the digest of what it holds; of a bucket a file is asked for once."""
    if not files or not location.is_remote(files[0]):
        yield from ((file, file, file_digest(file)) for file in files)
        return
    for file, content in zip(files, location.read_all(files), strict=True):
        yield file, pa.BufferReader(content), hashlib.sha256(content).hexdigest()


def read_rows(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a folder; arguments and errors as those of `stream_rows`."""
    nothing = schema.empty_table().select(columns or schema.names)
    return pa.concat_tables([nothing, *stream_rows(folder, schema, columns)]).combine_chunks()


def done_ids(folder: Path, schema: pa.Schema, id_column: str) -> set[str]:
    """The ids of all rows of a folder that carry no error."""
    done: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        done.update(rows.filter(_is_answered(rows))[id_column].to_pylist())
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
        for row in rows.filter(pc.invert(_is_answered(rows))).to_pylist()
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
    return sum(pc.sum(pc.invert(_is_answered(rows))).as_py() or 0 for rows in stream_rows(folder, schema, ["error"]))


def merge(folder: Path, schema: pa.Schema, id_column: str) -> int:
    """Leaves each row of a folder once, and returns how many there are.

    Rows that failed and were answered later are there twice, and so are those that were asked by two: by a run that
    was killed and went on for a moment, and by the next.
    """
    # 8 bytes a row: there may be millions, of which few are there twice.
    hashes = np.concatenate(
        [np.zeros(0, np.int64), *(_hashes(each, id_column) for each in stream_rows(folder, schema, [id_column]))]
    )
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return len(hashes)
    answered: set[str] = set()
    for rows in stream_rows(folder, schema, [id_column, "error"]):
        again = rows.filter(np.isin(_hashes(rows, id_column), twice))
        answered.update(again.filter(_is_answered(again))[id_column].to_pylist())
    # What was declared complete earlier is about to change.
    (folder / MANIFEST).unlink(missing_ok=True)
    count, seen = 0, set[str]()
    written: set[Path] = set()
    for file, source, _ in _opened(parts(folder)):
        if file in written:
            # What was left of another part, from here or from a merge that was broken off.
            continue
        table = pq.read_table(source)
        doubled = np.isin(_hashes(table, id_column), twice)
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


def _is_answered(rows: pa.Table) -> Any:
    return pc.equal(rows["error"], "")


def _hashes(rows: pa.Table, id_column: str) -> np.ndarray:
    return np.fromiter(map(hash, rows[id_column].to_pylist()), np.int64, len(rows))


def seal(folder: Path, schema: pa.Schema, id_column: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Declares a folder of rows complete: merges it, and writes its manifest.

    Returns:
        The manifest as written, with `rows`, their number.
    """
    # What was declared complete earlier may be about to change.
    (folder / MANIFEST).unlink(missing_ok=True)
    rows = merge(folder, schema, id_column)
    if location.is_remote(folder):
        # Nothing is written beside, and to count again would be to read all of it again.
        return write_manifest(folder, {**manifest, "rows": rows}, parts(folder))
    for leftover in folder.glob(".tmp-*"):
        leftover.unlink()
    assert rows == sum(num_rows(file) for file in parts(folder)), "merging loses no row"
    return write_manifest(folder, {**manifest, "rows": rows}, parts(folder))


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
    is_remote, files = location.is_remote(folder), list(files)
    # Asked before the files are read: what is altered in between is read again by whoever looks.
    states = location.states(folder) if is_remote else {}
    whole = {**manifest, "parts": {file.name: found for file, _, found in _opened(files)}}
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
    is_remote, same = location.is_remote(folder), manifest.get("states", {})
    # One request for a thousand files, where one for each would take minutes.
    states = location.states(folder) if is_remote else {}
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
