"""The reference run: every stage against an independent oracle."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oracles import greedy, log_likelihoods
from raykd.config.training import Student
from raykd.data import prompts
from raykd.evaluation import student_batch
from raykd.models import loading, tokenization
from raykd.models.builtin import MODELS, resolve_model
from raykd.pipeline.plan import Plan
from raykd.storage import files, hashing, row_store, schemas
from raykd.training import examples
from reference_run import (
    ARMS,
    MAX_TOKENS,
    NUM_ANSWERED,
    NUM_TEST,
    NUM_TOO_LONG,
    NUM_TRAIN,
    STEPS,
    STUDENTS,
    TOP_K,
    Reference,
)
from runs import FinishedRun, finish

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def plan(reference: Reference) -> Plan:
    return reference.plan


def all_completions(plan: Plan, arm: str) -> list[dict]:
    completion_set = plan.completion_sets[arm]
    assert completion_set is not None
    return row_store.read_rows(completion_set.folder, schemas.COMPLETION).to_pylist()


def completions(plan: Plan, arm: str) -> list[dict]:
    """Return the completion rows without an error."""
    return [row for row in all_completions(plan, arm) if not row["error"]]


def predictions(plan: Plan) -> list[dict]:
    return row_store.read_rows(plan.predictions, schemas.PREDICTION).to_pylist()


def split(plan: Plan, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(plan.problems / f"{name}.parquet").to_pylist()


def is_too_long(problem: dict) -> bool:
    return problem["question"].count("figs") > 100


@pytest.fixture(scope="module")
def teacher_model():
    return AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-teacher"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(Student(model="raykd/demo-student"))


@pytest.mark.parametrize(("arm", "num_samples"), [("greedy", 1), ("soft", 2)])
def test_each_problem_has_all_samples_of_its_arm(plan: Plan, arm: str, num_samples: int):
    """Arms may differ in the teacher's sampling."""
    rows = all_completions(plan, arm)
    problems = sorted(row["problem_id"] for row in split(plan, "train"))
    assert len(problems) == NUM_TRAIN
    assert sorted((row["problem_id"], row["sample_index"]) for row in rows) == [
        (p, n) for p in problems for n in range(num_samples)
    ]
    assert len({row["completion_id"] for row in rows}) == num_samples * NUM_TRAIN


def test_samples_of_a_problem_differ(plan: Plan):
    by_problem: dict[str, set[str]] = {}
    for row in completions(plan, "soft"):
        by_problem.setdefault(row["problem_id"], set()).add(row["completion"])
    assert len(by_problem) == NUM_ANSWERED
    # Most answers of a primed teacher start with the same words, which fill most of the 32 tokens.
    assert sum(len(texts) == 2 for texts in by_problem.values()) >= NUM_ANSWERED // 5


@pytest.mark.parametrize("arm", ["greedy", "soft", "scored"])
def test_too_long_prompts_have_errors_and_others_answers(plan: Plan, arm: str):
    too_long = {row["problem_id"] for row in split(plan, "train") if is_too_long(row)}
    assert len(too_long) == NUM_TOO_LONG
    rows = all_completions(plan, arm)
    assert {row["problem_id"] for row in rows if row["error"]} == too_long
    for row in rows:
        assert bool(row["error"]) == (row["problem_id"] in too_long)
        assert bool(row["completion_token_ids"]) != bool(row["error"]) or arm == "scored"
        assert not row["error"] or "refused" in row["error"]


def test_greedy_teacher_answers_like_transformers(plan: Plan, teacher_model, tokenizer):
    for row in completions(plan, "greedy")[:6]:
        answer = greedy(teacher_model, row["prompt_token_ids"], tokenizer.eos_token_id, MAX_TOKENS)
        assert row["completion_token_ids"] == answer


def test_sampled_tokens_have_expected_mean_log_probability(plan: Plan, teacher_model):
    sampled, expected = [], []
    for row in completions(plan, "soft")[:20]:
        log_p = log_likelihoods(teacher_model, row["prompt_token_ids"], row["completion_token_ids"])
        sampled += log_p[range(len(log_p)), row["completion_token_ids"]].tolist()
        flattened = torch.softmax(log_p / 0.7, -1)
        expected += (flattened * log_p).sum(-1).tolist()
    # Tokens drawn at temperature 0.7 have the expected mean log-probability at temperature 1.
    spread = np.std(sampled) / np.sqrt(len(sampled))
    assert abs(np.mean(sampled) - np.mean(expected)) < 4 * spread


@pytest.mark.parametrize("arm", ["soft", "scored"])
def test_soft_targets_equal_model_log_probabilities(plan: Plan, teacher_model, arm: str):
    for row in completions(plan, arm)[:5]:
        answer = row["completion_token_ids"]
        expected = log_likelihoods(teacher_model, row["prompt_token_ids"], answer)
        ids, logprobs = torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"])
        assert ids.shape == (len(answer), TOP_K)
        assert torch.allclose(expected.gather(-1, ids), logprobs.double(), atol=2e-3)
        assert torch.allclose(expected.topk(TOP_K, -1).values, logprobs.double(), atol=2e-3)


def test_scored_rows_hold_reference_solutions(plan: Plan, tokenizer):
    solutions = {row["problem_id"]: row["reference_solution"] for row in split(plan, "train")}
    rows = completions(plan, "scored")
    assert len(rows) == NUM_ANSWERED
    for row in rows:
        assert row["completion"] == solutions[row["problem_id"]]
        assert tokenizer.decode(row["completion_token_ids"][:-1]) == row["completion"]
        assert row["completion_token_ids"][-1] == tokenizer.eos_token_id
        assert row["is_correct"]


def test_teacher_prompts_have_prime_and_training_prompts_none(plan: Plan, tokenizer):
    strategies = plan.experiment.strategies
    for arm, strategy in (("soft", "teacher"), ("scored", "ground_truth")):
        prime = strategies[strategy].text
        assert all(prime in tokenizer.decode(row["prompt_token_ids"]) for row in completions(plan, arm))
        assert not any(prime in tokenizer.decode(row["prompt_token_ids"]) for row in completions(plan, "greedy"))
    questions = {row["problem_id"]: row["question"] for row in split(plan, "train")}
    counts = {}
    for trial in plan.trials:
        rows, dropped = examples.build_examples(
            trial.arm, trial.problems, trial.completions, tokenizer, trial.same_tokens
        )
        counts[trial.arm_name] = (len(rows), dropped)
        for row in rows:
            expected = prompts.student_messages({"question": questions[row.problem_id]})
            assert row.prompt_token_ids == tokenization.prompt_token_ids(tokenizer, expected)
    assert counts == {
        "greedy": (NUM_ANSWERED, {"error": NUM_TOO_LONG}),
        "soft": (NUM_ANSWERED, {"error": 2 * NUM_TOO_LONG, "not_best": NUM_ANSWERED}),
        "scored": (NUM_ANSWERED, {"error": NUM_TOO_LONG}),
    }
    records = {trial.arm_name: files.read_json(trial.folder / "trial.json") for trial in plan.trials}
    assert {arm: (each["rows"], each["dropped"]) for arm, each in records.items()} == counts


def test_evaluation_prompts_have_no_prime(plan: Plan, tokenizer):
    test = pyarrow.parquet.read_table(plan.problems / "test.parquet")
    experiment = plan.experiment
    arguments = (experiment.student, experiment.evaluate, experiment.prompt.instruction, set())
    rows = student_batch.BuildEvalPrompts(plan.eval_models(), *arguments)(test)
    texts = [tokenizer.decode(row["tokenized_prompt"]) for row in rows.to_pylist()]
    assert len(texts) == len(STUDENTS) * NUM_TEST
    primes = [strategy.text.split("{")[0] for strategy in experiment.strategies.values() if strategy.text]
    assert len(primes) == 5
    assert not [text for text in texts for prime in primes if prime in text]


def test_only_predictions_use_test_problems(plan: Plan):
    held_out = {row["problem_id"] for name in ("test", "validation") for row in split(plan, name)}
    for arm in ("greedy", "soft"):
        assert not held_out & {row["problem_id"] for row in all_completions(plan, arm)}
    assert {row["problem_id"] for row in predictions(plan)} == {row["problem_id"] for row in split(plan, "test")}


@pytest.mark.parametrize("arm", list(ARMS))
def test_predictions_match_adapter_loaded_by_peft(plan: Plan, tokenizer, arm: str):
    trial = next(trial for trial in plan.trials if trial.arm_name == arm)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(trial.folder / "adapter")).eval()
    weights = safetensors.torch.load_file(trial.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())
    problems = {row["problem_id"]: row for row in split(plan, "test")}
    agreed = []
    for row in [row for row in predictions(plan) if row["arm"] == arm][:6]:
        prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        tokens = greedy(model, prompt, tokenizer.eos_token_id, MAX_TOKENS)
        agreed.append(tokenizer.decode(tokens, skip_special_tokens=True) == row["completion"])
    assert sum(agreed) >= 5, agreed


def test_base_student_answers_like_base_model(plan: Plan, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
    problems = {row["problem_id"]: row for row in split(plan, "test")}
    agreed = []
    for row in [row for row in predictions(plan) if row["arm"] == "base"][:6]:
        prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        tokens = greedy(base, prompt, tokenizer.eos_token_id, MAX_TOKENS)
        agreed.append(tokenizer.decode(tokens, skip_special_tokens=True) == row["completion"])
    assert sum(agreed) >= 5, agreed


def test_training_lowers_loss_and_adapters_differ(plan: Plan):
    for trial in plan.trials:
        curve = files.read_json_lines(trial.folder / "metrics.jsonl")
        assert len(curve) == STEPS
        losses, epoch = [step["loss"] for step in curve], STEPS // 3
        assert np.mean(losses[-epoch:]) < np.mean(losses[:epoch]), trial.trial_id
    answers = {(row["trial_id"], row["problem_id"]): row["completion"] for row in predictions(plan)}
    by_trial = {trial: [answers[key] for key in sorted(answers) if key[0] == trial] for trial, _ in answers}
    assert len(by_trial) == len(STUDENTS)
    assert len({tuple(texts) for texts in by_trial.values()}) == len(STUDENTS), "two students give the same answers"


def test_results_csv_matches_predictions(plan: Plan):
    with (plan.folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:9] == [
        "arm",
        "seed",
        "accuracy_strict",
        "accuracy_strict_low",
        "accuracy_strict_high",
        "accuracy_flexible",
        "accuracy_flexible_low",
        "accuracy_flexible_high",
        "n",
    ]
    assert {row["arm"] for row in rows} == set(STUDENTS)
    for row in rows:
        answers = [each for each in predictions(plan) if each["trial_id"] == row["trial_id"]]
        assert not [each["error"] for each in answers if each["error"]]
        assert int(row["n"]) == len(answers) == NUM_TEST
        for kind in ("strict", "flexible"):
            share = float(np.mean([each[f"is_correct_{kind}"] for each in answers]))
            assert float(row[f"accuracy_{kind}"]) == pytest.approx(share)
            assert float(row[f"accuracy_{kind}_low"]) <= share <= float(row[f"accuracy_{kind}_high"])


def test_output_shows_progress_and_ends_with_results(reference: Reference, repeated_run: FinishedRun):
    rows, answers = 4 * NUM_TRAIN, len(STUDENTS) * NUM_TEST
    for stage in (f"teacher: {rows}/{rows} rows", "training: ", f"students: {answers}/{answers} answers", "logs: "):
        assert stage in reference.output
    last = repeated_run.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    assert Path(last.removeprefix("report: ")).exists()
    assert repeated_run.stdout in reference.output
    for arm in STUDENTS:
        assert arm in repeated_run.stdout
    # Engines, Ray and libraries write only to their logs.
    shown = len(reference.output.splitlines()) - len(repeated_run.stdout.splitlines())
    assert shown < 150, reference.output


def test_run_record_has_versions_models_counts_and_times(plan: Plan):
    run = json.loads((plan.folder / "run.json").read_text())
    assert run["versions"]["ray"] == "2.60.0"
    assert run["models"]["student"]["revision"] == hashing.fingerprint(MODELS["raykd/demo-student"])
    assert set(run["stages"]) == {"generate", "train", "evaluate", "attention"}
    assert set(run["processor_seconds"]) == {"teacher", "evaluate", "attention"}
    assert all(set(held) == {"cpu"} and held["cpu"] > 0 for held in run["processor_seconds"].values())
    made = {tuple(entry["arms"]): (entry["rows"], entry["errors"]) for entry in run["completions"]}
    assert made == {
        ("greedy",): (NUM_TRAIN, NUM_TOO_LONG),
        ("soft",): (2 * NUM_TRAIN, 2 * NUM_TOO_LONG),
        ("scored",): (NUM_TRAIN, NUM_TOO_LONG),
    }


def test_repeated_command_does_no_work(reference: Reference, repeated_run: FinishedRun):
    root = reference.plan.root
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
    third_run = finish(reference.arguments, root)
    assert third_run.stdout == repeated_run.stdout
    assert "Ray" not in third_run.stderr, "a completed run started a cluster"
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet")} == before


def test_other_experiment_reuses_completions(reference: Reference):
    arguments = ["generate", *reference.arguments[1:], "name=other", "train.epochs=7"]
    other = finish(arguments, reference.plan.root)
    assert "starting the teacher" not in other.stderr
    shutil.rmtree(other.plan.folder)


def test_changed_experiment_of_same_name_is_refused(reference: Reference):
    with pytest.raises(AssertionError, match=r"train\.epochs was 3, is 7") as caught:
        finish([*reference.arguments, "train.epochs=7"], reference.plan.root)
    assert "dashboard" not in str(caught.value), "a cluster was started"
