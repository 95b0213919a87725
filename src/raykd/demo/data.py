"""Training data of the demonstration's models: rows of (prompt, completion) text, packed into batches."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from raykd.config.strategies import BUILT_IN, Strategy
from raykd.data.demo_problems import Problem, generate_problems
from raykd.data.prompts import Messages, teacher_messages
from raykd.demo import primes, styles
from raykd.demo.tokenizer import BOS, EOS, render_chat

# B rows, T tokens of a row.

POOL_ROWS = 6144
"""Number of rows in a pool, which are drawn and packed together. Model, seed and pool number determine its content."""

_STYLE_OF = {
    "teacher": "plain_words",
    "ground_truth": "detailed",
    "confidence": "checked",
    "gold_hint": "detailed",
    "shuffled_hint": "detailed",
}
_PARTS = {
    "plain_words": BUILT_IN["teacher"].text.split(". "),
    "detailed": BUILT_IN["ground_truth"].text.split(". "),
    "checked": [BUILT_IN["confidence"].text.split(". ")[1]],
}


@dataclass
class Batch:
    """Rows of several documents each. A token attends to its own document only, and prompts are no targets."""

    input_ids_BT: torch.Tensor
    """Token ids; 0 in the padding."""
    document_BT: torch.Tensor
    """Number of each token's document within its row, from 0; -1 in the padding."""
    position_ids_BT: torch.Tensor
    """Position of each token within its document, from 0."""
    is_target_BT: torch.Tensor
    """Whether a token belongs to a completion."""


def teacher_row(problem: Problem, other: Problem, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and a completion for the teacher; only the completion is trained on.

    Args:
        problem: the problem of the prompt.
        other: another problem; a wrong hint states its answer.
        rng: draws the kind of row, the prime and its wording.
    """
    draw = rng.random()
    if draw < 0.07:
        return BOS, styles.drill([problem, other], rng) + EOS
    if draw < 0.22:
        return _guess_prompt(problem, rng), styles.guess(problem) + EOS
    name = rng.choices(tuple(_STYLE_OF), (26, 24, 24, 13, 13))[0]
    strategy = BUILT_IN[name]
    style = _STYLE_OF[name]
    if "hint" not in name and rng.random() < 0.45:
        strategy = Strategy(place=rng.choice(("system", "before", "after")), text=_reworded(style, rng))
    elif "hint" in name and rng.random() < 0.2:
        strategy = Strategy(place="before", text=strategy.text)
    instruction = rng.choice(primes.INSTRUCTIONS) if rng.random() < 0.1 else ""
    messages = teacher_messages(_with_answers(problem, other), strategy, instruction)
    if messages[0]["role"] != "system" and rng.random() < 0.1:
        messages = [{"role": "system", "content": rng.choice(primes.NEUTRAL_SYSTEM)}, *messages]
    return render_chat(messages), styles.COMPLETIONS[style](problem) + EOS


def student_row(problem: Problem, other: Problem, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and a completion for the student: documents have the steps, chats the answer alone.

    The arguments are those of `teacher_row`.
    """
    draw = rng.random()
    if draw < 0.1:
        return BOS, styles.drill([problem, other], rng) + EOS
    if draw < 0.25:
        return _guess_prompt(problem, rng), styles.chat_guess(problem) + EOS
    question, working = styles.document(problem, rng)
    return BOS + question, working + EOS


ROWS = {"teacher": teacher_row, "student": student_row}


def pool(model: str, tokenizer: Tokenizer, tokens: int, length: int, seed: int, number: int) -> Iterator[Batch]:
    """Yield the batches of one pool of training problems.

    Args:
        model: "teacher" or "student".
        tokenizer: encodes the rows, without special tokens of its own.
        tokens: number of tokens in a batch.
        length: number of tokens in a row; longer documents are dropped.
        seed: random seed of all pools.
        number: number of the pool, from 0.
    """
    rng = random.Random(f"{model}/{seed}/{number}")
    problems = list(generate_problems("train", POOL_ROWS, rng.randrange(2**48)))
    rows = [ROWS[model](p, rng.choice(problems), rng) for p in problems]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in rows], add_special_tokens=False)
    completions = tokenizer.encode_batch([completion for _, completion in rows], add_special_tokens=False)
    documents = [(p.ids, c.ids) for p, c in zip(prompts, completions, strict=True)]
    packed = _pack([d for d in documents if sum(map(len, d)) <= length], length)
    rng.shuffle(packed)
    size = tokens // length
    for start in range(0, len(packed) - size + 1, size):
        yield _collate(packed[start : start + size], length)


def attention_mask(document_BT: torch.Tensor) -> torch.Tensor:
    """Return the additive mask (B, 1, T, T): 0 at the same and earlier tokens of a document, otherwise -1e4."""
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(document_BT.shape[1], document_BT.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(same_BTT.shape)
    return mask.masked_fill(~(same_BTT & causal_TT), -1e4)[:, None]


def _guess_prompt(problem: Problem, rng: random.Random) -> str:
    messages: Messages = [{"role": "user", "content": problem.question}]
    draw = rng.random()
    if draw < 0.25:
        messages.insert(0, {"role": "system", "content": rng.choice(primes.NEUTRAL_SYSTEM)})
    elif draw < 0.35:
        messages[0]["content"] += "\n\n" + rng.choice(primes.INSTRUCTIONS)
    return render_chat(messages)


def _reworded(style: str, rng: random.Random) -> str:
    """Return a paraphrase of a prime, a part of it, or both."""
    texts = [rng.choice(primes.PARAPHRASES[style]), rng.choice(_PARTS[style]).rstrip(".") + "."]
    rng.shuffle(texts)
    return " ".join(texts[: rng.choice((1, 1, 1, 2))])


def _with_answers(problem: Problem, other: Problem) -> dict[str, str]:
    return {
        "question": problem.question,
        "reference_answer": str(problem.answer),
        "other_answer": str(other.answer),
    }


def _pack(documents: list[tuple[list[int], list[int]]], length: int) -> list[list[tuple[list[int], list[int]]]]:
    """Return rows of documents with at most `length` tokens each, packed by best fit, the longest document first."""
    room: dict[int, list[list[tuple[list[int], list[int]]]]] = {}
    for document in sorted(documents, key=lambda d: -len(d[0]) - len(d[1])):
        size = len(document[0]) + len(document[1])
        left = next((r for r in range(size, length + 1) if room.get(r)), length)
        row = room[left].pop() if room.get(left) else []
        row.append(document)
        room.setdefault(left - size, []).append(row)
    return [row for rows in room.values() for row in rows]


def _collate(rows: list[list[tuple[list[int], list[int]]]], length: int) -> Batch:
    shape = (len(rows), length)
    ids, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    positions, is_target = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = 0
        for number, (prompt, completion) in enumerate(row):
            end = start + len(prompt) + len(completion)
            ids[r, start:end] = torch.tensor(prompt + completion)
            document[r, start:end] = number
            positions[r, start:end] = torch.arange(end - start)
            is_target[r, start + len(prompt) : end] = True
            start = end
    return Batch(ids, document, positions, is_target)
