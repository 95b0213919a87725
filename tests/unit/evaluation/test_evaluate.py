"""Evaluate: what becomes of an engine's answer."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from raykd.config.engine import Engine, Sampling
from raykd.config.sections import Evaluate, Student
from raykd.data import grading, prompts
from raykd.evaluation import evaluate, student_batch
from raykd.models import loading, tokenization
from raykd.storage import row_store, schemas

END = 1


def scored(folder: Path, rows: list[dict], **told) -> list[dict]:
    shared = {"trial_id": "t", "arm": "a", "seed": 0, "question": "?", "reference_answer": "42"}
    shared |= {"protocol": "zero_shot_raw", "sample_index": 2}
    rows = [{"prediction_id": f"t/{n}", "problem_id": str(n), **shared, **row} for n, row in enumerate(rows)]
    batch = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    counts = evaluate.ScoreAnswers(folder, {END}, Evaluate(**told))(batch)
    assert counts["rows"] == [len(rows)]
    return row_store.read_rows(folder, schemas.PREDICTION).sort_by("prediction_id").to_pylist()


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


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(tmp_path: Path):
    rows = scored(
        tmp_path,
        [
            answer("#### 42\n\nQuestion:", [5, 6, 7]),
            answer("#### 42\nQuestion: what", [5, 6, 7]),
            answer("#### 42\n", [5, END]),
        ],
        protocol="zero_shot_raw",
    )
    assert [row["completion"] for row in rows] == ["#### 42\n\n", "#### 42\nQuestion: what", "#### 42\n"]
    assert [row["finish_reason"] for row in rows] == ["stop", "length", "stop"]
    assert {row["sample_index"] for row in rows} == {2}


def test_the_tokens_that_end_an_answer_are_those_of_the_model():
    assert tokenization.end_token_ids(Student(model="raykd/demo-student")) == {END}


def test_an_untouched_student_alone_needs_no_adapter(tmp_path: Path):
    assert student_batch.with_null_adapter([student_batch.BASE_STUDENT], tmp_path) == [student_batch.BASE_STUDENT]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_greedy_answers_carry_no_seed(temperature: float):
    params = student_batch.sampling_params(Evaluate(sampling=Sampling(temperature=temperature)), seed=3)
    assert ("seed" in params) == (temperature > 0)
    assert "stop" not in params


def test_stop_strings_are_the_protocol_s_where_none_are_given():
    raw = Evaluate(protocol="zero_shot_raw")
    assert student_batch.sampling_params(raw, seed=0)["stop"] == ["Question:"]
    assert "stop" not in student_batch.sampling_params(raw.model_copy(update={"stop": ()}), seed=0)
    assert student_batch.sampling_params(Evaluate(stop=("\n\n",)), seed=0)["stop"] == ["\n\n"]


def test_each_way_of_asking_has_a_folder_of_its_own():
    ways = [
        Evaluate(),
        Evaluate(protocol="eight_shot_cot"),
        Evaluate(stop=("x",)),
        Evaluate(sampling=Sampling(max_tokens=9)),
        Evaluate(sampling=Sampling(temperature=0.5)),
        Evaluate(sampling=Sampling(temperature=0.5), num_samples=3),
        Evaluate(engine=Engine(engine_kwargs={"dtype": "float32"})),
    ]
    assert len({evaluate.folder_name(each) for each in ways}) == len(ways)
    # Of greedy answers chance is no part, and of none how many are asked at once.
    assert evaluate.folder_name(Evaluate(sampling=Sampling(seed=7), batch_size=3)) == evaluate.folder_name(Evaluate())


def test_each_student_is_asked_its_own_problems_one_student_after_the_other():
    problems = [
        {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": str(n), "question": f"What is {n} + 1?"}
        for n in range(4)
    ]
    eval_models = [
        student_batch.StudentModel("a", "a", 0, Path("a")),
        student_batch.StudentModel("b", "b", 0, Path("b"), problem_ids=frozenset({"1", "3"})),
    ]
    ask = student_batch.BuildEvalPrompts(eval_models, Student(model="raykd/demo-student"), Evaluate(), "", done={"a/2"})
    asked = ask(pa.Table.from_pylist(problems, schema=schemas.PROBLEM)).to_pylist()
    assert [row["prediction_id"] for row in asked] == ["a/0", "a/1", "a/3", "b/1", "b/3"]
    assert [row["model"] for row in asked] == ["a"] * 3 + ["b"] * 2
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    for row in asked:
        assert f"What is {row['problem_id']} + 1?" in tokenizer.decode(row["tokenized_prompt"])
    assert len({row["answer_seed"] for row in asked}) == 5


def asked(protocol: str, num_samples: int = 1, instruction: str = "") -> list[dict]:
    problem = {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": "p", "question": "What is 1 + 1?"}
    told = Evaluate(protocol=protocol, num_samples=num_samples, sampling=Sampling(temperature=float(num_samples > 1)))
    ask = student_batch.BuildEvalPrompts(
        [student_batch.BASE_STUDENT], Student(model="raykd/demo-student"), told, instruction, set()
    )
    return ask(pa.Table.from_pylist([problem], schema=schemas.PROBLEM)).to_pylist()


def test_what_an_answer_draws_stems_from_no_key():
    problem = {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": "p", "question": "What is 1 + 1?"}
    eval_models = [
        student_batch.StudentModel(trial_id, "arm", seed, Path(trial_id))
        for trial_id, seed in (("arm-s0-0123abcd", 0), ("arm-s0-4567abcd", 0), ("arm-s1-0123abcd", 1))
    ]
    ask = student_batch.BuildEvalPrompts(eval_models, Student(model="raykd/demo-student"), Evaluate(), "", done=set())
    rows = ask(pa.Table.from_pylist([problem], schema=schemas.PROBLEM)).to_pylist()
    first, other_key, other_seed = (row["answer_seed"] for row in rows)
    assert first == other_key != other_seed


def test_eight_worked_problems_come_before_the_question_as_turns():
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    (row,) = asked("eight_shot_cot", instruction="End with '#### N'.")
    text = tokenizer.decode(row["tokenized_prompt"])
    assert text.count("<|user|>") == 9 and text.count("<|assistant|>") == 9
    assert text.count("End with '#### N'.") == 9
    assert text.endswith("What is 1 + 1?\n\nEnd with '#### N'." + tokenizer.eos_token + "<|assistant|>")


def test_a_raw_question_is_a_text_without_turns():
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    (row,) = asked("zero_shot_raw")
    assert row["tokenized_prompt"] == tokenizer("Question: What is 1 + 1?\nAnswer:")["input_ids"]


def test_samples_are_rows_of_their_own_with_a_seed_each():
    rows = asked("zero_shot_chat", num_samples=3)
    assert [row["prediction_id"] for row in rows] == ["base/p", "base/p/1", "base/p/2"]
    assert [row["sample_index"] for row in rows] == [0, 1, 2]
    assert len({row["answer_seed"] for row in rows}) == 3


def test_the_worked_problems_are_right():
    for each in prompts.EIGHT_SHOT_EXEMPLARS:
        for left, right in re.findall(r"([\d.][\d.+*/() -]*) = ([\d.]+)", each.answer):
            assert eval(left) == float(right), (left, right)
        assert grading.strict_match(each.answer) == re.findall(r"= ([\d.]+)", each.answer)[-1]
        assert not grading.states_answer_first(each.answer)
    assert len({each.question for each in prompts.EIGHT_SHOT_EXEMPLARS}) == 8


def test_all_complete_answers_are_collected_in_one_file(tmp_path: Path):
    folder = tmp_path / "predictions"
    for name, is_sealed in (("chat", True), ("raw", True), ("unfinished", False)):
        rows = scored(folder / name, [answer("#### 42", [5, END]), answer("#### 4", [5])])
        if is_sealed:
            row_store.finalize(folder / name, schemas.PREDICTION, "prediction_id", {"trials": ["t"]})
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "predictions.parquet")
    assert found.schema.names == ["evaluation", *schemas.PREDICTION.names]
    assert found["evaluation"].to_pylist() == ["chat"] * 2 + ["raw"] * 2
    before = (tmp_path / "predictions.parquet").stat().st_mtime_ns
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    assert (tmp_path / "predictions.parquet").stat().st_mtime_ns == before, "nothing new"
    row_store.finalize(folder / "unfinished", schemas.PREDICTION, "prediction_id", {"trials": ["t"]})
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "predictions.parquet").num_rows == 3 * len(rows)
