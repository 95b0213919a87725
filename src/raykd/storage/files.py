"""Text, JSON and Parquet files: reading and atomic writing."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from raykd.display import display, summary
from raykd.errors import UserError
from raykd.storage import filesystem

# In rows. Small row groups let a reader stream a file and split it over several tasks.
ROW_GROUP_SIZE = 1024


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    filesystem.put(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: for a number that is not finite, which JSON has not and `read_json` refuses.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: if the file is damaged, with its path and the remedy.
    """
    return _parse_object(filesystem.read_bytes(path), str(path), "delete it and re-run the command")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON Lines file.

    Raises:
        UserError: if a line is damaged, with its number and the remedy.
    """
    lines = filesystem.read_bytes(path).split(b"\n")
    return [
        _parse_object(line, f"{path}, line {number}", "delete the file's folder")
        for number, line in enumerate(lines, start=1)
        if line or number < len(lines)
    ]


def _parse_object(content: bytes, place: str, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    # Python raises a plain ValueError for a number with thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is damaged ({summary(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is damaged (not an object, but {display(repr(value), limit=40)}); {remedy}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with filesystem.atomic_write(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP_SIZE)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file as a table.

    Args:
        file: the file.
        columns: names of the columns to read; None for all.
    """
    path, system = filesystem.for_arrow(file)
    return pq.read_table(path, columns=list(columns) if columns else None, filesystem=system)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a Parquet file, so that it need not fit into memory."""
    with filesystem.local_copy(file) as local, pq.ParquetFile(local) as opened:
        yield from opened.iter_batches()


def table_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a Parquet file's schema; empty for a file that cannot be read."""
    path, system = filesystem.for_arrow(file)
    try:
        metadata = pq.read_schema(path, filesystem=system).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return {}
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in metadata.items()}


def num_rows(file: Path) -> int:
    """Return the number of rows of a Parquet file from its metadata."""
    path, system = filesystem.for_arrow(file)
    return pq.read_metadata(path, filesystem=system).num_rows
