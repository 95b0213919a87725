"""A student that learns from its own answers, in the reference run; test_rounds.py holds what is beyond one arm."""

import json

import pytest
import torch
from peft import PeftModel
from test_run import split
from transformers import AutoModelForCausalLM

from oracles import greedy, log_likelihoods
from raykd.config.training import Student
from raykd.data import prompts
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model
from raykd.storage import files, row_store, schemas
from raykd.training.trial import TrialSpec
from reference_run import NUM_ANSWERED, NUM_TRAIN, OWN_BATCH_SIZE, OWN_MAX_TOKENS, TOP_K, Reference

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def job(reference: Reference) -> TrialSpec:
    return next(job for job in reference.plan.trials if job.arm_name == "own")


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(Student(model="raykd/demo-student"))


def rows(job: TrialSpec, kind: str) -> list[dict]:
    """The second round's `answers`, or the `completions` that the teacher made of them by scoring them."""
    return row_store.read_rows(job.round_folder(1) / kind, schemas.COMPLETION).to_pylist()


@pytest.fixture(scope="module")
def warmed_up(job: TrialSpec) -> PeftModel:
    """The student after the first round."""
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(job.round_folder(0) / "adapter")).eval()


def test_the_rounds_share_out_the_problems_and_the_steps(reference: Reference, job: TrialSpec):
    assert not (job.round_folder(0) / "answers").exists(), "the first round trains on reference solutions"
    answered = {row["problem_id"] for row in rows(job, "answers")}
    assert len(answered) == OWN_BATCH_SIZE
    assert answered < {row["problem_id"] for row in split(reference.plan, "train")}
    trial = files.read_json(job.folder / "trial.json")
    assert (trial["status"], trial["steps"]) == ("complete", 2)
    assert trial["rows"] == NUM_ANSWERED
    assert trial["rows"] + sum(trial["dropped"].values()) == NUM_TRAIN
    steps = [json.loads(line)["step"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_round_begins_with_the_answers_of_the_adapter_of_the_round_before(
    reference: Reference, job: TrialSpec, warmed_up: PeftModel, tokenizer
):
    problems = {row["problem_id"]: row for row in split(reference.plan, "train")}
    agreed, differs = [], []
    for row in [row for row in rows(job, "answers") if not row["error"]][:8]:
        prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        assert row["prompt_token_ids"] == prompt, "a student is never shown a prime"
        answer = greedy(warmed_up, prompt, tokenizer.eos_token_id, OWN_MAX_TOKENS)
        agreed.append(answer == row["completion_token_ids"])
        with warmed_up.disable_adapter():
            differs.append(greedy(warmed_up, prompt, tokenizer.eos_token_id, OWN_MAX_TOKENS) != answer)
    assert sum(agreed) >= len(agreed) - 1, agreed
    assert any(differs), "the base student would answer otherwise"


def test_the_primed_teacher_scored_every_token(reference: Reference, job: TrialSpec, tokenizer):
    prime = reference.plan.experiment.strategies["ground_truth"].text
    teacher = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-teacher"), dtype=torch.float32).eval()
    written = {row["problem_id"]: row for row in rows(job, "answers") if not row["error"]}
    scored = {row["problem_id"]: row for row in rows(job, "completions") if not row["error"]}
    assert scored.keys() == written.keys()
    for problem_id, row in list(scored.items())[:6]:
        assert row["completion_token_ids"] == written[problem_id]["completion_token_ids"]
        assert prime in tokenizer.decode(row["prompt_token_ids"])
        expected = log_likelihoods(teacher, row["prompt_token_ids"], row["completion_token_ids"])
        ids, logprobs = torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"])
        assert ids.shape == (len(row["completion_token_ids"]), TOP_K)
        assert torch.allclose(expected.gather(-1, ids), logprobs.double(), atol=2e-3)
        assert torch.allclose(expected.topk(TOP_K, -1).values, logprobs.double(), atol=2e-3)


def test_its_own_answers_are_learnt_from_by_reverse_kl(job: TrialSpec, warmed_up: PeftModel):
    written = {row["problem_id"]: row["prompt_token_ids"] for row in rows(job, "answers")}
    nats, tokens = 0.0, 0
    for row in [row for row in rows(job, "completions") if not row["error"]]:
        answer, ids = row["completion_token_ids"], torch.tensor(row["topk_ids"])
        log_q = log_likelihoods(warmed_up, written[row["problem_id"]], answer)
        p, q = torch.tensor(row["topk_logprobs"]).double().exp(), log_q.exp().gather(-1, ids)
        # The k tokens and all others as one: KL(student || teacher).
        p, q = (torch.cat([each, (1 - each.sum(-1, keepdim=True)).clamp(min=1e-7)], -1) for each in (p, q))
        nats += (q * (q / p).log()).sum().item()
        tokens += len(answer)
    # The second round is one step.
    second = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[1])
    assert second["target_tokens"] == tokens
    assert second["loss"] == pytest.approx(nats / tokens, rel=1e-3)
