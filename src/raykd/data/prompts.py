"""Prompts: the chat messages of teacher and student, and the protocols by which students are evaluated.

A protocol decides how a problem is put to a student: as in training (`zero_shot_chat`), after worked problems
(`eight_shot_cot`), or as text to continue (`zero_shot_raw`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from raykd.config.sections import Evaluate, Protocol
from raykd.config.strategies import Exemplar, Strategy

Messages = list[dict[str, str]]

EIGHT_SHOT_EXEMPLARS = (
    Exemplar(
        question="A bakery packs 12 rolls in a bag. On Saturday it sold 15 bags and 8 single rolls. How many rolls did "
        "it sell?",
        answer="The bags hold 15 * 12 = 180 rolls.\nWith the single ones that is 180 + 8 = 188 rolls.\n#### 188",
    ),
    Exemplar(
        question="Mira has $50. She buys three notebooks at $4 each and a lamp for $23. How many dollars are left?",
        answer="The notebooks cost 3 * 4 = 12 dollars.\nAll together costs 12 + 23 = 35 dollars.\n"
        "There are 50 - 35 = 15 dollars left.\n#### 15",
    ),
    Exemplar(
        question="A tank holds 240 litres and is three quarters full. How many litres have to be added to fill it?",
        answer="It holds 240 * 3 / 4 = 180 litres now.\nTo be full it needs 240 - 180 = 60 litres.\n#### 60",
    ),
    Exemplar(
        question="Tom is twice as old as his sister Ann. In six years they will be 42 years old together. How old is "
        "Tom now?",
        answer="Both will be six years older, so now they are 42 - 6 * 2 = 30 years old together.\n"
        "Tom has two of three equal parts, each of 30 / 3 = 10 years.\nTom is 2 * 10 = 20 years old.\n#### 20",
    ),
    Exemplar(
        question="A train leaves at 9:00 and goes 80 km an hour. How many km has it gone at 11:30?",
        answer="From 9:00 to 11:30 are 2.5 hours.\nIn that time it goes 80 * 2.5 = 200 km.\n#### 200",
    ),
    Exemplar(
        question="A shirt costs $40. It is reduced by 25%, and then by another $5. What does it cost in the end?",
        answer="25% of 40 dollars are 40 * 25 / 100 = 10 dollars.\nReduced by that it costs 40 - 10 = 30 dollars.\n"
        "In the end it costs 30 - 5 = 25 dollars.\n#### 25",
    ),
    Exemplar(
        question="Five friends share 3 pizzas of 10 slices each. Two of them eat 3 slices each, and the others eat the "
        "rest in equal parts. How many slices does each of the others eat?",
        answer="There are 3 * 10 = 30 slices.\nThe two friends eat 2 * 3 = 6 slices.\n"
        "That leaves 30 - 6 = 24 slices.\nThe others are 5 - 2 = 3 friends, so each eats 24 / 3 = 8 slices.\n#### 8",
    ),
    Exemplar(
        question="A school has 1,250 pupils. 450 come by bus, and of the others half walk. How many pupils walk?",
        answer="Not by bus come 1250 - 450 = 800 pupils.\nHalf of them are 800 / 2 = 400 pupils.\n#### 400",
    ),
)


def student_messages(problem: Mapping[str, Any], instruction: str = "", exemplars: Iterable[Exemplar] = ()) -> Messages:
    """Return the messages that a student is trained and evaluated on: the question, never a prime.

    Args:
        problem: a row with at least `question`.
        instruction: the instruction on the form of the answer, the same for teacher and student; may be empty.
        exemplars: worked problems before the question (`protocol_exemplars`).
    """
    return [*_exemplar_turns(exemplars, instruction), _user_turn(_join(problem["question"], instruction))]


def teacher_messages(problem: Mapping[str, Any], strategy: Strategy, instruction: str = "") -> Messages:
    """Return the messages for the teacher: the student's, with the strategy's prime and exemplars.

    Args:
        problem: a row with `question`, `reference_answer` and `other_answer`.
        strategy: the prime, its place, and exemplars.
        instruction: as for the student, so that the prime is the only difference.
    """
    prime = strategy.text.format(reference_answer=problem["reference_answer"], other_answer=problem["other_answer"])
    question = _join(problem["question"], instruction)
    exemplars = _exemplar_turns(strategy.exemplars, instruction)
    if strategy.place == "system":
        system = [{"role": "system", "content": prime}] if prime else []
        return [*system, *exemplars, _user_turn(question)]
    if strategy.place == "before":
        return [*exemplars, _user_turn(_join(prime, question))]
    return [*exemplars, _user_turn(_join(question, prime))]


def protocol_exemplars(protocol: Protocol) -> tuple[Exemplar, ...]:
    """Return the worked problems that come before the question."""
    return EIGHT_SHOT_EXEMPLARS if protocol == "eight_shot_cot" else ()


def raw_prompt(messages: Messages) -> str:
    """Return the question as text to continue, in the form of lm-evaluation-harness' task `gsm8k`."""
    return f"Question: {messages[-1]['content']}\nAnswer:"


def stop_strings(evaluation: Evaluate) -> list[str]:
    """Return the strings that end an answer, besides the model's end tokens.

    Without `evaluate.stop`, `zero_shot_raw` stops at "Question:", since a base model may go on with a new question.
    """
    if evaluation.stop is not None:
        return list(evaluation.stop)
    return ["Question:"] if evaluation.protocol == "zero_shot_raw" else []


def protocol_description(evaluation: Evaluate) -> str:
    """Return the protocol and sampling of an evaluation as a phrase for reports."""
    sampling = evaluation.sampling
    method = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"
    samples = f", {evaluation.num_samples} answers to each problem" if evaluation.num_samples > 1 else ""
    return f"protocol {evaluation.protocol}, {method}, at most {sampling.max_tokens} tokens{samples}"


def _exemplar_turns(exemplars: Iterable[Exemplar], instruction: str) -> Messages:
    turns: Messages = []
    for exemplar in exemplars:
        turns.append(_user_turn(_join(exemplar.question, instruction)))
        turns.append({"role": "assistant", "content": exemplar.answer})
    return turns


def _user_turn(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
