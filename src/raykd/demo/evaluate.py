"""Evaluation of the demonstration's models: greedy answers to held-out problems, by strategy."""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from raykd.config.strategies import BUILT_IN, Strategy
from raykd.data.demo_problems import Problem, generate_problems
from raykd.data.prompts import Messages, student_messages, teacher_messages
from raykd.demo import primes
from raykd.demo.tokenizer import render_chat


def evaluate(name: str, folder: Path, problems: int, split: str = "test") -> dict[str, Any]:
    """Return the accuracy of a model with greedy decoding in bfloat16.

    Args:
        name: "teacher" (with each built-in strategy and the unseen primes) or "student" (the question alone).
        folder: the folder of the model.
        problems: number of held-out problems.
        split: "validation" or "test".

    Returns:
        `n` (number of problems) and `split`; for each strategy `strict`, `flexible` (see `score`) and `mean_tokens`
        (mean length of a completion).
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rows = list(generate_problems(split, problems + 1, seed=1))
    result: dict[str, Any] = {"n": problems, "split": split}
    for title, strategy in _strategies(name).items():
        prompts = [_messages(problem, other, strategy) for problem, other in pairwise(rows)]
        texts, mean_tokens = complete(model, tokenizer, prompts)
        result[title] = score(texts, [p.answer for p in rows[:-1]]) | {"mean_tokens": round(mean_tokens, 1)}
        print(f"{name} {title}: {result[title]}", flush=True)
    return result


def score(texts: Iterable[str], answers: list[int]) -> dict[str, float]:
    """Return the accuracy, 0 to 1, by the number after `####` (`strict`) and by the last number (`flexible`)."""
    texts = list(texts)
    strict = [re.findall(r"#### (-?\d+)", text)[-1:] == [str(a)] for text, a in zip(texts, answers, strict=True)]
    flexible = [re.findall(r"-?\d+", text)[-1:] == [str(a)] for text, a in zip(texts, answers, strict=True)]
    return {"strict": sum(strict) / len(texts), "flexible": sum(flexible) / len(texts)}


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: list[Messages],
    batch_size: int = 128,
) -> tuple[list[str], float]:
    """Return greedy completions of at most 160 tokens, and their mean length in tokens."""
    encoded = [tokenizer.encode(render_chat(messages), add_special_tokens=False) for messages in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts, lengths = [""] * len(encoded), 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=160, do_sample=False)
        for i, ids in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            texts[i], lengths = str(tokenizer.decode(ids)), lengths + len(ids)
    return texts, lengths / len(encoded)


def _strategies(name: str) -> dict[str, Strategy]:
    if name == "student":
        return {"none": BUILT_IN["none"]}
    unseen = {f"unseen_{style}": Strategy(place="system", text=texts[0]) for style, texts in primes.UNSEEN.items()}
    return BUILT_IN | unseen


def _messages(problem: Problem, other: Problem, strategy: Strategy) -> Messages:
    row = {
        "question": problem.question,
        "reference_answer": str(problem.answer),
        "other_answer": str(other.answer),
    }
    return teacher_messages(row, strategy) if strategy.text else student_messages(row)
