"""Grading: answers extracted from completions, their comparison with the reference, and properties of the text.

Extraction and comparison are those of lm-evaluation-harness' task `gsm8k`: `strict_match` and `flexible_extract`.
"""

import re
from typing import Any

from raykd.errors import UserError

# The patterns of the harness's task gsm8k: after `####`, and any number.
STRICT_PATTERN, FLEXIBLE_PATTERN = r"#### (\-?[0-9\.\,]+)", "(-?[$0-9.,]{2,})|(-?[0-9]+)"
_STRICT, _FLEXIBLE = re.compile(STRICT_PATTERN), re.compile(FLEXIBLE_PATTERN)
# Patterns that the comparison removes, in this order.
IGNORED_PATTERNS = (",", r"\$", "(?s).*#### ", r"\.$")
_IGNORED = [re.compile(pattern) for pattern in IGNORED_PATTERNS]
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
# A stated answer and a calculation: `states_answer_first` compares their positions.
_STATED = re.compile(
    r"(?:####|\\boxed\{|\banswer\b\W{0,4}(?:\s+(?:is|equals|will be|would be)\b)?\W{0,4}?)\s*[*$]*-?\d", re.IGNORECASE
)
_OPERATOR = (
    r"(?:[-+*/×÷−–%]|\bx\b|\\times|\\div|\\cdot|\\frac|\bplus\b|\bminus\b|\btimes\b|\b(?:divided|multiplied) by\b)"
)
_STEP = re.compile(
    rf"(?:\d[^\n=#]{{0,60}}?{_OPERATOR}|{_OPERATOR})[^\n=#]{{0,60}}?\d[^\n=#]*(?:=|\bis\b|\bequals?\b)", re.IGNORECASE
)
_MAX_QUOTED_CHARS = 80


def grade_completion(text: str, reference_answer: str) -> dict[str, Any]:
    """Return the columns of `schemas.COMPLETION` with a completion's answers and its grade (by strict match).

    Args:
        text: the completion.
        reference_answer: the problem's reference answer.
    """
    strict = strict_match(text)
    return {
        "answer_strict": strict,
        "answer_flexible": flexible_extract(text),
        "is_correct": is_correct(strict, reference_answer),
    }


def strict_match(text: str) -> str | None:
    """Return the normalized number after the first `#### `; None where there is none in that form."""
    match = _STRICT.search(text)
    return _answer(match[1]) if match else None


def flexible_extract(text: str) -> str | None:
    """Return the last number of a text, normalized; None where there is none.

    As in the harness, a number is a run of digits, `$`, `.` and `,`: "18..." is not 18, and "5-3" ends in -3.
    """
    matches = [match[0] for match in _FLEXIBLE.finditer(text)]
    return _answer(matches[-1]) if matches else None


def reference_answer(solution: str) -> str:
    """Return the reference answer of a GSM8K solution, which ends in `#### N`, without thousands separators.

    Raises:
        UserError: no `####`, or no number after the last one.
    """
    _, mark, stated = solution.rpartition("####")
    if not mark:
        raise UserError(f"a reference solution must end in '#### N', but this one has no '####': {_end(solution)!r}")
    answer = _normalized(stated.strip())
    if not _NUMBER.fullmatch(answer):
        raise UserError(f"a reference solution must end in '#### N' with a number N; after '####' is {stated!r}")
    return answer


def is_correct(answer: str | None, reference: str) -> bool:
    """Return whether an extracted answer equals the normalized reference.

    Strings are compared, not values, as in the harness: "18.00" is not "18". The answer is not normalized again:
    "18.." was normalized to "18." by the extraction, which is wrong.

    Args:
        answer: the result of `strict_match` or `flexible_extract`.
        reference: the reference answer, or the solution that ends in it.
    """
    return answer is not None and answer == _normalized(reference)


def states_answer_first(text: str) -> bool:
    r"""Return whether a text states an answer before any calculation, or without one.

    An answer is a number after `####`, in `\boxed{`, or right after the word "answer". A calculation is a line with an
    operator (a sign, a word or LaTeX) beside a number, followed by an equals sign or word. None of GSM8K's own
    solutions states its answer first; fewer than one in a hundred is misclassified. A teacher that was given the answer
    may state it without steps, from which a student learns none.
    """
    stated, step = _STATED.search(text), _STEP.search(text)
    return stated is not None and (step is None or stated.start() < step.start())


def repeated_share(text: str, size: int = 4) -> float:
    """Return the share of a text's word n-grams that occurred in it before, from 0 (all new) toward 1 (a loop).

    This is seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319).

    Args:
        text: the answer; words are separated by whitespace.
        size: words of an n-gram.
    """
    words = text.split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _answer(extracted: str) -> str | None:
    return _normalized(extracted) if any(character.isdigit() for character in extracted) else None


def _normalized(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _end(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED_CHARS else "…" + text[-_MAX_QUOTED_CHARS:]
