"""The texts of the attention stage, and the rows that it writes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from raykd.config.sections import Attention
from raykd.config.training import Student
from raykd.data import prompts
from raykd.evaluation import attention, attention_heads
from raykd.models import loading, tokenization
from raykd.models.loading import load_base_model
from raykd.storage import files, row_store, schemas

STUDENT = Student(model="raykd/demo-student")
PROBLEMS = [
    {
        "problem_id": f"p{number}",
        "question": f"Ann has {number} apples and buys 12 more. How many apples does she have?",
        "reference_solution": f"Ann has {number} + 12 = {number + 12} apples.\nSo {number + 12} + 0 = {number + 12}.\n"
        f"#### {number + 12}",
        "reference_answer": str(number + 12),
        "other_answer": "7",
    }
    for number in range(30, 35)
]


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(Student(model="raykd/demo-student"))


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    files.write_table(tmp_path / "test.parquet", pa.Table.from_pylist(PROBLEMS, schema=schemas.PROBLEM))
    return tmp_path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with random, non-zero weights."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    get_peft_model(load_base_model(STUDENT, torch.float32), lora).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def stage(problems: Path) -> attention.MeasureAttention:
    return attention.MeasureAttention(
        student=STUDENT,
        attention=Attention(batch_size=2),
        dtype="float32",
        problems=problems,
        instruction="",
        accelerator="cpu",
        folder=problems / "rows",
    )


def parts(adapters: list[str], ids: list[str]) -> list[pa.Table]:
    students = [
        {"trial_id": f"t{n}", "arm": "a", "seed": n, "adapter": adapter, "adapter_digest": f"digest {n}"}
        for n, adapter in enumerate(adapters)
    ]
    return [pa.Table.from_pylist([student | {"problem_ids": ids}]) for student in students]


def values(problems: Path) -> dict[str, np.ndarray]:
    rows = row_store.read_rows(problems / "rows", schemas.ATTENTION).to_pylist()
    return {row["attention_id"]: np.array(row["values"]) for row in rows}


def test_text_has_positions_of_numbers_and_results(tokenizer):
    text = attention.attention_text(PROBLEMS[0], tokenizer, "End with a number like 99.", None)
    whole = text.prompt_token_ids + text.completion_token_ids
    assert text.prompt_token_ids == tokenization.prompt_token_ids(
        tokenizer, prompts.student_messages(PROBLEMS[0], "End with a number like 99.")
    )
    assert tokenizer.decode([whole[at] for at in text.question_numbers]).replace(" ", "") == "3012"
    assert tokenizer.decode(text.completion_token_ids[:-1]) == PROBLEMS[0]["reference_solution"]
    assert text.completion_token_ids[-1] == tokenizer.eos_token_id
    # From the second line on, the previous result is that of the first line, 42, which the second line repeats.
    results = {tokenizer.decode([whole[at] for at in found]).replace(" ", "") for found in text.previous_results}
    assert results == {"", "42"}
    assert not text.previous_results[0] and text.previous_results[-1]
    assert max(text.previous_results[-1]) < len(text) - 1


def test_each_student_is_measured_with_its_own_adapter(problems: Path, adapter: Path):
    measure = stage(problems)
    ids = [row["problem_id"] for row in PROBLEMS]
    for part in parts(["", str(adapter), "", str(adapter)], ids):
        assert measure(part) == {"rows": [5], "tokens": [sum_of_tokens()]}
    measured = values(problems)
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    model = load_base_model(STUDENT, torch.float32).eval()
    texts = [attention.attention_text(row, tokenizer, "", None) for row in PROBLEMS]
    base = attention_heads.attention_statistics(model, texts, 0)
    adapted = attention_heads.attention_statistics(PeftModel.from_pretrained(model, str(adapter)).eval(), texts, 0)
    assert np.nanmax(np.abs(base - adapted)) > 1e-3
    for trial, expected in (("t0", base), ("t1", adapted), ("t2", base), ("t3", adapted)):
        for problem_id, each in zip(ids, expected, strict=True):
            np.testing.assert_allclose(measured[f"{trial}/{problem_id}"], each.ravel(), rtol=1e-4, atol=1e-6)


def sum_of_tokens() -> int:
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    return sum(len(tokenizer(row["reference_solution"])["input_ids"]) + 1 for row in PROBLEMS)


def test_failed_text_has_error_and_others_have_values(problems: Path):
    long = PROBLEMS[1] | {"reference_solution": "1 + 1 = 2\n" * 300 + "#### 2"}
    rows = [PROBLEMS[0], long, *PROBLEMS[2:]]
    files.write_table(problems / "test.parquet", pa.Table.from_pylist(rows, schema=schemas.PROBLEM))
    stage(problems)(parts([""], [row["problem_id"] for row in rows])[0])
    written = row_store.read_rows(problems / "rows", schemas.ATTENTION).to_pylist()
    errors = {row["problem_id"]: row["error"] for row in written}
    assert "more than the model's" in errors.pop("p31")
    assert set(errors.values()) == {""}
    assert all(bool(row["values"]) == (row["problem_id"] != "p31") for row in written)


def test_settings_that_change_statistics_change_the_folder():
    names = {
        attention.attention_folder_name(settings, dtype)
        for settings, dtype in (
            (Attention(), "float32"),
            (Attention(num_problems=9), "float32"),
            (Attention(), "bfloat16"),
        )
    }
    assert len(names) == 3
    assert attention.attention_folder_name(Attention(batch_size=3, num_workers=4), "float32") in names
