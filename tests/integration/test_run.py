"""What one command wrote: every stage against an oracle that is not the stage itself."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from oracles import greedy, log_likelihoods
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import MAX_TOKENS
from raykd import evaluate, models, prompts, records, storage, student
from raykd.demo import MODELS, resolve_model
from raykd.sections import Student, Teacher
from runs import Ran, finish

pytestmark = pytest.mark.timeout(1800)


def completions(ran: Ran, arm: str) -> list[dict]:
    request = ran.plan.asked[arm]
    assert request is not None
    return storage.read_rows(request.folder, records.COMPLETION).to_pylist()


def predictions(ran: Ran) -> list[dict]:
    return storage.read_rows(ran.plan.predictions, records.PREDICTION).to_pylist()


def split(ran: Ran, name: str) -> list[dict]:
    return pyarrow.parquet.read_table(ran.plan.problems / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def teacher_model():
    return AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-teacher"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(Student(model="raykd/demo-student"))


@pytest.mark.parametrize("arm", ["none", "soft"])
def test_every_problem_has_its_samples_under_every_strategy(ran: Ran, arm: str):
    rows = completions(ran, arm)
    problems = sorted(row["problem_id"] for row in split(ran, "train"))
    assert sorted((row["problem_id"], row["sample_index"]) for row in rows) == [
        (p, n) for p in problems for n in (0, 1)
    ]
    assert len({row["completion_id"] for row in rows}) == 80
    assert not any(row["error"] for row in rows)
    samples = {(row["problem_id"], row["sample_index"]): row["completion"] for row in rows}
    # Even a terse answer is a number of several digits, drawn anew.
    assert sum(samples[p, 0] != samples[p, 1] for p in problems) >= 20


@pytest.mark.parametrize("arm", ["none", "soft"])
def test_the_served_teacher_says_what_the_model_would(ran: Ran, teacher_model, arm: str):
    said, expected = [], []
    for row in completions(ran, arm)[:20]:
        log_p = log_likelihoods(teacher_model, row["prompt_token_ids"], row["completion_token_ids"])
        said += log_p[range(len(log_p)), row["completion_token_ids"]].tolist()
        flattened = torch.softmax(log_p / 0.7, -1)
        expected += (flattened * log_p).sum(-1).tolist()
    # Tokens drawn at temperature 0.7 are, in the mean, as likely as such draws are.
    spread = np.std(said) / np.sqrt(len(said))
    assert abs(np.mean(said) - np.mean(expected)) < 4 * spread


@pytest.mark.parametrize("arm", ["soft", "scored"])
def test_soft_targets_are_the_models_own_distribution_whatever_the_sampling(ran: Ran, teacher_model, arm: str):
    for row in completions(ran, arm)[:5]:
        answer = row["completion_token_ids"]
        expected = log_likelihoods(teacher_model, row["prompt_token_ids"], answer)
        ids, logprobs = torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"])
        assert ids.shape == (len(answer), 6)
        assert torch.allclose(expected.gather(-1, ids), logprobs.double(), atol=2e-3)
        assert torch.allclose(expected.topk(6, -1).values, logprobs.double(), atol=2e-3)


def test_the_reference_solutions_were_scored_under_the_prime(ran: Ran, tokenizer):
    solutions = {row["problem_id"]: row["reference_solution"] for row in split(ran, "train")}
    rows = completions(ran, "scored")
    assert sorted(row["problem_id"] for row in rows) == sorted(solutions)
    for row in rows:
        assert row["completion"] == solutions[row["problem_id"]]
        assert tokenizer.decode(row["completion_token_ids"][:-1]) == row["completion"]
        assert row["completion_token_ids"][-1] == tokenizer.eos_token_id
        assert row["is_correct"]


def test_the_prime_is_before_the_teacher_and_never_before_the_student(ran: Ran, tokenizer):
    strategies = ran.plan.experiment.strategies
    for arm, strategy in (("soft", "teacher"), ("scored", "ground_truth")):
        prime = strategies[strategy].text
        assert all(prime in tokenizer.decode(row["prompt_token_ids"]) for row in completions(ran, arm))
        assert not any(prime in tokenizer.decode(row["prompt_token_ids"]) for row in completions(ran, "none"))
    questions = {row["problem_id"]: row["question"] for row in split(ran, "train")}
    counts = {}
    for job in ran.plan.jobs:
        rows, dropped = student.training_rows(job.arm, job.problems, job.completions, tokenizer, job.same_tokens)
        counts[job.arm_name] = (len(rows), dropped)
        for row in rows:
            expected = prompts.student_messages({"question": questions[row.problem_id]})
            assert row.prompt_token_ids == models.prompt_token_ids(tokenizer, expected)
    assert counts == {
        "none": (40, {"not_best": 40}),
        "soft": (80, {}),
        "scored": (40, {}),
        "reference": (40, {}),
    }
    told = {job.arm_name: storage.read_json(job.folder / "trial.json") for job in ran.plan.jobs}
    assert {arm: (each["rows"], each["dropped"]) for arm, each in told.items()} == counts


def test_no_row_that_a_student_is_asked_holds_a_prime(ran: Ran, tokenizer):
    test = pyarrow.parquet.read_table(ran.plan.problems / "test.parquet")
    experiment = ran.plan.experiment
    told = (experiment.student, experiment.evaluate, experiment.prompt.instruction, set())
    asked = evaluate.Ask(ran.plan.contestants, *told)(test)
    texts = [tokenizer.decode(row["tokenized_prompt"]) for row in asked.to_pylist()]
    assert len(texts) == 50
    primes = [strategy.text.split("{")[0] for strategy in experiment.strategies.values() if strategy.text]
    assert len(primes) == 5
    assert not [text for text in texts for prime in primes if prime in text]


def test_nothing_but_evaluation_reads_the_test_split(ran: Ran):
    held_out = {row["problem_id"] for name in ("test", "validation") for row in split(ran, name)}
    for arm in ("none", "soft"):
        assert not held_out & {row["problem_id"] for row in completions(ran, arm)}
    assert {row["problem_id"] for row in predictions(ran)} == {row["problem_id"] for row in split(ran, "test")}


@pytest.mark.parametrize("arm", ["none", "soft", "scored", "reference"])
def test_an_adapter_is_peft_s_and_vllm_answered_with_it(ran: Ran, tokenizer, arm: str):
    job = next(job for job in ran.plan.jobs if job.arm_name == arm)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(job.folder / "adapter")).eval()
    weights = safetensors.torch.load_file(job.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())
    problems = {row["problem_id"]: row for row in split(ran, "test")}
    agreed = []
    for row in [row for row in predictions(ran) if row["arm"] == arm][:6]:
        prompt = models.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        tokens = greedy(model, prompt, tokenizer.eos_token_id, MAX_TOKENS)
        agreed.append(tokenizer.decode(tokens, skip_special_tokens=True) == row["completion"])
    assert sum(agreed) >= 5, agreed


def test_the_untouched_student_answers_as_the_base_model_does(ran: Ran, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
    problems = {row["problem_id"]: row for row in split(ran, "test")}
    agreed = []
    for row in [row for row in predictions(ran) if row["arm"] == "untouched"][:6]:
        prompt = models.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        tokens = greedy(base, prompt, tokenizer.eos_token_id, MAX_TOKENS)
        agreed.append(tokenizer.decode(tokens, skip_special_tokens=True) == row["completion"])
    assert sum(agreed) >= 5, agreed


def test_training_lowered_the_loss_and_the_adapters_differ(ran: Ran):
    trials = [storage.read_json(job.folder / "trial.json") for job in ran.plan.jobs]
    assert [trial["steps"] for trial in trials] == [10, 20, 10, 10]
    for trial in trials:
        assert trial["loss_last"] < trial["loss_first"], trial["trial_id"]
    answers = {(row["trial_id"], row["problem_id"]): row["completion"] for row in predictions(ran)}
    by_trial = {trial: [answers[key] for key in sorted(answers) if key[0] == trial] for trial, _ in answers}
    assert len(by_trial) == 5
    assert len({tuple(texts) for texts in by_trial.values()}) == 5, "each adapter answers in its own way"


def test_results_csv_is_what_the_predictions_say(ran: Ran):
    with (ran.plan.folder / "results.csv").open() as file:
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
    assert {row["arm"] for row in rows} == {"untouched", "none", "soft", "scored", "reference"}
    for row in rows:
        own = [each for each in predictions(ran) if each["trial_id"] == row["trial_id"]]
        assert int(row["n"]) == len(own) == 10
        for kind in ("strict", "flexible"):
            share = float(np.mean([each[f"is_correct_{kind}"] for each in own]))
            assert float(row[f"accuracy_{kind}"]) == pytest.approx(share)
            assert float(row[f"accuracy_{kind}_low"]) <= share <= float(row[f"accuracy_{kind}_high"])


def test_the_screen_shows_progress_and_ends_with_the_table(ran: Ran):
    for stage in ("teacher: 200/200 rows", "training: 50/50 steps", "students: 50/50 answers"):
        assert stage in ran.stderr
    assert "logs: " in ran.stderr
    last = ran.stdout.strip().splitlines()[-1]
    assert last.startswith("report: ")
    assert Path(last.removeprefix("report: ")).exists()
    for arm in ("untouched", "none", "soft", "scored", "reference"):
        assert arm in ran.stdout
    # Whatever engines, Ray and libraries have to say is in their logs.
    assert len(ran.stderr.splitlines()) < 40, ran.stderr


def test_the_run_says_what_it_was_made_of(ran: Ran):
    run = json.loads((ran.plan.folder / "run.json").read_text())
    assert run["versions"]["ray"] == "2.60.0"
    assert run["models"]["student"]["revision"] == storage.fingerprint(MODELS["raykd/demo-student"])
    assert set(run["stages"]) == {"completions", "students", "predictions", "attention"}
    assert set(run["processor_seconds"]) == {"teacher", "students' answers", "attention"}
    assert all(set(held) == {"cpu"} and held["cpu"] > 0 for held in run["processor_seconds"].values())
    assert [entry["rows"] for entry in run["completions"]] == [80, 80, 40]


def test_the_same_command_again_does_nothing_again(ran: Ran, experiment_file: Path):
    before = {path: path.stat().st_mtime_ns for path in ran.plan.root.rglob("*.parquet")}
    again = finish(["run", str(experiment_file), f"storage={ran.plan.root}"], ran.plan.root)
    assert again.stdout == ran.stdout
    assert "Ray" not in again.stderr, "what is complete needs no cluster"
    assert {path: path.stat().st_mtime_ns for path in ran.plan.root.rglob("*.parquet")} == before


def test_another_experiment_shares_the_completions_that_it_has_in_common(ran: Ran, experiment_file: Path):
    arguments = ["generate", str(experiment_file), f"storage={ran.plan.root}", "name=other", "train.epochs=7"]
    other = finish(arguments, ran.plan.root)
    assert "starting the teacher" not in other.stderr
    shutil.rmtree(other.plan.folder)


def test_an_arm_may_have_the_teacher_answer_in_another_way(ran: Ran, experiment_file: Path, teacher_model):
    """Greedily, beside others that are drawn from; what is there of those is not asked again."""
    arms = "arms={none: {targets.keep: best}, greedy: {teacher.sampling.temperature: 0, teacher.samples: 1}}"
    before = {path: path.stat().st_mtime_ns for path in (ran.plan.root / "completions").rglob("*.parquet")}
    other = finish(["generate", str(experiment_file), f"storage={ran.plan.root}", "name=greedy", arms], ran.plan.root)
    assert "teacher: 40/40 rows" in other.stderr
    request = other.plan.asked["greedy"]
    assert request
    rows = storage.read_rows(request.folder, records.COMPLETION).to_pylist()
    eos = models.load_tokenizer(Teacher(model="raykd/demo-teacher")).eos_token_id
    for row in rows[:6]:
        answer = greedy(teacher_model, row["prompt_token_ids"], eos, MAX_TOKENS)
        assert row["completion_token_ids"] == answer
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shutil.rmtree(other.plan.folder)
    shutil.rmtree(request.folder)


def test_another_experiment_of_the_same_name_is_refused(ran: Ran, experiment_file: Path):
    with pytest.raises(AssertionError, match=r"train\.epochs was 2, is 7") as caught:
        finish(["run", str(experiment_file), f"storage={ran.plan.root}", "train.epochs=7"], ran.plan.root)
    assert "dashboard" not in str(caught.value), "refused before a cluster is started"
