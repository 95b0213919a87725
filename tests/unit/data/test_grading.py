"""Grading of outputs with known answers, and of all problems of GSM8K if its files exist."""

import json
import os
import re
from pathlib import Path

import pytest

from raykd.data.grading import (
    flexible_extract,
    is_correct,
    reference_answer,
    repeated_share,
    states_answer_first,
    strict_match,
)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("#### -7", "-7", "-7"),
        ("#### 18.", "18", "18"),
        ("#### 18.00", "18.00", "18.00"),
        ("####18", None, "18"),
        ("#### $18", None, "18"),
        ("####  18", None, "18"),
        ("#### eighteen", None, None),
        ("#### 5\n#### 6", "5", "6"),
        ("#### 18\n\nQuestion: what is 3 + 4? #### 7", "18", "7"),
        ("##### 18", "18", "18"),
        ("The answer is 18.", None, "18"),
        ("The answer is $1,800.", None, "1800"),
        ("The answer is -$5", None, "-5"),
        ("The answer is \\boxed{42}", None, "42"),
        ("5-3", None, "-3"),
        ("It is 18...", None, "18.."),
        # The harness extracts the dots, and counts them as wrong.
        ("It is 18 ...", None, None),
        ("#### ...", None, None),
        ("7%", None, "7"),
        ("3/4", None, "4"),
        ("1e3", None, "3"),
        ("٣ apples", None, None),
        ("", None, None),
        ("no number at all", None, None),
    ],
)
def test_awkward_outputs_are_extracted(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_match(text) == strict
    assert flexible_extract(text) == flexible


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("18", "18", True),
        ("1234", "1,234", True),
        ("18", "$18.", True),
        # The extraction of "#### 18..", which is wrong in the harness, too.
        ("18.", "18", False),
        ("18.00", "18", False),
        ("018", "18", False),
        ("-18", "18", False),
        ("", "18", False),
        (None, "18", False),
        # The harness compares with the whole reference solution.
        ("18", "She makes\n9 * 2 = 18\n#### 18", True),
    ],
)
def test_answers_are_compared_as_strings(answer: str | None, reference: str, expected: bool) -> None:
    assert is_correct(answer, reference) is expected


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("#### 2.5 \n", "2.5"),
    ],
)
def test_reference_answer_is_number_after_marker(solution: str, answer: str) -> None:
    assert reference_answer(solution) == answer


@pytest.mark.parametrize(
    ("solution", "named"),
    [("the answer is 18", "no '####'"), ("", "no '####'"), ("#### about 18", "about 18"), ("18 ####", "''")],
)
def test_solution_without_reference_answer_is_refused(solution: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        reference_answer(solution)


@pytest.mark.parametrize(
    ("split", "count", "negatives", "with_commas"), [("train", 7473, 3, 79), ("test", 1319, 2, 14)]
)
def test_gsm8k_solutions_are_graded_correct(split: str, count: int, negatives: int, with_commas: int) -> None:
    folder = os.environ.get("RAYKD_GSM8K_DIR")
    if not folder:
        pytest.skip("set RAYKD_GSM8K_DIR to the directory with GSM8K's train.jsonl and test.jsonl")
    lines = (Path(folder) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    answers = [reference_answer(solution) for solution in solutions]

    assert len(answers) == count
    assert all(str(int(answer)) == answer for answer in answers)
    assert sum(answer.startswith("-") for answer in answers) == negatives
    assert sum("," in solution.rsplit("####", 1)[1] for solution in solutions) == with_commas
    # A copy of the reference solution is correct by both scores.
    for solution, answer in zip(solutions, answers, strict=True):
        assert strict_match(solution) == flexible_extract(solution) == answer
        assert is_correct(answer, solution)
    # The solutions calculate before they answer, with and without calculator annotations.
    for texts in (solutions, [re.sub(r"<<.*?>>", "", solution) for solution in solutions]):
        assert sum(map(states_answer_first, texts)) < 0.01 * count


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("#### 18", True),
        ("The answer is 18. 3 * 6 = 18.\n#### 18", True),
        ("3 * 6 = 18. The answer is 18.\n#### 18", False),
        ("Sure! \\boxed{18}", True),
        ("There are 3 x 6 = 18 apples.\n#### 18", False),
        ("Answer: $1,200, since 3 × 400 = 1200", True),
        ("He pays 3×$400 = $1200. #### 1200", False),
        ("She has 18 apples and says nothing more", False),
        ("The answer will follow. 20 - 2 = 18. #### 18", False),
        ("5 apples + 3 apples = 8 apples\n#### 8", False),
        ("$5 \\times 3 = 15$\n\\boxed{15}", False),
        ("**20** + **30** = **50**\n#### 50", False),
        ("To find the answer, we need to add 5 and 3.\n5 + 3 = 8\n#### 8", False),
        ("12 times 12 equals 144.\n#### 144", False),
        ("**Answer:** **18**\nHere is why: 3 * 6 = 18", True),
        ("", False),
    ],
)
def test_states_answer_first(text: str, first: bool):
    assert states_answer_first(text) == first


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("a b c", 0),
        ("a b c d e", 0),
        ("a b c d a b c d", 1 / 5),
        ("no no no no no no no", 3 / 4),
    ],
)
def test_repeated_share(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)
