"""Extract answers from completions and grade them."""

import re
from typing import Any

from raykd.errors import UserError

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# What the comparison overlooks, in the order in which it is taken out.
_IGNORED = [re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$")]
# An answer as such, and a calculation: what `states_answer_first` puts in order.
_STATED = re.compile(
    r"(?:####|\\boxed\{|\banswer\b\W{0,4}(?:\s+(?:is|equals|will be|would be)\b)?\W{0,4}?)\s*[*$]*-?\d", re.IGNORECASE
)
_OPERATOR = (
    r"(?:[-+*/×÷−–%]|\bx\b|\\times|\\div|\\cdot|\\frac|\bplus\b|\bminus\b|\btimes\b|\b(?:divided|multiplied) by\b)"
)
_STEP = re.compile(
    rf"(?:\d[^\n=#]{{0,60}}?{_OPERATOR}|{_OPERATOR})[^\n=#]{{0,60}}?\d[^\n=#]*(?:=|\bis\b|\bequals?\b)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def strict_match(text: str) -> str | None:
    """The number after the first `#### `, normalised; None where no answer is stated in that form."""
    match = _STRICT.search(text)
    return _answer(match[1]) if match else None


def flexible_extract(text: str) -> str | None:
    """The last number anywhere in the text, normalised; None where there is none.

    As in the harness, a number is a run of digits, `$`, `.` and `,`: "18..." is not 18, and "5-3" ends in -3.
    """
    matches = _FLEXIBLE.findall(text)
    return _answer(matches[-1]) if matches else None


def reference_answer(solution: str) -> str:
    """The reference answer of a GSM8K solution, which ends in `#### N`, without thousands commas.

    Raises:
        UserError: there is no `####`, or what follows the last one is not a number.
    """
    _, mark, stated = solution.rpartition("####")
    if not mark:
        raise UserError(f"a reference solution must end in '#### N', and this has no '####': {_end(solution)!r}")
    answer = _normalised(stated.strip())
    if not _NUMBER.fullmatch(answer):
        raise UserError(f"a reference solution must end in '#### N', N a number; after '####' is {stated!r}")
    return answer


def is_correct(answer: str | None, reference: str) -> bool:
    """Whether an extracted answer is the reference: the same string once the reference is normalised too.

    Strings, not values, are compared, as in the harness: "18.00" is not "18". An extracted answer is not normalised
    once more: "18.." has lost a dot and is "18.", which is not right.

    Args:
        answer: what `strict_match` or `flexible_extract` found.
        reference: the reference answer, or the solution that it ends.
    """
    return answer is not None and answer == _normalised(reference)


def states_answer_first(text: str) -> bool:
    """Whether an answer is stated before any calculation, or without one.

    An answer is a number after `####`, in `\\boxed{`, or right after the word "answer"; a calculation is a line in
    which an operator, as a sign, in words or in LaTeX, stands by a number and an equals sign or word follows. Of
    GSM8K's own solutions, none of which does it, less than one in a hundred is taken for doing it. A teacher that
    was given the answer may merely say it, and a student learns no step from that.
    """
    stated, step = _STATED.search(text), _STEP.search(text)
    return stated is not None and (step is None or stated.start() < step.start())


def repeated_share(text: str, size: int = 4) -> float:
    """The share of a text's word n-grams that occurred in it before: 0 where all are new.

    Near 1 where a model goes round in circles (seq-rep-n; Welleck et al. 2019, arXiv 1908.04319).

    Args:
        text: the answer; words are what stands between blanks.
        size: words in an n-gram.
    """
    words = text.split()
    grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _answer(extracted: str) -> str | None:
    return _normalised(extracted) if any(character.isdigit() for character in extracted) else None


def _normalised(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _end(text: str) -> str:
    return text if len(text) <= 80 else "…" + text[-80:]


def grade_completion(text: str, reference_answer: str) -> dict[str, Any]:
    """The columns of `schemas.COMPLETION` that say what a completion answers, and whether that is right."""
    strict = strict_match(text)
    return {
        "answer_strict": strict,
        "answer_flexible": flexible_extract(text),
        "is_correct": is_correct(strict, reference_answer),
    }
