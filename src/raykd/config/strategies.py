"""Strategies: how the teacher is primed, as data.

The meanings follow "Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting"
(arXiv 2412.17846); the wording is this project's own.
"""

from string import Formatter
from typing import Literal

from pydantic import Field, field_validator

from raykd.config.base import ConfigModel
from raykd.errors import UserError

PLACEHOLDERS = {"reference_answer", "other_answer"}


class Exemplar(ConfigModel):
    """A worked problem that is shown to the teacher before the one it is asked."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    """As the teacher should answer, in the form that `prompt.instruction` asks for."""


class Strategy(ConfigModel):
    """One way to prime the teacher. The student never sees any of it."""

    place: Literal["system", "before", "after"] = "before"
    """Where the text goes: the system message, or before or after the question in the user's message."""
    text: str = ""
    """The prime. `{reference_answer}` and `{other_answer}` (another problem's) are filled in."""
    exemplars: tuple[Exemplar, ...] = ()
    """Few-shot examples, each a turn of the user and one of the assistant before the question."""
    version: int = 1
    """Raise it when the text changes its meaning; text and version are part of the content key."""

    @property
    def is_control(self) -> bool:
        """Whether it tells the teacher another problem's answer: what it is worth is not the worth of a hint."""
        return "other_answer" in _placeholders(self.text)

    @field_validator("text")
    @classmethod
    def _known_placeholders(cls, text: str) -> str:
        if unknown := _placeholders(text) - PLACEHOLDERS:
            raise UserError(
                f"unknown placeholder {sorted(unknown)} in a strategy's text; "
                f"known: {sorted(PLACEHOLDERS)}; write {{{{ and }}}} for plain braces"
            )
        return text


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


_HINT = "Its correct answer is {answer}. Show the steps that lead to it, as if you had found it yourself."

BUILT_IN: dict[str, Strategy] = {
    "none": Strategy(),
    "teacher": Strategy(
        text="You are a patient teacher, and your student has never met a problem like this. "
        "Guide the student through it in small steps and plain words, and say what each step finds."
    ),
    "ground_truth": Strategy(
        text="You are a capable language model, and smaller models will learn from your answer as the truth. "
        "Give a detailed solution with the calculation of every step, yet keep it clear and within their reach."
    ),
    "confidence": Strategy(
        text="Solve the problem step by step. When you have the answer, check it briefly before you state it."
    ),
    "gold_hint": Strategy(place="after", text=_HINT.format(answer="{reference_answer}")),
    "shuffled_hint": Strategy(place="after", text=_HINT.format(answer="{other_answer}")),
}
