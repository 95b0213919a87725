"""Spans: where in a text its numbers and the results of its steps are, in characters and in tokens.

A span is a pair of character positions, the second exclusive, as tokenizers give them with their offsets.
"""

import re
from collections.abc import Iterable, Sequence

Span = tuple[int, int]

# "1,200.50" and ".5" are one number each, "1,2" and "1,2000" two, and a sentence's final dot is part of none.
_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
# What may stand between an equals sign and its number: currencies, brackets, Markdown and LaTeX.
_BEFORE = r"(?:[ \t$€£~*_({-]|\\(?:[$ ,;!]|boxed|mathbf|textbf|text))*"
# "= 12 + 5" and "= 6N + 48" are no results yet. The number is atomic, lest its first digit alone be taken for one.
_UNFINISHED = r"[A-Za-z]?\s*(?:[-+*/×÷−^x]|\\times|\\div|\\cdot)\s*[$(]?\s*[0-9.]"
_RESULT = re.compile(
    rf"(?<![<>!=])={_BEFORE}(?P<first>(?>{_NUMBER}))(?!{_UNFINISHED})(?:>>{_BEFORE}(?P<second>(?>{_NUMBER})))?"
)
_NUMBERS = re.compile(_NUMBER)
_LINE = re.compile(r"[^\n]*\n?")


def number_spans(text: str) -> list[Span]:
    """Where a text's numbers are: digits, with thousands commas and decimals.

    Signs, `$` and `%` are no part of a number; "2/5" is two; numbers in words ("three", "half") are none.
    """
    return [match.span() for match in _NUMBERS.finditer(text)]


def step_results(text: str) -> list[tuple[int, int, list[Span]]]:
    """The steps of a solution, and where their results are.

    A step is a line with an equation, and its result the number after the last `=` that has one. In GSM8K's
    `48/2 = <<48/2=24>>24 clips` that is the number in the calculator's annotation and the one right behind it. An
    equation that goes on (`= 12 + 5`) has none, and neither does a line such as `#### 24`.

    Returns:
        for each step the span of its line, line break included, and the one or two spans of its result.
    """
    steps = []
    for line in _LINE.finditer(text):
        *_, last = [None, *_RESULT.finditer(text, *line.span())]
        if last:
            results = [last.span(name) for name in ("first", "second") if last[name] is not None]
            steps.append((*line.span(), results))
    return steps


def tokens_in(spans: Iterable[Span], offsets: Sequence[Span]) -> list[int]:
    """The tokens that share a character with any of some spans, in order.

    Args:
        spans: the spans.
        offsets: the span of each token, as of a tokenizer with `return_offsets_mapping`; empty for one without text.
    """
    wanted = list(spans)
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if any(max(start, first) < min(end, last) for first, last in wanted)
    ]


def previous_results(text: str, offsets: Sequence[Span]) -> list[list[int]]:
    """For each token of a solution the tokens of the result of the nearest earlier step.

    A token is of the line in which it begins. Those before the second step's line, the first step's line among them,
    have no earlier result.

    Args:
        text: the solution.
        offsets: the span of each of its tokens; `(len(text), len(text))` for one that ends it and has no text.

    Returns:
        for each token indices into `offsets`, all of them before it; empty where there is no earlier step.
    """
    steps = [(end, tokens_in(results, offsets)) for _, end, results in step_results(text)]
    found = []
    for start, _ in offsets:
        earlier = [tokens for end, tokens in steps if end <= start]
        found.append(earlier[-1] if earlier else [])
    return found
