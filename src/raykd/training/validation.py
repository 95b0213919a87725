"""Validation of a student during training, on problems that are not trained on."""

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


def validation_steps(num_steps: int, num_validations: int) -> dict[int, int]:
    """Return the optimizer steps after which to validate, evenly spaced up to the last, and the validations' numbers.

    Args:
        num_steps: optimizer steps of the training.
        num_validations: number of validations; the last of several at the same step counts.
    """
    return {-(-num_steps * number // num_validations): number for number in range(1, num_validations + 1)}


def validate(engine: Any, model: Any, tokenizer: Any, trial: TrialSpec, number: int) -> dict[str, Any]:
    """Measure the sweep's metric on the validation problems, which the workers share.

    Every worker calls it at the same step.

    Args:
        engine: DeepSpeed's, around a `student.Distillation`.
        model: the peft model in it.
        tokenizer: the student's.
        trial: the trial.
        number: number of the validation, from 1.

    Returns:
        `number`; `n`, the number of problems; and the metric: `accuracy` with `correct`, or `loss` in nats per token.
    """
    assert trial.sweep, "only trials of a sweep are validated"
    worker, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = files.read_table(split_file(trial.problems, "validation")).to_pylist()
    own_problems, batch_size = problems[worker::num_workers], trial.sweep.validation_batch_size
    # Under ZeRO stage 3 the workers gather every layer together, so that all must run the same number of batches.
    starts = range(0, -(-len(problems) // num_workers), batch_size)
    measure = _count_correct if trial.sweep.metric == "accuracy" else _reference_loss
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    try:
        with torch.no_grad():
            for start in starts:
                batch = own_problems[start : start + batch_size]
                totals += measure(engine, model, tokenizer, trial, batch).to(totals)
    finally:
        engine.train()
    torch.distributed.all_reduce(totals)
    if trial.sweep.metric == "accuracy":
        num_correct, num_answers = totals.tolist()
        accuracy = num_correct / num_answers
        return {"number": number, "n": int(num_answers), "correct": int(num_correct), "accuracy": accuracy}
    loss_sum, num_tokens = totals.tolist()
    return {"number": number, "n": len(problems), "loss": loss_sum / num_tokens}


def _count_correct(engine: Any, model: Any, tokenizer: Any, trial: TrialSpec, problems: list[dict[str, Any]]) -> Tensor:
    """Return the number of greedy answers that are correct by strict match, and the number of answers: (2,)."""
    messages = [prompts.student_messages(problem, trial.arm.prompt.instruction) for problem in problems]
    # A worker without problems generates too, since all workers gather the layers together; the answer is not counted.
    token_ids = [tokenization.prompt_token_ids(tokenizer, each) for each in messages] or [[tokenizer.eos_token_id]]
    pad_token_id, longest = tokenizer.pad_token_id or 0, max(map(len, token_ids))
    # Padded on the left, so that every answer begins at the same position.
    input_ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in token_ids]
    attention_mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in token_ids]
    # Replaces sampling options of the model's generation_config.json, which evaluation ignores too.
    model.get_base_model().generation_config = GenerationConfig()
    sequences = model.generate(
        input_ids=torch.tensor(input_ids, device=engine.device),
        attention_mask=torch.tensor(attention_mask, device=engine.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=trial.max_tokens,
            eos_token_id=sorted(tokenization.end_token_ids(trial.arm.student)),
            pad_token_id=pad_token_id,
        ),
        synced_gpus=trial.arm.train.zero_stage == 3 and trial.arm.train.num_workers > 1,
    )
    texts = tokenizer.batch_decode(sequences[:, longest:], skip_special_tokens=True)
    is_correct = [
        grading.is_correct(grading.strict_match(text), problem["reference_answer"])
        for text, problem in zip(texts, problems, strict=False)
    ]
    return torch.tensor([sum(is_correct), len(is_correct)])


def _reference_loss(
    engine: Any, model: Any, tokenizer: Any, trial: TrialSpec, problems: list[dict[str, Any]]
) -> Tensor:
    """Return the summed loss of the reference solutions' tokens, in nats, and their number: (2,) float64."""
    rows = [examples.reference_example(problem, tokenizer, trial.arm.prompt.instruction) for problem in problems]
    batch = batching.collate(rows, tokenizer.pad_token_id or 0, packing=False)
    loss_sum = engine({key: tensor.to(engine.device) for key, tensor in batch.items()})
    num_tokens = sum(len(row.completion_token_ids) for row in rows)
    return torch.tensor([float(loss_sum), num_tokens], dtype=torch.float64)
