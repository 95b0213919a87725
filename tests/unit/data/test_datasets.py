"""Datasets: sources, disjoint splits, and invalid input lines."""

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from raykd.config.sections import Dataset
from raykd.data import datasets
from raykd.storage import row_store, schemas


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Write twenty training and five test problems in GSM8K's form."""
    for split, count in (("train", 20), ("test", 5)):
        lines = [
            json.dumps({"question": f"{split} question {i}?", "answer": f"Half of {4 * i}.\n#### {2 * i}"})
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {"train_file": str(tmp_path / "train.jsonl"), "test_file": str(tmp_path / "test.jsonl")}


def read(folder: Path, split: str) -> list[dict]:
    table = pa_read(folder / f"{split}.parquet")
    return table.to_pylist()


def pa_read(path: Path):
    table = pyarrow.parquet.read_table(path)
    assert table.schema.equals(schemas.PROBLEM)
    return table


def test_splits_have_the_requested_sizes_and_do_not_overlap(tmp_path: Path, files: dict[str, str]):
    folder = datasets.write_splits(Dataset(source="jsonl", num_train=10, num_validation=6, **files), tmp_path)
    train, validation, test = (read(folder, split) for split in datasets.SPLITS)
    assert [len(train), len(validation), len(test)] == [10, 6, 5]
    ids = [row["problem_id"] for row in train + validation + test]
    assert len(set(ids)) == len(ids)
    assert {row["question"].split()[0] for row in train + validation} == {"train"}
    assert {row["question"].split()[0] for row in test} == {"test"}
    assert train[0]["reference_answer"] == str(2 * int(train[0]["question"].split()[2].rstrip("?")))
    assert all(row["other_answer"] != row["reference_answer"] for row in train + validation + test)


def test_validation_does_not_depend_on_num_train(tmp_path: Path, files: dict[str, str]):
    few = datasets.write_splits(Dataset(source="jsonl", num_train=3, num_validation=6, **files), tmp_path)
    many = datasets.write_splits(Dataset(source="jsonl", num_train=14, num_validation=6, **files), tmp_path)
    assert few != many
    assert read(few, "validation") == read(many, "validation")
    assert {row["problem_id"] for row in read(few, "train")} < {row["problem_id"] for row in read(many, "train")}


def test_existing_splits_are_not_rewritten(tmp_path: Path, files: dict[str, str]):
    settings = Dataset(source="jsonl", **files)
    folder = datasets.write_splits(settings, tmp_path)
    written = (folder / "train.parquet").stat().st_mtime_ns
    assert datasets.write_splits(settings, tmp_path) == folder
    assert (folder / "train.parquet").stat().st_mtime_ns == written
    Path(files["test_file"]).write_text('{"question": "Other?", "answer": "#### 1"}\n')
    assert datasets.write_splits(settings, tmp_path) != folder, "the key does not depend on the file"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"question": "Q?"', "not JSON"),
        (b'["a list"]', "not an object"),
        (b'{"question": "Q?"}', "not an object with texts"),
        (b'{"question": "", "answer": "#### 1"}', "not an object with texts"),
        (b'{"question": 3, "answer": "#### 1"}', "not an object with texts"),
        (b'{"question": "\xff", "answer": "#### 1"}', "not valid Unicode"),
        (b'{"question": "\\ud800", "answer": "#### 1"}', "not valid Unicode"),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, line: bytes, words: str):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"question": "Q?", "answer": "#### 1"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: {words}"):
        list(datasets.read_jsonl(file))


def test_solution_without_answer_is_named(tmp_path: Path, files: dict[str, str]):
    Path(files["train_file"]).write_text('{"question": "Q?", "answer": "#### 1"}\n{"question": "R?", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl: problem 2 of train"):
        datasets.write_splits(Dataset(source="jsonl", **files), tmp_path)


def test_too_many_problems_are_refused(tmp_path: Path, files: dict[str, str]):
    for settings in (
        {"num_train": 21},
        {"num_test": 6},
        {"num_validation": 21},
        {"num_train": 15, "num_validation": 6},
    ):
        with pytest.raises(ValueError, match="num_"):
            datasets.write_splits(Dataset(source="jsonl", **settings, **files), tmp_path)
    with pytest.raises(ValueError, match="no file"):
        datasets.write_splits(Dataset(source="jsonl", train_file="nowhere", test_file=files["test_file"]), tmp_path)


def test_demo_splits_have_unique_questions(tmp_path: Path):
    folder = datasets.write_splits(Dataset(source="demo", num_train=50, num_validation=10, num_test=20), tmp_path)
    questions = [row["question"] for split in datasets.SPLITS for row in read(folder, split)]
    assert len(set(questions)) == 80
    assert row_store.read_manifest(folder)


def test_source_gsm8k_uses_the_datasets_library(tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    # `datasets` prefers a local folder of this name to the dataset on the hub.
    folder = tmp_path / "openai" / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n---\n"
    )
    for split in ("train", "test"):
        Path(files[f"{split}_file"]).rename(folder / f"{split}.jsonl")
    monkeypatch.chdir(tmp_path)
    splits = datasets.write_splits(Dataset(source="gsm8k", num_validation=4), tmp_path / "storage")
    assert [datasets.split_size(splits, split) for split in datasets.SPLITS] == [16, 4, 5]
    assert read(splits, "test")[1]["reference_answer"] == "2"


def test_gsm8k_splits_have_expected_sizes_and_answers(tmp_path: Path):
    source = os.environ.get("RAYKD_GSM8K_DIR")
    if not source:
        pytest.skip("RAYKD_GSM8K_DIR is not set: it names the folder with GSM8K's train.jsonl and test.jsonl")
    files = {f"{split}_file": str(Path(source) / f"{split}.jsonl") for split in ("train", "test")}
    folder = datasets.write_splits(Dataset(source="jsonl", num_validation=500, **files), tmp_path)
    assert [datasets.split_size(folder, split) for split in datasets.SPLITS] == [6973, 500, 1319]
    answers = [row["reference_answer"] for split in datasets.SPLITS for row in read(folder, split)]
    assert all(answer.removeprefix("-").isdigit() for answer in answers)
    assert sum(answer.startswith("-") for answer in answers) == 5
