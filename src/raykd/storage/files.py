"""Read and write text, JSON and Parquet files; a file appears whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from raykd.errors import UserError
from raykd.storage import filesystem

# Rows. Small groups, so that a reader can stream and can split one file over several tasks.
ROW_GROUP_SIZE = 1024


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    filesystem.put(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_text` writes text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: where the file is cut or altered, with its path and what to do.
    """
    return _parse_object(filesystem.read_bytes(path), str(path), "delete it, and the stage is done again")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON, an object a line.

    Raises:
        UserError: where a line is cut or altered, with its place and what to do.
    """
    lines = filesystem.read_bytes(path).split(b"\n")
    return [
        _parse_object(line, f"{path}, line {number}", "delete the file's folder")
        for number, line in enumerate(lines, start=1)
        if line or number < len(lines)
    ]


def _parse_object(content: bytes, where: str, remedy: str) -> dict[str, Any]:
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
    filesystem.put(path, content)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a Parquet file that is there whole or not at all."""
    with filesystem.atomic_write(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP_SIZE)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file; None for all columns."""
    path, system = filesystem.for_arrow(file)
    return pq.read_table(path, columns=list(columns) if columns else None, filesystem=system)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Reads a Parquet file bit by bit."""
    with filesystem.local_copy(file) as local, pq.ParquetFile(local) as opened:
        yield from opened.iter_batches()


def num_rows(file: Path) -> int:
    """How many rows a Parquet file holds, without reading them."""
    path, system = filesystem.for_arrow(file)
    return pq.read_metadata(path, filesystem=system).num_rows
