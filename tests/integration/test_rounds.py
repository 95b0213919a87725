"""On-policy students: their answers, the teacher's scores, and the resumption of a killed run."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from clusters import cluster, cluster_env
from oracles import greedy, log_likelihoods
from raykd.config.training import Student
from raykd.data import prompts
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model
from raykd.storage import row_store, schemas
from raykd.storage.files import read_json
from raykd.training import examples
from raykd.training.trial import TrialSpec, problem_ids_of_round
from runs import FinishedRun, finish, kill_when, plan_of, wait_for_end

# Starts six engines. In `make test`, unit tests cover the settings, completion sets, schedule and losses of on-policy
# arms; nothing there runs a rollout or a round.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def rounds_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with two rounds and three steps on 24 problems; transformers can reproduce its greedy answers."""
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32}}
    own = {"source": "student", "rounds": 2, "rollout": {"temperature": 0, "max_tokens": MAX_TOKENS}}
    soft = {**own, "kind": "top_k", "top_k": 8}
    tree = {
        "name": "rounds",
        "dataset": {"source": "demo", "num_train": 24, "num_test": 6},
        "teacher": {"model": "raykd/demo-teacher", "engine": engine, "batch_size": 8},
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 5e-3, "dtype": "float32"},
        "evaluate": {"engine": engine, "sampling": {"max_tokens": MAX_TOKENS}},
        "arms": {
            "soft": {"prompt.strategy": "ground_truth", "targets": soft},
            "hard": {"targets": own},
            "warm_soft": {"prompt.strategy": "ground_truth", "targets": {**soft, "warmup_rounds": 1}},
            # None of its answers is correct, so its second round has no example.
            "warm_hard": {"targets": {**own, "warmup_rounds": 1, "filter": "correct"}},
        },
    }
    file = tmp_path_factory.mktemp("experiment") / "rounds.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(rounds_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("storage")
    # On four cores the teacher fits beside the students.
    with cluster(3) as nodes:
        return finish(["run", str(rounds_file), f"storage={folder}"], folder, 1800, cluster_env(nodes))


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(Student(model="raykd/demo-student"))


def rows(folder: Path) -> list[dict]:
    return row_store.read_rows(folder, schemas.COMPLETION).to_pylist()


def trial_of(ran: FinishedRun, arm: str) -> TrialSpec:
    return next(trial for trial in ran.plan.trials if trial.arm_name == arm)


def problems_of(ran: FinishedRun) -> dict[str, dict]:
    table = pyarrow.parquet.read_table(ran.plan.problems / "train.parquet")
    return {row["problem_id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize("arm", ["soft", "hard"])
def test_rounds_partition_problems_and_steps(finished: FinishedRun, arm: str):
    trial = trial_of(finished, arm)
    answered = [{row["problem_id"] for row in rows(trial.round_folder(number) / "answers")} for number in (0, 1)]
    assert [len(each) for each in answered] == [8, 16]
    assert answered[0] | answered[1] == set(problems_of(finished))
    record = read_json(trial.folder / "trial.json")
    assert (record["status"], record["steps"]) == ("complete", 3)
    assert record["rows"] + sum(record["dropped"].values()) == 24
    steps = [json.loads(line)["step"] for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("number", [0, 1])
def test_round_uses_answers_of_previous_round_adapter(finished: FinishedRun, tokenizer, number: int):
    trial, problems = trial_of(finished, "soft"), problems_of(finished)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32)
    if number:
        model = PeftModel.from_pretrained(model, str(trial.round_folder(0) / "adapter"))
    model.eval()
    agreed = []
    for row in rows(trial.round_folder(number) / "answers")[:8]:
        prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problems[row["problem_id"]]))
        assert row["prompt_token_ids"] == prompt, "the student's prompt has a prime"
        agreed.append(greedy(model, prompt, tokenizer.eos_token_id, MAX_TOKENS) == row["completion_token_ids"])
    assert sum(agreed) >= 7, agreed


def test_primed_teacher_scores_every_token(finished: FinishedRun, tokenizer):
    trial = trial_of(finished, "soft")
    prime = finished.plan.experiment.strategies["ground_truth"].text
    teacher = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-teacher"), dtype=torch.float32).eval()
    for number in (0, 1):
        written = {row["problem_id"]: row for row in rows(trial.round_folder(number) / "answers")}
        scored = {row["problem_id"]: row for row in rows(trial.round_folder(number) / "completions")}
        assert scored.keys() == written.keys()
        for problem_id, row in list(scored.items())[:4]:
            assert row["completion_token_ids"] == written[problem_id]["completion_token_ids"]
            assert prime in tokenizer.decode(row["prompt_token_ids"])
            expected = log_likelihoods(teacher, row["prompt_token_ids"], row["completion_token_ids"])
            ids, logprobs = torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"])
            assert ids.shape == (len(row["completion_token_ids"]), 8)
            assert torch.allclose(expected.gather(-1, ids), logprobs.double(), atol=2e-3)
            assert torch.allclose(expected.topk(8, -1).values, logprobs.double(), atol=2e-3)


def test_on_policy_loss_is_reverse_kl(finished: FinishedRun, tokenizer):
    trial = trial_of(finished, "soft")
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
    written = {row["problem_id"]: row["prompt_token_ids"] for row in rows(trial.round_folder(0) / "answers")}
    nats, tokens = 0.0, 0
    for row in rows(trial.round_folder(0) / "completions"):
        answer = row["completion_token_ids"]
        log_q = log_likelihoods(base, written[row["problem_id"]], answer)
        ids = torch.tensor(row["topk_ids"])
        p, q = torch.tensor(row["topk_logprobs"]).double().exp(), log_q.exp().gather(-1, ids)
        # KL(student || teacher) over the k tokens and one bucket of all others.
        p, q = (torch.cat([each, (1 - each.sum(-1, keepdim=True)).clamp(min=1e-7)], -1) for each in (p, q))
        nats += (q * (q / p).log()).sum().item()
        tokens += len(answer)
    first = json.loads((trial.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["target_tokens"] == tokens
    assert first["loss"] == pytest.approx(nats / tokens, rel=1e-3)


@pytest.mark.parametrize("arm", ["warm_soft", "warm_hard"])
def test_warmup_round_trains_on_reference_solutions(finished: FinishedRun, tokenizer, arm: str):
    trial, problems = trial_of(finished, arm), problems_of(finished)
    assert not (trial.round_folder(0) / "answers").exists()
    warmup = read_json(trial.round_folder(0) / "round.json")
    assert (warmup["rows"], warmup["dropped"]) == (8, {})
    assert len(rows(trial.round_folder(1) / "answers")) == 16
    record = read_json(trial.folder / "trial.json")
    assert (record["status"], record["rows"] + sum(record["dropped"].values())) == ("complete", 24)
    # The first loss is that of the reference solutions under the base model.
    problem_ids = problem_ids_of_round(trial, 0)
    rows_of_round, _ = examples.build_examples(
        trial.arm, trial.problems, trial.completions, tokenizer, True, problem_ids
    )
    assert {row.problem_id for row in rows_of_round} == problem_ids
    for row in rows_of_round:
        solution = problems[row.problem_id]["reference_solution"]
        assert tokenizer.decode(row.completion_token_ids, skip_special_tokens=True) == solution
        assert (row.topk_ids_TK is not None) == (arm == "warm_soft")
    if arm == "warm_hard":
        model = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32).eval()
        nats = [
            -log_likelihoods(model, row.prompt_token_ids, row.completion_token_ids)
            .gather(-1, torch.tensor(row.completion_token_ids)[:, None])
            .sum()
            for row in rows_of_round
        ]
        expected = sum(nats) / sum(len(row.completion_token_ids) for row in rows_of_round)
        first = json.loads((trial.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_round_without_examples_keeps_weights(finished: FinishedRun):
    trial = trial_of(finished, "warm_hard")
    record = read_json(trial.folder / "trial.json")
    assert (record["rows"], record["dropped"]) == (8, {"incorrect": 16})
    first, *others = (json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] > 0
    assert [each["loss"] for each in others] == [None, None]
    assert [each["learning_rate"] for each in others] == sorted((e["learning_rate"] for e in others), reverse=True)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (trial.round_folder(0), trial.folder)]
    before, after = (safetensors.torch.load_file(file) for file in files)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_run_record_counts_scored_completions(finished: FinishedRun):
    recorded = read_json(finished.plan.folder / "run.json")["completions"]
    counts = {(each["source"], *each["arms"]): each["rows"] for each in recorded}
    assert counts == {("reference", "warm_soft/warmup"): 24, ("student", "soft"): 24, ("student", "warm_soft"): 16}


def test_teacher_stays_up_between_rounds(finished: FinishedRun):
    # It starts once to score the reference solutions, and once for both rounds.
    assert finished.stderr.count("starting the teacher") == 2


def test_hard_on_policy_arm_needs_no_teacher(finished: FinishedRun):
    trial = trial_of(finished, "hard")
    assert not (trial.round_folder(0) / "completions").exists()
    assert read_json(trial.folder / "trial.json")["strategy"] == ""


def test_repeated_command_does_no_work(finished: FinishedRun, rounds_file: Path):
    repeated = finish(["run", str(rounds_file), f"storage={finished.plan.root}"], finished.plan.root)
    assert repeated.stdout == finished.stdout
    assert "Ray" not in repeated.stderr


def test_run_killed_in_second_round_resumes_to_same_adapters(finished: FinishedRun, rounds_file: Path, tmp_path: Path):
    arguments = ["run", str(rounds_file), f"storage={tmp_path}"]
    second = [trial.round_folder(1) / "answers" for trial in plan_of(arguments).trials]
    family = kill_when(lambda: any(any(folder.glob("part-*.parquet")) for folder in second), arguments, tmp_path)
    done = finish(arguments, tmp_path)
    wait_for_end(family)
    for whole, resumed in zip(finished.plan.trials, done.plan.trials, strict=True):
        files = [trial.folder / "adapter" / "adapter_model.safetensors" for trial in (whole, resumed)]
        weights = [safetensors.torch.load_file(file) for file in files]
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor, weights[1][name], atol=1e-5), name
