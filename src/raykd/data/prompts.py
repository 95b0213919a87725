"""Chat messages for teacher and student, and the evaluation protocols."""

from collections.abc import Iterable, Mapping
from typing import Any

from raykd.config.sections import Evaluate, Protocol
from raykd.config.strategies import Exemplar, Strategy

Messages = list[dict[str, str]]


def student_messages(problem: Mapping[str, Any], instruction: str = "", exemplars: Iterable[Exemplar] = ()) -> Messages:
    """The messages a student is trained and evaluated on: the question, never a prime.

    Args:
        problem: a row with at least `question`.
        instruction: what both teacher and student are told about the form of the answer; may be empty.
        exemplars: worked problems that come before it, in evaluation by some protocols.
    """
    return [*_turns(exemplars, instruction), {"role": "user", "content": _join(problem["question"], instruction)}]


def teacher_messages(problem: Mapping[str, Any], strategy: Strategy, instruction: str = "") -> Messages:
    """The messages a teacher is sent: what the student sees, and the strategy's prime and exemplars.

    Args:
        problem: a row with `question`, `reference_answer` and `other_answer`.
        strategy: the prime and where it goes.
        instruction: as for the student, so that the prime is the only difference.
    """
    prime = strategy.text.format(reference_answer=problem["reference_answer"], other_answer=problem["other_answer"])
    question = _join(problem["question"], instruction)
    messages = [{"role": "system", "content": prime}] if strategy.place == "system" and prime else []
    messages += _turns(strategy.exemplars, instruction)
    asked = {"system": question, "before": _join(prime, question), "after": _join(question, prime)}
    return [*messages, {"role": "user", "content": asked[strategy.place]}]


def _turns(exemplars: Iterable[Exemplar], instruction: str) -> Messages:
    asked = [(_join(each.question, instruction), each.answer) for each in exemplars]
    return [
        {"role": role, "content": content}
        for question, answer in asked
        for role, content in (("user", question), ("assistant", answer))
    ]


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def stop_strings(evaluation: Evaluate) -> list[str]:
    """What ends an answer besides the tokens that end a turn; a raw text may go on with a question of its own."""
    if evaluation.stop is not None:
        return list(evaluation.stop)
    return ["Question:"] if evaluation.protocol == "zero_shot_raw" else []


def protocol_description(evaluation: Evaluate) -> str:
    """How the students are asked, in words."""
    sampling = evaluation.sampling
    drawn = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"
    several = f", {evaluation.num_samples} answers to each problem" if evaluation.num_samples > 1 else ""
    return f"asked by {evaluation.protocol}, {drawn}, at most {sampling.max_tokens} tokens{several}"


def protocol_exemplars(protocol: Protocol) -> tuple[Exemplar, ...]:
    """The worked problems that come before the one that is asked."""
    return EIGHT_SHOT_EXEMPLARS if protocol == "eight_shot_cot" else ()


def raw_prompt(messages: Messages) -> str:
    """The question as a text to go on with, as lm-evaluation-harness' task `gsm8k` puts it."""
    return f"Question: {messages[-1]['content']}\nAnswer:"


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
