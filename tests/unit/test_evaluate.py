"""Evaluate: what becomes of an engine's answer."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raykd import evaluate, models, records, storage
from raykd.sections import Sampling, Student

END = 1


def scored(folder: Path, rows: list[dict]) -> list[dict]:
    shared = {"trial_id": "t", "arm": "a", "seed": 0, "question": "?", "reference_answer": "42"}
    rows = [{"prediction_id": f"t/{n}", "problem_id": str(n), **shared, **row} for n, row in enumerate(rows)]
    batch = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    counts = evaluate.Score(folder, ends={END})(batch)
    assert counts["rows"] == [len(rows)]
    return storage.open_rows(folder, records.PREDICTION).to_table().sort_by("prediction_id").to_pylist()


def answer(text: str, tokens: list[int], error: str = "") -> dict:
    return {"generated_text": text, "generated_tokens": np.array(tokens), "__inference_error__": error}


def test_an_answer_is_cut_only_where_it_did_not_end_by_itself(tmp_path: Path):
    rows = scored(
        tmp_path,
        [
            answer("#### 42", [5, END]),
            # Shorter than another that was not cut: the engine's context ended.
            answer("#### 42", [5]),
            answer("and then 42", [5, 6, 7]),
            answer("", [], "ValueError: too long"),
        ],
    )
    assert [row["finish_reason"] for row in rows] == ["stop", "length", "length", "error"]
    assert [row["num_tokens"] for row in rows] == [2, 1, 3, 0]
    assert [row["is_correct_strict"] for row in rows] == [True, True, False, False]
    assert [row["is_correct_flexible"] for row in rows] == [True, True, True, False]
    assert rows[3]["error"] == "ValueError: too long"


def test_the_tokens_that_end_an_answer_are_those_of_the_model():
    assert models.end_token_ids("raykd/demo-student", None) == {END}


def test_an_untouched_student_alone_needs_no_adapter(tmp_path: Path):
    assert evaluate._with_null_adapter([evaluate.UNTOUCHED_STUDENT], tmp_path) == [evaluate.UNTOUCHED_STUDENT]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_greedy_answers_carry_no_seed(temperature: float):
    params = evaluate.sampling_params(Sampling(temperature=temperature), seed=3)
    assert ("seed" in params) == (temperature > 0)


def test_each_student_is_asked_its_own_problems_one_student_after_the_other():
    problems = [
        {**dict.fromkeys(records.PROBLEM.names, ""), "problem_id": str(n), "question": f"What is {n} + 1?"}
        for n in range(4)
    ]
    contestants = [
        evaluate.Contestant("a", "a", 0, Path("a")),
        evaluate.Contestant("b", "b", 0, Path("b"), problem_ids=frozenset({"1", "3"})),
    ]
    ask = evaluate.Ask(contestants, Student(model="raykd/demo-student"), "", done={"a/2"})
    asked = ask(pa.Table.from_pylist(problems, schema=records.PROBLEM)).to_pylist()
    assert [row["prediction_id"] for row in asked] == ["a/0", "a/1", "a/3", "b/1", "b/3"]
    assert [row["model"] for row in asked] == ["a"] * 3 + ["b"] * 2
    tokenizer = models.load_tokenizer("raykd/demo-student", None)
    for row in asked:
        assert f"What is {row['problem_id']} + 1?" in tokenizer.decode(row["tokenized_prompt"])
    assert len({row["answer_seed"] for row in asked}) == 5
