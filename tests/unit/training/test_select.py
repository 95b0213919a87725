"""Selection: what is kept of a problem's completions, and what is counted of the rest."""

import pytest

from raykd.config.sections import Targets
from raykd.training.examples import select_completions


def row(tokens: list[int], correct: bool = True, finish: str = "stop", error: str = "", text: str = "") -> dict:
    said = {"completion_token_ids": tokens, "completion": text or "".join(map(chr, tokens))}
    return {**said, "is_correct": correct, "finish_reason": finish, "error": error}


ROWS = [
    row([1, 2, 3, 4], correct=True),
    row([1, 2], correct=False),
    row([], correct=False),
    row([1, 2, 3, 4], correct=True),
    row([9], correct=False, error="no answer"),
    row([5, 6, 7], correct=True),
    row([5], correct=True, finish="length"),
]


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({}, [0, 1, 3, 5, 6], {"empty": 1, "error": 1}),
        ({"deduplicate": True}, [0, 1, 5, 6], {"empty": 1, "error": 1, "duplicate": 1}),
        ({"filter": "correct"}, [0, 3, 5, 6], {"empty": 1, "error": 1, "incorrect": 1}),
        (
            {"filter": "correct", "deduplicate": True},
            [0, 5, 6],
            {"empty": 1, "error": 1, "incorrect": 1, "duplicate": 1},
        ),
        ({"filter": "best"}, [5], {"empty": 1, "error": 1, "not_best": 4}),
    ],
)
def test_what_is_kept_and_why_the_rest_is_not(settings: dict, kept: list[int], dropped: dict[str, int]):
    found, reasons = select_completions(ROWS, Targets(**settings))
    assert [ROWS.index(each) if each is not ROWS[3] else 3 for each in found] == kept
    assert dict(reasons) == dropped
    assert len(found) + sum(reasons.values()) == len(ROWS), "every row is accounted for"


def test_the_best_of_wrong_ones_is_the_shortest_that_ended():
    rows = [row([1], False, "length"), row([1, 2, 3], False), row([1, 2], False)]
    assert select_completions(rows, Targets(filter="best"))[0] == [rows[2]]


def test_where_a_teacher_gives_text_alone_that_counts():
    rows = [row([], text="It is 4."), row([], text="It is 4."), row([], text="4"), row([], text="")]
    found, reasons = select_completions(rows, Targets(deduplicate=True))
    assert (found, dict(reasons)) == ([rows[0], rows[2]], {"duplicate": 1, "empty": 1})
    assert select_completions(rows, Targets(filter="best"))[0] == [rows[2]]


def test_a_problem_without_completions_gives_none():
    assert select_completions([], Targets(filter="best")) == ([], {})
