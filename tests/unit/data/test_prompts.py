"""Prompts: the place of a prime, and its absence from student prompts."""

import pytest

from raykd.config.strategies import BUILT_IN, Strategy
from raykd.data import prompts

PROBLEM = {"question": "How many {apples} are 3 + 4?", "reference_answer": "7", "other_answer": "12"}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_student_prompt_has_no_prime(name: str):
    strategy = BUILT_IN[name]
    student = prompts.student_messages(PROBLEM, "State the number.")
    assert student == [{"role": "user", "content": "How many {apples} are 3 + 4?\n\nState the number."}]
    teacher = prompts.teacher_messages(PROBLEM, strategy, "State the number.")
    text = "\n".join(message["content"] for message in teacher)
    assert PROBLEM["question"] in text
    assert "State the number." in text
    assert (teacher == student) == (name == "none")


def test_prime_is_placed_as_configured():
    def contents(place) -> list[tuple[str, str]]:
        strategy = Strategy(place=place, text="Prime.")
        return [(message["role"], message["content"]) for message in prompts.teacher_messages(PROBLEM, strategy)]

    question = PROBLEM["question"]
    assert contents("system") == [("system", "Prime."), ("user", question)]
    assert contents("before") == [("user", f"Prime.\n\n{question}")]
    assert contents("after") == [("user", f"{question}\n\nPrime.")]


def test_exemplars_are_turns_with_the_instruction():
    strategy = Strategy(
        place="system", text="Prime.", exemplars=({"question": "1 + 1?", "answer": "It is 2.\n#### 2"},)
    )
    messages = prompts.teacher_messages(PROBLEM, strategy, "State the number.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == "1 + 1?\n\nState the number."
    assert messages[2]["content"] == "It is 2.\n#### 2"
    assert messages[3] == prompts.student_messages(PROBLEM, "State the number.")[0]


def test_gold_and_shuffled_hints_differ_only_in_answer():
    gold = prompts.teacher_messages(PROBLEM, BUILT_IN["gold_hint"])[-1]["content"]
    shuffled = prompts.teacher_messages(PROBLEM, BUILT_IN["shuffled_hint"])[-1]["content"]
    assert "answer is 7." in gold
    assert "answer is 12." in shuffled
    assert gold.replace("is 7.", "is 12.") == shuffled, "the prompts differ in more than the answer"


def test_unknown_placeholder_is_refused():
    with pytest.raises(ValueError, match="solution"):
        Strategy(text="It is {solution}.")
