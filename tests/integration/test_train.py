"""The training loop without Ray: parallelism, batching and resumption do not change its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oracles import log_likelihoods
from raykd.config.training import Student
from raykd.data import prompts
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model

pytestmark = pytest.mark.timeout(900)
SCRIPT = Path(__file__).parents[1] / "helpers" / "plain_loop.py"


# The first variant is the reference for the others.
HARD = {
    1: ["zero0-micro8", "zero0-micro1", "zero0-micro8-packed-loss", "zero0-micro4"],
    2: [
        "zero0-micro4-answers",
        "zero1-micro2",
        "zero2-micro4-packed-loss",
        "zero3-micro2-loss",
    ],
}
# Killed at its first checkpoint, and resumed from it.
KILLED = "zero3-micro2-checkpointed-answers-killed"
# Started with two workers, and resumed from the first checkpoint with one or three.
FEWER, MORE = "zero0-micro2-elastic", "zero0-micro2-packed-elastic"
SOFT = {1: ["zero0-micro8-soft", "zero2-micro4-soft-packed-chunked"], 2: ["zero3-micro2-soft-chunked"]}
BFLOAT16 = {1: ["zero1-micro4-bf16"], 2: ["zero3-micro4-bf16"]}
MORE_BFLOAT16 = {1: ["zero2-micro8-bf16"], 2: ["zero2-micro4-bf16-checkpointed"]}


def names(variants: dict[int, list[str]]) -> list[str]:
    return [f"workers{workers}-{variant}" for workers, each in variants.items() for variant in each]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    both = {workers: [variant for group in (HARD, SOFT, BFLOAT16) for variant in group[workers]] for workers in (1, 2)}
    # The processes exit at the first checkpoint of a killed or elastic variant, so it must be the last variant.
    run(folder, 2, [*both[2], KILLED])
    run(folder, 2, [KILLED, FEWER])
    run(folder, 1, [FEWER, *both[1]])
    return folder


def resume_with(folder: Path, workers: int, variant: str) -> None:
    """Train a variant with two workers up to its first checkpoint, and resume it with another number of workers."""
    run(folder, 2, [variant])
    run(folder, workers, [variant])


def run(folder: Path, workers: int, variants: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *variants],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("first", "name"),
    [(names(group)[0], name) for group in (HARD, SOFT) for name in names(group)[1:]]
    + [(names(HARD)[0], f"workers2-{variant}") for variant in (KILLED, FEWER)],
)
def test_runtime_variants_differ_by_rounding_only(trained: Path, first: str, name: str):
    """Variants of workers, micro-batches, ZeRO stage, packing, activation checkpointing, chunks, and resumption."""
    check_agreement(trained, first, name)


# Starts five more processes. In `make test`, the test above covers fewer workers.
@pytest.mark.slow
def test_resume_with_more_workers_differs_by_rounding_only(trained: Path):
    resume_with(trained, 3, MORE)
    check_agreement(trained, names(HARD)[0], f"workers2-{MORE}")


def check_agreement(trained: Path, first: str, name: str) -> None:
    expected = trained / first
    assert len(losses(expected)) == 6
    assert losses(trained / name) == pytest.approx(losses(expected), rel=1e-4)
    found, wanted = weights(trained / name), weights(expected)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        # Adam divides by small second moments, which amplifies rounding.
        assert torch.allclose(found[key], tensor, atol=2e-3), key


def validations(folder: Path) -> list[dict]:
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(point["step"], point["validation"]) for point in points if "validation" in point]


@pytest.mark.parametrize("name", [name for name in names(HARD) if "loss" in name])
def test_validation_loss_matches_saved_adapter(trained: Path, name: str):
    (middle, first), (end, last) = validations(trained / name)
    assert (middle, end) == (3, 6)
    assert [{key: each[key] for key in ("number", "n")} for each in (first, last)] == [
        {"number": 1, "n": 5},
        {"number": 2, "n": 5},
    ]
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-student"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(trained / name / "adapter")).eval()
    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    (file,) = trained.glob("splits-0/validation.parquet")
    nats, tokens = 0.0, 0
    for problem in pyarrow.parquet.read_table(file).to_pylist():
        prompt = tokenization.prompt_token_ids(tokenizer, prompts.student_messages(problem))
        answer = [*tokenizer(problem["reference_solution"])["input_ids"], tokenizer.eos_token_id]
        nats -= log_likelihoods(model, prompt, answer).gather(-1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
    assert last["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert last["loss"] < first["loss"]


def test_validation_accuracy_covers_problems_of_all_workers(trained: Path):
    found = [validations(trained / name) for name in [*names(HARD), f"workers2-{KILLED}"] if "answers" in name]
    assert len(found) == 2
    for (middle, first), (end, last) in found:
        assert (middle, first["number"], end, last["number"]) == (3, 1, 6, 2)
        assert first["n"] == last["n"] == 5
    assert found[0] == found[1]


@pytest.mark.parametrize("name", names(BFLOAT16))
def test_bfloat16_losses_match_float32(trained: Path, name: str):
    check_bfloat16(trained, name)


# Ten seconds per variant, because CPUs emulate bfloat16. In `make test`, the test above covers stages 1 and 3.
@pytest.mark.slow
def test_bfloat16_losses_match_float32_at_zero_stage_2(trained: Path):
    for workers, variants in MORE_BFLOAT16.items():
        run(trained, workers, variants)
    for name in names(MORE_BFLOAT16):
        check_bfloat16(trained, name)


def check_bfloat16(trained: Path, name: str) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / names(HARD)[0]), rel=0.02)


def test_loss_falls(trained: Path):
    curve = losses(trained / "workers1-zero0-micro8")
    assert curve[-1] < curve[0]
