"""Checks of the reference run: other protocols, attention statistics, and lm-evaluation-harness."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oracles import greedy
from raykd.config.training import Student
from raykd.evaluation import attention, attention_heads, lm_eval_task
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model
from raykd.storage import row_store, schemas
from raykd.storage.paths import ExperimentPaths
from reference_run import CONTEXT, MAX_TOKENS, NUM_TEST, STUDENTS, Reference
from runs import finish

pytestmark = pytest.mark.timeout(2400)


def answers(folder: Path) -> list[dict]:
    return row_store.read_rows(folder, schemas.PREDICTION).to_pylist()


def test_attention_rows_cover_students_and_match_models(reference: Reference):
    plan = reference.plan
    assert plan.attention
    rows = row_store.read_rows(plan.attention, schemas.ATTENTION).to_pylist()
    problems = pyarrow.parquet.read_table(plan.problems / "test.parquet").to_pylist()
    students = {"base": None, **{trial.trial_id: trial.folder / "adapter" for trial in plan.trials}}
    expected = sorted(f"{trial}/{problem['problem_id']}" for trial in students for problem in problems)
    assert sorted(row["attention_id"] for row in rows) == expected
    assert not any(row["error"] for row in rows)
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    texts = {each["problem_id"]: attention.attention_text(each, tokenizer, "", None) for each in problems[:3]}
    seen = []
    for trial, adapter in students.items():
        model = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
        model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model
        for problem_id, text in texts.items():
            found = next(row["values"] for row in rows if row["attention_id"] == f"{trial}/{problem_id}")
            np.testing.assert_allclose(
                found, attention_heads.attention_statistics(model, [text], 0)[0].ravel(), rtol=1e-3, atol=1e-5
            )
            seen.append(tuple(found))
    assert len(set(seen)) == len(seen), "two students have the same statistics"


def test_report_has_attention_statistics(reference: Reference):
    with (reference.plan.folder / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == set(STUDENTS)
    assert {row["statistic"] for row in rows} == set(attention_heads.STATISTICS)
    assert "Attention statistics" in (reference.plan.folder / "report.html").read_text()


# Runs lm-eval on a model. In `make test`, test_lm_eval_task.py compares prompts, extraction and score.
@pytest.mark.slow
def test_lm_eval_command_gives_same_answers_and_scores(reference: Reference, tmp_path: Path):
    """Run the report's command: lm-eval with its own backend, prompts, extraction and score."""
    plan = reference.plan
    trial = next(trial for trial in plan.trials if trial.arm_name == "scored")
    command = lm_eval_task.lm_eval_command(
        plan.experiment, ExperimentPaths(plan.folder).lm_eval, str(trial.folder / "adapter")
    )
    command = shlex.split(command)
    assert command[0] == "lm_eval"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    more = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command[1:], *more],
        capture_output=True,
        text=True,
        timeout=600,
        env=offline,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"][lm_eval_task.task_name(plan.experiment)]
    own = {row["question"]: row for row in answers(plan.predictions) if row["trial_id"] == trial.trial_id}
    for name, column in (("strict-match", "is_correct_strict"), ("flexible-extract", "is_correct_flexible")):
        assert found[f"exact_match,{name}"] == pytest.approx(np.mean([row[column] for row in own.values()]))
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    documents = [json.loads(line) for line in samples.read_text().splitlines()]
    texts = {each["doc"]["prompt"]: each["resps"][0][0] for each in documents if each["filter"] == "strict-match"}
    assert texts.keys() == own.keys()
    # Equal, except where two tokens are nearly equally probable.
    assert sum(texts[question] == row["completion"] for question, row in own.items()) >= NUM_TEST - 1


# Starts an engine. In `make test`, test_evaluate.py covers the prompts and answers of each protocol.
@pytest.mark.slow
def test_other_protocol_reuses_adapters_and_keeps_answers(reference: Reference):
    """The existing adapters answer raw text prompts; earlier answers stay unchanged."""
    before = {path: path.stat().st_mtime_ns for path in reference.plan.predictions.iterdir()}
    num_answers = len(STUDENTS) * NUM_TEST * 3
    overrides = ["evaluate.protocol=zero_shot_raw", "evaluate.num_samples=3", "evaluate.stop=['.', Question]"]
    overrides.append("evaluate.sampling={temperature: 0.9, max_tokens: 12, seed: 5}")
    other = finish(["run", *reference.arguments[1:], *overrides], reference.plan.root)
    try:
        assert "training" not in other.stderr and f"students: {num_answers}/{num_answers} answers" in other.stderr
        assert other.plan.predictions != reference.plan.predictions
        rows = answers(other.plan.predictions)
        assert len({(row["trial_id"], row["problem_id"], row["sample_index"]) for row in rows}) == num_answers
        assert {row["protocol"] for row in rows} == {"zero_shot_raw"}
        # An answer does not contain its stop string.
        stopped = [row for row in rows if row["finish_reason"] == "stop"]
        assert not any("." in row["completion"] or "Question" in row["completion"] for row in rows)
        assert stopped and all(row["num_tokens"] <= 12 for row in rows)
        by_problem: dict[tuple, set] = {}
        for row in rows:
            by_problem.setdefault((row["trial_id"], row["problem_id"]), set()).add(row["completion"])
        assert sum(len(texts) > 1 for texts in by_problem.values()) > len(by_problem) / 2, (
            "the samples of most problems are equal"
        )
        table = pyarrow.parquet.read_table(reference.plan.folder / "predictions.parquet")
        assert sorted(set(table["protocol"].to_pylist())) == ["zero_shot_chat", "zero_shot_raw"]
        assert table.num_rows == num_answers // 3 + num_answers
        page = (reference.plan.folder / "report.html").read_text()
        assert "maj@3" in page and "pass@2" in page and "protocol zero_shot_raw, temperature 0.9" in page
        assert {path: path.stat().st_mtime_ns for path in reference.plan.predictions.iterdir()} == before
    finally:
        repeated = finish(["run", *reference.arguments[1:]], reference.plan.root)
    assert "Ray" not in repeated.stderr, "the first answers were not reused"
    assert repeated.stdout in reference.output


# Starts an engine. In `make test`, test_lm_eval_task.py covers the prompts, and test_run.py prompts that are too long.
@pytest.mark.slow
def test_eight_shot_answers_match_transformers(reference: Reference):
    """Answers equal those of transformers; a question that does not fit beside the examples has an error."""
    overrides = ["evaluate.protocol=eight_shot_cot", "evaluate.max_error_rate=0.2"]
    other = finish(["evaluate", *reference.arguments[1:], *overrides], reference.plan.root)
    finish(["report", *reference.arguments[1:]], reference.plan.root)
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
    rows = answers(other.plan.predictions)
    assert len(rows) == len(STUDENTS) * NUM_TEST and {row["protocol"] for row in rows} == {"eight_shot_cot"}
    agreed = []
    for row in [row for row in rows if row["arm"] == "base"]:
        prompt = tokenization.question_token_ids(tokenizer, row, "", "eight_shot_cot")
        assert tokenizer.decode(prompt).count("<|user|>") == 9
        assert bool(row["error"]) == (len(prompt) >= CONTEXT)
        if not row["error"]:
            tokens = greedy(base, prompt, tokenizer.eos_token_id, min(MAX_TOKENS, CONTEXT - len(prompt)))
            agreed.append(tokenizer.decode(tokens, skip_special_tokens=True) == row["completion"])
    assert len(agreed) == NUM_TEST - 1 and sum(agreed) >= len(agreed) - 1, agreed
