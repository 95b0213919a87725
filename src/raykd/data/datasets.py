"""Problems: GSM8K, JSON lines and the built-in generator become splits of Parquet, a row a problem."""

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
from raykd.errors import UserError
from raykd.storage import filesystem, hashing, row_store, schemas
from raykd.storage.files import read_json, read_table
from raykd.storage.paths import StoragePaths, split_file

SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """The splits of an experiment, written or not."""

    folder: Path
    """`<storage>/problems/<content key>`, where they are or will be."""
    content: Mapping[str, Any]
    """All that determines the rows (`raykd.identity.problem_set`)."""
    counts: Mapping[str, int]
    """Problems by split."""


def resolve_splits(dataset: Dataset, root: Path) -> Splits:
    """Find out what the splits hold; nothing is written, rows that are not there yet are read and counted.

    Args:
        dataset: which problems, and how many.
        root: the storage folder.

    Raises:
        UserError: as `prepare`.
    """
    content, folder = _locate(dataset, root)
    manifest = row_store.read_manifest(folder)
    counts = manifest or {split: sum(1 for _ in rows()) for split, rows in _splits(dataset).items()}
    _check_counts(dataset, counts)
    return Splits(folder, content, {split: counts[split] for split in SPLITS})


def read_split(dataset: Dataset, root: Path, split: str) -> list[Row]:
    """The rows of a split (`schemas.PROBLEM`), written or not; nothing is written.

    Args:
        dataset: which problems, and how many.
        root: the storage folder.
        split: one of `SPLITS`.

    Raises:
        UserError: as `prepare`.
    """
    splits = resolve_splits(dataset, root)
    if row_store.read_manifest(splits.folder):
        return read_table(split_file(splits.folder, split)).to_pylist()
    return list(_with_other_answer(_splits(dataset)[split]()))


def write_splits(dataset: Dataset, root: Path) -> Path:
    """Write the three splits, unless they are there, and return their folder.

    Args:
        dataset: which problems, and how many.
        root: the storage folder; the splits lie in `root/problems/<content key>`.

    Raises:
        UserError: a file that is missing or a line that is no problem, by file and line number.
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
    """For each split a function that reads its rows anew at each call, without `other_answer`.

    Validation is cut from train by a hash of the problem's id, so it is the same whatever the order and
    whatever is added. Rows stream through: the memory used does not grow with their number.
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
        raise UserError(f"num_validation={dataset.num_validation}, but train holds {len(held_out)} problems")
    return {
        "train": lambda: _take((row for row in train() if row["problem_id"] not in held_out), dataset.num_train),
        "validation": lambda: (row for row in train() if row["problem_id"] in held_out),
        "test": lambda: _take(test(), dataset.num_test),
    }


def _check_counts(dataset: Dataset, counts: Mapping[str, int]) -> None:
    for split, wanted in (("train", dataset.num_train), ("test", dataset.num_test)):
        if not counts[split] or (wanted and counts[split] < wanted):
            raise UserError(
                f"dataset.num_{split}={wanted or 'all'}, but the source {dataset.source} has {counts[split]}"
                f" problems left for {split}; ask for fewer"
            )


def split_size(folder: Path, split: str) -> int:
    """How many problems a split holds, without opening it."""
    return read_json(folder / row_store.MANIFEST)[split]


def _locate(dataset: Dataset, root: Path) -> tuple[dict[str, Any], Path]:
    """What determines the splits, and their folder."""
    _check_files(dataset)
    content = identity.problem_set(dataset)
    return content, StoragePaths(root).problems(hashing.content_key(content))


def _check_files(dataset: Dataset) -> None:
    for key, path in (("train_file", dataset.train_file), ("test_file", dataset.test_file)):
        if path and not Path(path).is_file():
            raise UserError(f"problems.{key}: no file {path}")


def _source(dataset: Dataset) -> tuple[Callable[[], Iterator[Row]], Callable[[], Iterator[Row]]]:
    """Functions that read the train and the test split anew at each call."""
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
    # Without the hub and without a copy it is a plain ValueError.
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"openai/gsm8k cannot be loaded ({' '.join(str(error).split())[:200]}); without the hub, download its "
            "files and set dataset.source=jsonl, dataset.train_file and dataset.test_file"
        ) from None
    return (
        lambda: _rows("train", "openai/gsm8k", iter(gsm8k["train"])),
        lambda: _rows("test", "openai/gsm8k", iter(gsm8k["test"])),
    )


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the objects of a file of JSON lines that hold `question` and `answer`.

    Raises:
        UserError: for a line that is no such object, by file and line number.
    """
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                # Both a byte that is no UTF-8 and an escaped half of a surrogate pair end up here.
                (line + json.dumps(row, ensure_ascii=False)).encode()
            except UnicodeEncodeError:
                raise UserError(f"{path}:{number}: not valid Unicode text") from None
            # json has other errors too, for a number too long and for what is nested too deeply.
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            fields = [row.get(key) for key in ("question", "answer")] if isinstance(row, dict) else []
            if not (fields and all(isinstance(field, str) and field.strip() for field in fields)):
                raise UserError(f'{path}:{number}: not an object with texts "question" and "answer"')
            yield row


def _rows(split: str, origin: str, items: Iterator[Row]) -> Iterator[Row]:
    """Turns GSM8K's form into rows of `schemas.PROBLEM`, but for `other_answer`."""
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
    """Writes rows with the answer of another problem beside each; returns their number."""
    count = 0
    with filesystem.atomic_write(path) as temporary, pq.ParquetWriter(temporary, schemas.PROBLEM) as writer:
        batch: list[Row] = []
        for row in _with_other_answer(rows):
            batch.append(row)
            if len(batch) == 1024:
                writer.write_table(pa.Table.from_pylist(batch, schema=schemas.PROBLEM))
                count += len(batch)
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schemas.PROBLEM))
    return count + len(batch)


def _with_other_answer(rows: Iterator[Row]) -> Iterator[Row]:
    """Adds to each row the answer of the nearest row before it that has another answer than its own.

    The first rows, which have none before them, are given the first that follows. Where all answers are the
    same, so is the other answer.
    """
    waiting: list[Row] = []
    previous = other = None
    for row in rows:
        answer = row["reference_answer"]
        if previous is not None and answer != previous:
            other = previous
            for early in waiting:
                yield {**early, "other_answer": answer}
            waiting = []
        previous = answer
        if other is None:
            waiting.append(row)
        else:
            yield {**row, "other_answer": other}
    for early in waiting:
        yield {**early, "other_answer": early["reference_answer"]}


def _take(rows: Iterator[Row], count: int | None) -> Iterator[Row]:
    for index, row in enumerate(rows):
        if count is not None and index >= count:
            return
        yield row
