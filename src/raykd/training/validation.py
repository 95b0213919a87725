"""Validation: how good a student is in the midst of its training, on problems that nobody trains on."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import GenerationConfig

from raykd.data import grading, prompts
from raykd.models import tokenization
from raykd.storage import files
from raykd.storage.paths import split_file
from raykd.training import batching, examples
from raykd.training.trial import TrialSpec


def validation_steps(num_steps: int, times: int) -> dict[int, int]:
    """After which optimizer steps a student is measured for which time, evenly spread and the last time at the end."""
    return {-(-num_steps * number // times): number for number in range(1, times + 1)}


def validate(engine: Any, model: Any, tokenizer: Any, job: TrialSpec, number: int) -> dict[str, Any]:
    """Measures a student with its adapter as it is. Every worker calls it, and each does its share of the problems.

    Args:
        engine: DeepSpeed's, around a `student.Distillation`.
        model: the student in it, as peft wraps it.
        tokenizer: its tokenizer.
        job: the trial.
        number: which time this is, from 1.

    Returns:
        `number`; `n`, how many problems were asked; and what the sweep looks at: `accuracy` with `correct`, or `loss`.
    """
    assert job.sweep, "a trial outside a sweep is not measured"
    worker, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = files.read_table(split_file(job.problems, "validation")).to_pylist()
    size, mine = job.sweep.validation_batch_size, problems[worker::num_workers]
    # Under ZeRO stage 3 the workers gather every layer together, so that each must ask as many batches as the others.
    starts = range(0, -(-len(problems) // num_workers), size)
    count = _count_correct if job.sweep.metric == "accuracy" else _reference_loss
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    try:
        with torch.no_grad():
            for start in starts:
                totals += count(engine, model, tokenizer, job, mine[start : start + size]).to(totals)
    finally:
        engine.train()
    torch.distributed.all_reduce(totals)
    first, second = totals.tolist()
    if job.sweep.metric == "accuracy":
        return {"number": number, "n": int(second), "correct": int(first), "accuracy": first / second}
    return {"number": number, "n": len(problems), "loss": first / second}


def _count_correct(engine: Any, model: Any, tokenizer: Any, job: TrialSpec, problems: list[dict[str, Any]]) -> Tensor:
    """How many greedy answers are right by strict match, and of how many."""
    messages = [prompts.student_messages(problem, job.arm.prompt.instruction) for problem in problems]
    # An empty share keeps pace with the others, and counts for nothing.
    asked = [tokenization.prompt_token_ids(tokenizer, each) for each in messages] or [[tokenizer.eos_token_id]]
    pad, width = tokenizer.pad_token_id or 0, max(map(len, asked))
    tokens = torch.tensor([[pad] * (width - len(each)) + each for each in asked], device=engine.device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in asked], device=engine.device)
    # What the model's own file says of sampling is not asked, as in evaluation.
    model.get_base_model().generation_config = GenerationConfig()
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=job.max_tokens,
            eos_token_id=sorted(tokenization.end_token_ids(job.arm.student)),
            pad_token_id=pad,
        ),
        synced_gpus=job.arm.train.zero_stage == 3 and job.arm.train.num_workers > 1,
    )
    texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    right = [
        grading.is_correct(grading.strict_match(text), problem["reference_answer"])
        for text, problem in zip(texts, problems, strict=False)
    ]
    return torch.tensor([sum(right), len(right)])


def _reference_loss(engine: Any, model: Any, tokenizer: Any, job: TrialSpec, problems: list[dict[str, Any]]) -> Tensor:
    """The summed nats of the reference solutions' tokens, and how many tokens there are."""
    rows = [examples.reference_example(problem, tokenizer, job.arm.prompt.instruction) for problem in problems]
    inputs = batching.collate(rows, tokenizer.pad_token_id or 0, packing=False)
    nats = engine({key: tensor.to(engine.device) for key, tensor in inputs.items()})
    return torch.tensor([float(nats), sum(len(row.completion_token_ids) for row in rows)], dtype=torch.float64)
