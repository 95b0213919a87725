"""Strategies: how the teacher is primed, as data.

The meanings follow "Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting"
(arXiv 2412.17846); the wording is this project's own.
"""

import re
from string import Formatter
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raykd.config.base import NAME_PATTERN, ConfigModel
from raykd.errors import UserError

PLACEHOLDERS = {"reference_answer", "other_answer"}


class Exemplar(ConfigModel):
    """A worked example for few-shot prompting."""

    question: str = Field(min_length=1)
    """Text of the example's problem."""
    answer: str = Field(min_length=1)
    """Answer in the format that `prompt.instruction` requires."""


class Strategy(ConfigModel):
    """One way to prime the teacher. The student is never primed."""

    place: Literal["system", "before", "after"] = "before"
    """Position of the text. `system`: the system message. `before`, `after`: before or after the question in the user
    message."""
    text: str = ""
    """Text of the prime. `{reference_answer}` is replaced by the problem's answer, `{other_answer}` by the answer of
    another problem."""
    exemplars: tuple[Exemplar, ...] = ()
    """Few-shot examples: each adds a user and an assistant message before the question."""
    version: int = 1
    """Version of the strategy. Change it to generate new completions with an unchanged text."""

    @property
    def is_control(self) -> bool:
        """Whether the prime gives another problem's answer, as a control without a useful hint."""
        return "other_answer" in _placeholders(self.text)

    @field_validator("text")
    @classmethod
    def _check_placeholders(cls, text: str) -> str:
        try:
            fields = list(Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{error}: write {{{{ and }}}} for plain braces") from None
        for _, name, spec, conversion in fields:
            if name is not None and (spec or conversion):
                raise UserError(f"the placeholder {name!r} has a format: write {{{name}}} alone")
        if unknown := _placeholders(text) - PLACEHOLDERS:
            raise UserError(
                f"unknown placeholder {sorted(unknown)}: use {sorted(PLACEHOLDERS)}, or {{{{ and }}}} for plain braces"
            )
        return text


class Prompt(ConfigModel):
    """What the teacher and the student are prompted with."""

    strategy: str = "none"
    """How the teacher is primed: `none`, `teacher`, `ground_truth`, `confidence`, `gold_hint`, `shuffled_hint`, or a
    name from `prompt.strategies`."""
    instruction: str = "End with a line of the form '#### 42' that holds the final number alone."
    """Text after the question, for teacher and student alike. Empty: no instruction."""
    strategies: dict[str, Strategy] = Field(default_factory=dict)
    """Your own strategies by name. A built-in name replaces the built-in strategy; `none` cannot be replaced."""

    @model_validator(mode="after")
    def _check_strategies(self) -> Self:
        for name, strategy in self.strategies.items():
            if not re.fullmatch(NAME_PATTERN, name):
                raise UserError(f"strategies: name {name!r} is not valid: use letters, digits, '.', '_' and '-' only")
            if name == "none" and (strategy.text.strip() or strategy.exemplars):
                raise UserError(
                    "strategies.none: 'none' is the unprimed baseline and cannot be redefined: choose another name"
                )
            if not strategy.text.strip() and not strategy.exemplars and name != "none":
                raise UserError(
                    f"strategies.{name}: has neither text nor exemplars: set one of them, or use strategy=none"
                )
        return self


def _placeholders(text: str) -> set[str]:
    """Return the names in braces of a text."""
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
