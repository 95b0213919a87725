"""Spans of numbers and results in awkward texts, in GSM8K's notation, and in built-in solutions."""

import random
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from raykd.data.demo_problems import generate_problems
from raykd.demo.styles import COMPLETIONS, document
from raykd.evaluation.attention_spans import number_spans, previous_results, step_results, tokens_in
from raykd.models.builtin import resolve_model


def numbers(text: str) -> list[str]:
    return [text[start:end] for start, end in number_spans(text)]


def results(text: str) -> list[list[str]]:
    return [[text[start:end] for start, end in spans] for _, _, spans in step_results(text)]


def words(text: str) -> list[tuple[int, int]]:
    """Return the offsets of a tokenizer that splits into words, single digits, signs and line breaks."""
    return [match.span() for match in re.finditer(r"[^\W\d]+|[0-9]|\n|[^\w\s]", text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs $1,200.50, or 15% more than 3.", ["1,200.50", "15", "3"]),
        ("He has 2 dogs and 10.", ["2", "10"]),
        ("A pen is $.75; a cap is .5.", [".75", ".5"]),
        ("1,234,567.89 people", ["1,234,567.89"]),
        ("of 1,2 and 1,2000 and 1234,567", ["1", "2", "1", "2000", "1234", "567"]),
        ("3, 400, 500", ["3", "400", "500"]),
        ("2/5 of the 12-page book at 8:30", ["2", "5", "12", "8", "30"]),
        ("-7 and 5-3", ["7", "5", "3"]),
        ("in 5th grade, 18kg each, x2", ["5", "18", "2"]),
        ("version 1.2.3 ends... 4...", ["1.2", "3", "4"]),
        ("It was 2020.In all 7", ["2020", "7"]),
        ("5\n6", ["5", "6"]),
        ("three dozen, half, ٣", []),
        ("", []),
    ],
)
def test_number_spans_cover_written_numbers(text: str, expected: list[str]):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Ida packs 36/3 = <<36/3=12>>12 boxes.", ["12", "12"]),
        ("That is 40,000+2,500=$<<40000+2500=42500>>42,500", ["42500", "42,500"]),
        ("A minute brings 15/60 = $<<15/60=0.25>>0.25.", ["0.25", "0.25"]),
        ("He pays 3*1.5=<<3*1.5=4.5>>$4.5 in all, which 2 friends share.", ["4.5", "4.5"]),
        ("They eat 6*2=<<6*2=12>>12 and 5*3=<<5*3=15>>15 plums.", ["15", "15"]),
        ("He is left with 5-9=<<5-9=-4>>-4 dollars.", ["4", "4"]),
        ("She has 1/4+1/2=<<1/4+1/2=.75>>.75 of it.", [".75", ".75"]),
        ("First 3 + 4 = 7, then 7 * 2 = 14 apples", ["14"]),
        ("Step 3, apples left: 72 - 5 = 67.", ["67"]),
        ("The total is (36 / 3) x 2 = 12 x 2 = 24 sticks", ["24"]),
        ("Cost: 2 × $3.50 = **$7.00**", ["7.00"]),
        (r"\[ 48 \div 2 = \boxed{24} \]", ["24"]),
        (r"So $48 / 2 = \$24$ each.", ["24"]),
        ("Dividing by 11, h = 8,000", ["8,000"]),
        ("It grows by 12 = 30 - 18", []),
        ("That makes 17 = 12 + 5 = 17 = 9 + 8", ["17"]),
        (r"Total = 12 \times 5", []),
        ("L = 85/5", []),
        ("10N = 6N + 48", []),
        ("His nickels are worth 5 * x = 5x cents.", ["5"]),
        ("It weighs 3 * 6kg = 18kg - too much.", ["18"]),
        ("x >= 5 and x != 6, so x == 7", []),
        ("5 * 3 = 15 pears (p = pears)", ["15"]),
        ("There are 12 left.", []),
        ("#### 24", []),
        ("=", []),
        ("= ", []),
    ],
)
def test_step_result_is_number_after_last_equals_sign(line: str, expected: list[str]):
    assert results(line) == ([expected] if expected else [])
    # With other lines around it.
    assert results(f"Take 5 of them.\n\n{line}\n#### 24") == ([expected] if expected else [])


def test_spans_of_steps_and_results():
    text = "Tim has 3*4=<<3*4=12>>12 pens.\nHe waits.\r\n\n12 - 5 = 7 pens\n#### 7"
    steps = step_results(text)
    assert [text[start:end] for start, end, _ in steps] == ["Tim has 3*4=<<3*4=12>>12 pens.\n", "12 - 5 = 7 pens\n"]
    annotation, written = steps[0][2]
    assert text[: annotation[0]].endswith("<<3*4=")
    assert text[: written[0]].endswith("12>>")
    assert [text[start:end] for start, end in steps[1][2]] == ["7"]
    assert text[: steps[1][2][0][0]].endswith("12 - 5 = ")


def test_tokens_in_overlap_spans():
    offsets = [(0, 0), (0, 3), (3, 5), (5, 6), (6, 9), (9, 9)]
    assert tokens_in([(3, 5)], offsets) == [2]
    assert tokens_in([(4, 6)], offsets) == [2, 3]
    assert tokens_in([(6, 7), (0, 1)], offsets) == [1, 4]
    assert tokens_in([(2, 4), (3, 4)], offsets) == [1, 2]
    assert tokens_in([(9, 12), (4, 4)], offsets) == []
    assert tokens_in([], offsets) == []


def test_previous_result_is_of_the_nearest_earlier_step():
    text = "Tim has 3*4=<<3*4=12>>12 pens.\nHe waits.\n12-5=7 pens\n\n#### 7"
    offsets = [*words(text), (len(text), len(text))]
    previous = previous_results(text, offsets)
    assert len(previous) == len(offsets)
    line_of = [text[:start].count("\n") for start, _ in offsets]
    # The line of each token's previous result, and its text.
    lines_and_texts = [
        ({line_of[token] for token in tokens}, [text[slice(*offsets[token])] for token in tokens])
        for tokens in previous
    ]
    nothing, first, second = (set(), []), ({0}, ["1", "2", "1", "2"]), ({2}, ["7"])
    by_line = {0: nothing, 1: first, 2: first, 3: second, 4: second}
    assert lines_and_texts == [by_line[line] for line in line_of]
    assert all(token < index for index, tokens in enumerate(previous) for token in tokens)


def test_token_belongs_to_the_line_in_which_it_begins():
    text = "1+1=2.\n2+2=4"
    previous = previous_results(text, [(0, 4), (4, 5), (5, 7), (7, 11), (11, 12), (12, 12)])
    assert previous == [[], [], [], [1], [1], [4]]


def test_texts_without_steps_have_no_results():
    for text in ("", "no number", "#### 24", "12 apples\n#### 12"):
        assert step_results(text) == []
        assert previous_results(text, words(text)) == [[] for _ in words(text)]


@pytest.mark.parametrize("name", sorted(COMPLETIONS))
def test_each_calculation_in_a_built_in_solution_is_a_step(name: str):
    for problem in generate_problems("train", 200, seed=5):
        text = COMPLETIONS[name](problem)
        by_line = [re.findall(r"\d+ [-+*/] \d+ = (\d+)", line) for line in text.split("\n")]
        assert results(text) == [[equations[-1]] for equations in by_line if equations]
        assert bool(results(text)) == (name != "guess")


def test_each_reference_step_is_the_previous_result_of_the_next_line():
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("raykd/demo-student"))
    for problem in generate_problems("test", 100, seed=6):
        text = problem.row()["answer"]
        assert results(text) == [[str(step.result)] for step in problem.steps]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        lines = text.split("\n")
        starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
        for (start, _), tokens in zip(offsets, previous_results(text, offsets), strict=True):
            line = max(number for number, first in enumerate(starts) if first <= start)
            covered = "".join(text[slice(*offsets[token])] for token in tokens)
            assert covered.strip() == ("" if line == 0 else str(problem.steps[line - 1].result))


def test_numbers_of_a_built_in_question_are_its_digits():
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("raykd/demo-student"))
    for problem in generate_problems("test", 100, seed=7):
        question = problem.question
        assert numbers(question) == re.findall(r"\d+", question)
        offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        indices = tokens_in(number_spans(question), offsets)
        covered = [any(c.isdigit() for c in question[start:end]) for start, end in offsets]
        assert indices == [index for index, has_digit in enumerate(covered) if has_digit]


def test_results_are_found_in_every_kind_of_document():
    rng = random.Random(0)
    for problem in generate_problems("train", 100, seed=8):
        _, worked = document(problem, rng)
        assert results(worked)[-1] == [str(problem.answer)]
