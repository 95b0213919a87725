"""Problems: GSM8K, JSON lines and the built-in generator become splits of Parquet, a row a problem."""

import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd import identity, location, records, storage
from raykd.answers import reference_answer
from raykd.demo import problems as demo_problems
from raykd.faults import UserError
from raykd.sections import Problems

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


def resolve(problems: Problems, root: Path) -> Splits:
    """Find out what the splits hold; nothing is written, rows that are not there yet are read and counted.

    Args:
        problems: which problems, and how many.
        root: the storage folder.

    Raises:
        UserError: as `prepare`.
    """
    content, folder = _located(problems, root)
    manifest = storage.read_manifest(folder)
    counts = manifest or {split: sum(1 for _ in rows()) for split, rows in _splits(problems).items()}
    _check_counts(problems, counts)
    return Splits(folder, content, {split: counts[split] for split in SPLITS})


def rows_of(problems: Problems, root: Path, split: str) -> list[Row]:
    """The rows of a split (`records.PROBLEM`), written or not; nothing is written.

    Args:
        problems: which problems, and how many.
        root: the storage folder.
        split: one of `SPLITS`.

    Raises:
        UserError: as `prepare`.
    """
    splits = resolve(problems, root)
    if storage.read_manifest(splits.folder):
        return storage.read_table(splits.folder / f"{split}.parquet").to_pylist()
    return list(_with_other_answer(_splits(problems)[split]()))


def prepare(problems: Problems, root: Path) -> Path:
    """Write the three splits, unless they are there, and return their folder.

    Args:
        problems: which problems, and how many.
        root: the storage folder; the splits lie in `root/problems/<content key>`.

    Raises:
        UserError: a file that is missing or a line that is no problem, by file and line number.
    """
    content, folder = _located(problems, root)
    if storage.read_manifest(folder):
        return folder
    counts = {split: _write(folder / f"{split}.parquet", rows()) for split, rows in _splits(problems).items()}
    _check_counts(problems, counts)
    files = [folder / f"{split}.parquet" for split in SPLITS]
    storage.write_manifest(folder, {"content": content, **counts}, files)
    return folder


def _splits(problems: Problems) -> dict[str, Callable[[], Iterator[Row]]]:
    """For each split a function that reads its rows anew at each call, without `other_answer`.

    Validation is cut from train by a hash of the problem's id, so it is the same whatever the order and
    whatever is added. Rows stream through: the memory used does not grow with their number.
    """
    train, test = _source(problems)
    held_out = {
        problem_id
        for _, problem_id in heapq.nsmallest(
            problems.num_validation,
            ((storage.digest(row["problem_id"]), row["problem_id"]) for row in train()),
        )
    }
    if len(held_out) < problems.num_validation:
        raise UserError(f"num_validation={problems.num_validation}, but train holds {len(held_out)} problems")
    return {
        "train": lambda: _take((row for row in train() if row["problem_id"] not in held_out), problems.num_train),
        "validation": lambda: (row for row in train() if row["problem_id"] in held_out),
        "test": lambda: _take(test(), problems.num_test),
    }


def _check_counts(problems: Problems, counts: Mapping[str, int]) -> None:
    for split, wanted in (("train", problems.num_train), ("test", problems.num_test)):
        if not counts[split] or (wanted and counts[split] < wanted):
            raise UserError(
                f"problems.num_{split}={wanted or 'all'}, but the source {problems.source} has {counts[split]}"
                f" problems left for {split}; ask for fewer"
            )


def split_size(folder: Path, split: str) -> int:
    """How many problems a split holds, without opening it."""
    return storage.read_json(folder / storage.MANIFEST)[split]


def _located(problems: Problems, root: Path) -> tuple[dict[str, Any], Path]:
    """What determines the splits, and their folder."""
    _check_files(problems)
    content = identity.problem_set(problems)
    return content, root / "problems" / storage.content_key(content)


def _check_files(problems: Problems) -> None:
    for key, path in (("train_file", problems.train_file), ("test_file", problems.test_file)):
        if path and not Path(path).is_file():
            raise UserError(f"problems.{key}: no file {path}")


def _source(problems: Problems) -> tuple[Callable[[], Iterator[Row]], Callable[[], Iterator[Row]]]:
    """Functions that read the train and the test split anew at each call."""
    if problems.source == "demo":
        assert problems.num_train and problems.num_test
        count = problems.num_train + problems.num_validation
        return (
            lambda: _rows("train", "demo", demo_problems.generate("train", count, problems.seed)),
            lambda: _rows("test", "demo", demo_problems.generate("test", problems.num_test or 0, problems.seed)),
        )
    if problems.source == "jsonl":
        train, test = Path(problems.train_file or ""), Path(problems.test_file or "")
        return (
            lambda: _rows("train", str(train), read_jsonl(train)),
            lambda: _rows("test", str(test), read_jsonl(test)),
        )
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        gsm8k: Any = datasets.load_dataset("openai/gsm8k", "main", revision=problems.revision)
    # Without the hub and without a copy it is a plain ValueError.
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"openai/gsm8k cannot be loaded ({' '.join(str(error).split())[:200]}); without the hub, download its "
            "files and set problems.source=jsonl, problems.train_file and problems.test_file"
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
    """Turns GSM8K's form into rows of `records.PROBLEM`, but for `other_answer`."""
    for number, item in enumerate(items, start=1):
        try:
            answer = reference_answer(item["answer"])
        except UserError as error:
            raise UserError(f"{origin}: problem {number} of {split}: {error}") from None
        question = item["question"].strip()
        yield {
            "problem_id": f"{split}-{number:06d}-{storage.digest(question)[:8]}",
            "question": question,
            "reference_solution": item["answer"].strip(),
            "reference_answer": answer,
        }


def _write(path: Path, rows: Iterator[Row]) -> int:
    """Writes rows with the answer of another problem beside each; returns their number."""
    count = 0
    with location.written(path) as temporary, pq.ParquetWriter(temporary, records.PROBLEM) as writer:
        batch: list[Row] = []
        for row in _with_other_answer(rows):
            batch.append(row)
            if len(batch) == 1024:
                writer.write_table(pa.Table.from_pylist(batch, schema=records.PROBLEM))
                count += len(batch)
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=records.PROBLEM))
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
