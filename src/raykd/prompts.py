"""Prompts: a problem and a strategy become the chat messages that the teacher and the student are sent."""

from collections.abc import Iterable, Mapping
from typing import Any

from raykd.strategies import Exemplar, Strategy

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
