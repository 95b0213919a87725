"""The prompts of an evaluation, and the scores of an engine's answers."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from raykd.config.engine import Engine, Sampling
from raykd.config.sections import Evaluate
from raykd.config.training import Student
from raykd.data import grading, prompts
from raykd.evaluation import evaluate, student_batch
from raykd.models import loading, tokenization
from raykd.storage import row_store, schemas

END = 1


def scored(folder: Path, rows: list[dict], **settings) -> list[dict]:
    shared = {"trial_id": "t", "arm": "a", "seed": 0, "adapter_digest": "", "question": "?", "reference_answer": "42"}
    shared |= {"protocol": "zero_shot_raw", "sample_index": 2}
    rows = [{"prediction_id": f"t/{n}", "problem_id": str(n), **shared, **row} for n, row in enumerate(rows)]
    batch = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    counts = evaluate.ScoreAnswers(folder, {END}, Evaluate(**settings))(batch)
    assert counts["rows"] == [len(rows)]
    return row_store.read_rows(folder, schemas.PREDICTION).sort_by("prediction_id").to_pylist()


def answer(text: str, tokens: list[int], error: str = "") -> dict:
    return {"generated_text": text, "generated_tokens": np.array(tokens), "__inference_error__": error}


def test_answer_without_end_token_is_truncated(tmp_path: Path):
    rows = scored(
        tmp_path,
        [
            answer("#### 42", [5, END]),
            # Shorter than max_tokens: truncated at the engine's context length.
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


def test_stop_string_ends_answer_and_is_removed(tmp_path: Path):
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


def test_end_token_ids_are_read_from_model():
    assert tokenization.end_token_ids(Student(model="raykd/demo-student")) == {END}


def test_base_student_alone_needs_no_null_adapter(tmp_path: Path):
    assert student_batch.with_null_adapter([student_batch.BASE_STUDENT], tmp_path) == [student_batch.BASE_STUDENT]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_greedy_answers_have_no_seed(temperature: float):
    params = student_batch.sampling_params(Evaluate(sampling=Sampling(temperature=temperature)), seed=3)
    assert ("seed" in params) == (temperature > 0)
    assert "stop" not in params


def test_stop_strings_default_to_protocol():
    raw = Evaluate(protocol="zero_shot_raw")
    assert student_batch.sampling_params(raw, seed=0)["stop"] == ["Question:"]
    assert "stop" not in student_batch.sampling_params(raw.model_copy(update={"stop": ()}), seed=0)
    assert student_batch.sampling_params(Evaluate(stop=("\n\n",)), seed=0)["stop"] == ["\n\n"]


def test_settings_that_change_answers_change_the_folder():
    evaluations = [
        Evaluate(),
        Evaluate(protocol="eight_shot_cot"),
        Evaluate(stop=("x",)),
        Evaluate(sampling=Sampling(max_tokens=9)),
        Evaluate(sampling=Sampling(temperature=0.5)),
        Evaluate(sampling=Sampling(temperature=0.5), num_samples=3),
        Evaluate(engine=Engine(engine_kwargs={"dtype": "float32"})),
    ]
    assert len({evaluate.folder_name(each) for each in evaluations}) == len(evaluations)
    # The seed does not change greedy answers, and the batch size changes none.
    assert evaluate.folder_name(Evaluate(sampling=Sampling(seed=7), batch_size=3)) == evaluate.folder_name(Evaluate())


def test_prompts_are_ordered_by_student_with_its_own_problems():
    problems = [
        {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": str(n), "question": f"What is {n} + 1?"}
        for n in range(4)
    ]
    eval_models = [
        student_batch.StudentModel("a", "a", 0, Path("a")),
        student_batch.StudentModel("b", "b", 0, Path("b"), problem_ids=frozenset({"1", "3"})),
    ]
    build_prompts = student_batch.BuildEvalPrompts(
        eval_models, Student(model="raykd/demo-student"), Evaluate(), "", done={"a/2"}
    )
    rows = build_prompts(pa.Table.from_pylist(problems, schema=schemas.PROBLEM)).to_pylist()
    assert [row["prediction_id"] for row in rows] == ["a/0", "a/1", "a/3", "b/1", "b/3"]
    assert [row["model"] for row in rows] == ["a"] * 3 + ["b"] * 2
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    for row in rows:
        assert f"What is {row['problem_id']} + 1?" in tokenizer.decode(row["tokenized_prompt"])
    assert len({row["answer_seed"] for row in rows}) == 5


def prompt_rows(protocol: str, num_samples: int = 1, instruction: str = "") -> list[dict]:
    problem = {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": "p", "question": "What is 1 + 1?"}
    evaluation = Evaluate(
        protocol=protocol, num_samples=num_samples, sampling=Sampling(temperature=float(num_samples > 1))
    )
    build_prompts = student_batch.BuildEvalPrompts(
        [student_batch.BASE_STUDENT], Student(model="raykd/demo-student"), evaluation, instruction, set()
    )
    return build_prompts(pa.Table.from_pylist([problem], schema=schemas.PROBLEM)).to_pylist()


def test_answer_seed_does_not_depend_on_keys():
    problem = {**dict.fromkeys(schemas.PROBLEM.names, ""), "problem_id": "p", "question": "What is 1 + 1?"}
    eval_models = [
        student_batch.StudentModel(trial_id, "arm", seed, Path(trial_id))
        for trial_id, seed in (("arm-s0-0123abcd", 0), ("arm-s0-4567abcd", 0), ("arm-s1-0123abcd", 1))
    ]
    build_prompts = student_batch.BuildEvalPrompts(
        eval_models, Student(model="raykd/demo-student"), Evaluate(), "", done=set()
    )
    rows = build_prompts(pa.Table.from_pylist([problem], schema=schemas.PROBLEM)).to_pylist()
    first, other_key, other_seed = (row["answer_seed"] for row in rows)
    assert first == other_key != other_seed


def test_eight_shot_exemplars_precede_the_question_as_turns():
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    (row,) = prompt_rows("eight_shot_cot", instruction="End with '#### N'.")
    text = tokenizer.decode(row["tokenized_prompt"])
    assert text.count("<|user|>") == 9 and text.count("<|assistant|>") == 9
    assert text.count("End with '#### N'.") == 9
    assert text.endswith("What is 1 + 1?\n\nEnd with '#### N'." + tokenizer.eos_token + "<|assistant|>")


def test_raw_prompt_has_no_chat_turns():
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    (row,) = prompt_rows("zero_shot_raw")
    assert row["tokenized_prompt"] == tokenizer("Question: What is 1 + 1?\nAnswer:")["input_ids"]


def test_each_sample_is_a_row_with_its_own_seed():
    rows = prompt_rows("zero_shot_chat", num_samples=3)
    assert [row["prediction_id"] for row in rows] == ["base/p", "base/p/1", "base/p/2"]
    assert [row["sample_index"] for row in rows] == [0, 1, 2]
    assert len({row["answer_seed"] for row in rows}) == 3


def test_exemplars_are_correct():
    for each in prompts.EIGHT_SHOT_EXEMPLARS:
        for left, right in re.findall(r"([\d.][\d.+*/() -]*) = ([\d.]+)", each.answer):
            assert eval(left) == float(right), (left, right)
        assert grading.strict_match(each.answer) == re.findall(r"= ([\d.]+)", each.answer)[-1]
        assert not grading.states_answer_first(each.answer)
    assert len({each.question for each in prompts.EIGHT_SHOT_EXEMPLARS}) == 8


def test_complete_predictions_are_collected_in_one_file(tmp_path: Path):
    folder = tmp_path / "predictions"
    for name, is_finalized in (("chat", True), ("raw", True), ("unfinished", False)):
        rows = scored(folder / name, [answer("#### 42", [5, END]), answer("#### 4", [5])])
        if is_finalized:
            row_store.finalize(folder / name, schemas.PREDICTION, "prediction_id", {"trials": {"t": ""}})
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    collected = pyarrow.parquet.read_table(tmp_path / "predictions.parquet")
    assert collected.schema.names == ["evaluation", *schemas.PREDICTION.names]
    assert collected["evaluation"].to_pylist() == ["chat"] * 2 + ["raw"] * 2
    before = (tmp_path / "predictions.parquet").stat().st_mtime_ns
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    assert (tmp_path / "predictions.parquet").stat().st_mtime_ns == before, "the file was rewritten"
    # Whether the file is current does not depend on clocks.
    os.utime(tmp_path / "predictions.parquet", (time.time() + 3600,) * 2)
    row_store.finalize(folder / "unfinished", schemas.PREDICTION, "prediction_id", {"trials": {"t": ""}})
    evaluate.collect_predictions(folder, tmp_path / "predictions.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "predictions.parquet").num_rows == 3 * len(rows)
