"""Datasets: problems of GSM8K, JSON lines or the built-in generator as splits in Parquet, one row per problem."""

import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd import identity
from raykd.config.sections import Dataset
from raykd.data import demo_problems
from raykd.data.grading import reference_answer
from raykd.display import summary
from raykd.errors import UserError
from raykd.storage import filesystem, hashing, row_store, schemas
from raykd.storage.files import ROW_GROUP_SIZE, read_json, read_table
from raykd.storage.paths import SPLITS, StoragePaths, split_file

Row = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """The splits of an experiment, whether written yet or not."""

    folder: Path
    """`<storage>/problems/<content key>`."""
    content: Mapping[str, Any]
    """All settings that determine the rows (`raykd.identity.problem_set`)."""
    counts: Mapping[str, int]
    """Problems by split."""


def resolve_splits(dataset: Dataset, root: Path) -> Splits:
    """Return the splits without writing them; the rows of splits that are not written yet are read and counted.

    Args:
        dataset: the `dataset` section.
        root: the storage folder.

    Raises:
        UserError: as for `write_splits`.
    """
    content, folder = _locate(dataset, root)
    manifest = row_store.read_manifest(folder)
    counts = manifest or {split: sum(1 for _ in rows()) for split, rows in _splits(dataset).items()}
    _check_counts(dataset, counts)
    return Splits(folder, content, {split: counts[split] for split in SPLITS})


def read_split(dataset: Dataset, root: Path, split: str) -> list[Row]:
    """Return the rows of a split (`schemas.PROBLEM`), whether written yet or not. Nothing is written.

    Args:
        dataset: the `dataset` section.
        root: the storage folder.
        split: one of `SPLITS`.

    Raises:
        UserError: as for `write_splits`.
    """
    splits = resolve_splits(dataset, root)
    if row_store.read_manifest(splits.folder):
        return read_table(split_file(splits.folder, split)).to_pylist()
    return list(_with_other_answer(_splits(dataset)[split]()))


def write_splits(dataset: Dataset, root: Path) -> Path:
    """Write the three splits, unless they exist, and return their folder.

    Args:
        dataset: the `dataset` section.
        root: the storage folder; the splits are written to `root/problems/<content key>`.

    Raises:
        UserError: a missing file, an invalid line (by file and line number), or fewer problems than requested.
    """
    content, folder = _locate(dataset, root)
    if row_store.read_manifest(folder):
        return folder
    counts = {split: _write(split_file(folder, split), rows()) for split, rows in _splits(dataset).items()}
    _check_counts(dataset, counts)
    files = [split_file(folder, split) for split in SPLITS]
    row_store.write_manifest(folder, {"content": content, **counts}, files)
    return folder


def _splits(dataset: Dataset) -> dict[str, Callable[[], Iterator[Row]]]:
    """Return for each split a function that reads its rows at each call, without `other_answer`.

    Validation is cut from train by a hash of the problem's id, so that it does not depend on the order or the number of
    training problems. Rows are streamed: memory does not grow with their number.
    """
    train, test = _source(dataset)
    held_out = {
        problem_id
        for _, problem_id in heapq.nsmallest(
            dataset.num_validation,
            ((hashing.text_digest(row["problem_id"]), row["problem_id"]) for row in train()),
        )
    }
    if len(held_out) < dataset.num_validation:
        raise UserError(
            f"dataset.num_validation={dataset.num_validation}, but train has {len(held_out)} problems; lower it"
        )
    return {
        "train": lambda: _take((row for row in train() if row["problem_id"] not in held_out), dataset.num_train),
        "validation": lambda: (row for row in train() if row["problem_id"] in held_out),
        "test": lambda: _take(test(), dataset.num_test),
    }


def _check_counts(dataset: Dataset, counts: Mapping[str, int]) -> None:
    for split, requested in (("train", dataset.num_train), ("test", dataset.num_test)):
        if not counts[split] or (requested and counts[split] < requested):
            raise UserError(
                f"dataset.num_{split}={requested or 'all'}, but the source {dataset.source} has {counts[split]}"
                f" problems left for {split}; lower dataset.num_{split}"
            )


def split_size(folder: Path, split: str) -> int:
    """Return the number of problems of a split, from the manifest."""
    return read_json(folder / row_store.MANIFEST)[split]


def _locate(dataset: Dataset, root: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings that determine the splits, and their folder."""
    _check_files(dataset)
    content = identity.problem_set(dataset)
    return content, StoragePaths(root).problems(hashing.content_key(content))


def _check_files(dataset: Dataset) -> None:
    for key, path in (("train_file", dataset.train_file), ("test_file", dataset.test_file)):
        if path and not Path(path).is_file():
            raise UserError(f"dataset.{key}: no file {path}")


def _source(dataset: Dataset) -> tuple[Callable[[], Iterator[Row]], Callable[[], Iterator[Row]]]:
    """Return two functions, which read the train and the test split at each call."""
    if dataset.source == "demo":
        assert dataset.num_train and dataset.num_test
        count = dataset.num_train + dataset.num_validation
        return (
            lambda: _rows("train", "demo", demo_problems.generate("train", count, dataset.seed)),
            lambda: _rows("test", "demo", demo_problems.generate("test", dataset.num_test or 0, dataset.seed)),
        )
    if dataset.source == "jsonl":
        train, test = Path(dataset.train_file or ""), Path(dataset.test_file or "")
        return (
            lambda: _rows("train", str(train), read_jsonl(train)),
            lambda: _rows("test", str(test), read_jsonl(test)),
        )
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        gsm8k: Any = datasets.load_dataset("openai/gsm8k", "main", revision=dataset.revision)
    # `datasets` raises a plain ValueError where neither the hub nor a cached copy is available.
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"openai/gsm8k cannot be loaded ({summary(error)}); without the hub, download its "
            "files and set dataset.source=jsonl, dataset.train_file and dataset.test_file"
        ) from None
    return (
        lambda: _rows("train", "openai/gsm8k", iter(gsm8k["train"])),
        lambda: _rows("test", "openai/gsm8k", iter(gsm8k["test"])),
    )


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the objects of a file of JSON lines; each must have the texts `question` and `answer`.

    Raises:
        UserError: an invalid line, by file and line number.
    """
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                # Fails for bytes that are not UTF-8 (surrogateescape), and for an escaped half of a surrogate pair.
                (line + json.dumps(row, ensure_ascii=False)).encode()
            except UnicodeEncodeError:
                raise UserError(f"{path}:{number}: not valid Unicode text") from None
            # json also raises ValueError for numbers that are too long and RecursionError for deep nesting.
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            fields = [row.get(key) for key in ("question", "answer")] if isinstance(row, dict) else []
            if not (fields and all(isinstance(field, str) and field.strip() for field in fields)):
                raise UserError(f'{path}:{number}: not an object with texts "question" and "answer"')
            yield row


def _rows(split: str, origin: str, items: Iterator[Row]) -> Iterator[Row]:
    """Yield rows of `schemas.PROBLEM` without `other_answer` from objects in GSM8K's form.

    Args:
        split: `train` or `test`; part of the problems' ids.
        origin: the file or the dataset, for error messages.
        items: objects with `question` and `answer`.
    """
    for number, item in enumerate(items, start=1):
        try:
            answer = reference_answer(item["answer"])
        except UserError as error:
            raise UserError(f"{origin}: problem {number} of {split}: {error}") from None
        question = item["question"].strip()
        yield {
            "problem_id": f"{split}-{number:06d}-{hashing.text_digest(question)[:8]}",
            "question": question,
            "reference_solution": item["answer"].strip(),
            "reference_answer": answer,
        }


def _write(path: Path, rows: Iterator[Row]) -> int:
    """Write rows to a Parquet file, with `other_answer` added, and return their number."""
    count = 0
    with filesystem.atomic_write(path) as temporary, pq.ParquetWriter(temporary, schemas.PROBLEM) as writer:
        batch: list[Row] = []
        for row in _with_other_answer(rows):
            batch.append(row)
            if len(batch) == ROW_GROUP_SIZE:
                writer.write_table(pa.Table.from_pylist(batch, schema=schemas.PROBLEM))
                count += len(batch)
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schemas.PROBLEM))
    return count + len(batch)


def _with_other_answer(rows: Iterator[Row]) -> Iterator[Row]:
    """Add `other_answer` to each row: the answer of the nearest earlier row with a different answer.

    The first rows, before any different answer, get the first different answer that follows. If all answers are the
    same, `other_answer` is that answer.
    """
    waiting: list[Row] = []
    previous = other = None
    for row in rows:
        answer = row["reference_answer"]
        if previous is not None and answer != previous:
            other = previous
            for earlier in waiting:
                yield {**earlier, "other_answer": answer}
            waiting = []
        previous = answer
        if other is None:
            waiting.append(row)
        else:
            yield {**row, "other_answer": other}
    for earlier in waiting:
        yield {**earlier, "other_answer": earlier["reference_answer"]}


def _take(rows: Iterator[Row], count: int | None) -> Iterator[Row]:
    """Yield the first `count` rows; all where it is None."""
    for index, row in enumerate(rows):
        if count is not None and index >= count:
            return
        yield row
