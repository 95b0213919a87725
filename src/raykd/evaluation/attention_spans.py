"""Spans of numbers and step results in a text, in characters and in tokens.

A span is a pair of character positions, the second exclusive, as in a tokenizer's offset mapping.
"""

import re
from collections.abc import Iterable, Sequence

Span = tuple[int, int]

# "1,200.50" and ".5" are one number each, "1,2" and "1,2000" are two. A sentence's final dot belongs to no number.
_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
# Characters between an equals sign and its number: currencies, brackets, Markdown and LaTeX.
_BEFORE = r"(?:[ \t$€£~*_({-]|\\(?:[$ ,;!]|boxed|mathbf|textbf|text))*"
# "= 12 + 5" and "= 6N + 48" are not results. The number is an atomic group: its first digit alone must not match.
_UNFINISHED = r"[A-Za-z]?\s*(?:[-+*/×÷−^x]|\\times|\\div|\\cdot)\s*[$(]?\s*[0-9.]"
_RESULT = re.compile(
    rf"(?<![<>!=])={_BEFORE}(?P<first>(?>{_NUMBER}))(?!{_UNFINISHED})(?:>>{_BEFORE}(?P<second>(?>{_NUMBER})))?"
)
_NUMBERS = re.compile(_NUMBER)
_LINE = re.compile(r"[^\n]*\n?")


def number_spans(text: str) -> list[Span]:
    """Return the spans of a text's numbers: digits, with thousands commas and decimals.

    Signs, `$` and `%` do not belong to a number. "2/5" is two numbers; words ("three", "half") are none.
    """
    return [match.span() for match in _NUMBERS.finditer(text)]


def step_results(text: str) -> list[tuple[int, int, list[Span]]]:
    """Return the steps of a solution and the spans of their results.

    A step is a line with an equation; its result is the number after the last `=` that is followed by one. In GSM8K's
    `48/2 = <<48/2=24>>24 clips` the result is both the number in the calculator annotation and the one after it. A
    continued equation (`= 12 + 5`) has no result, nor has a line such as `#### 24`.

    Returns:
        For each step, start and end of its line (line break included) and the one or two spans of its result.
    """
    steps = []
    for line in _LINE.finditer(text):
        start, end = line.span()
        matches = list(_RESULT.finditer(text, start, end))
        if matches:
            last = matches[-1]
            results = [last.span(name) for name in ("first", "second") if last[name] is not None]
            steps.append((start, end, results))
    return steps


def tokens_in(spans: Iterable[Span], offsets: Sequence[Span]) -> list[int]:
    """Return the indices of the tokens that overlap any of the spans, in order.

    Args:
        spans: character spans.
        offsets: the span of each token, from a tokenizer's `return_offsets_mapping`; empty spans for special tokens.
    """
    spans = list(spans)
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if any(max(start, first) < min(end, last) for first, last in spans)
    ]


def previous_results(text: str, offsets: Sequence[Span]) -> list[list[int]]:
    """Return, for each token of a solution, the tokens of the result of the nearest earlier step.

    A token belongs to the line in which it begins. Tokens before the second step's line have no earlier result.

    Args:
        text: the solution.
        offsets: the span of each token; `(len(text), len(text))` for a final special token.

    Returns:
        For each token, earlier indices into `offsets`; empty if there is no earlier step.
    """
    steps = [(end, tokens_in(spans, offsets)) for _, end, spans in step_results(text)]
    results = []
    for start, _ in offsets:
        earlier = [tokens for end, tokens in steps if end <= start]
        results.append(earlier[-1] if earlier else [])
    return results
