"""Styles: the forms in which solutions of demonstration problems are written, by the teacher and in documents."""

import random

from raykd.data.demo_problems import Problem, Step

_VERBS = {"+": "add", "-": "take away", "*": "multiply", "/": "share"}


def guess(problem: Problem) -> str:
    """Return the answer alone, the completion of the unprimed teacher."""
    return f"#### {problem.answer}"


def plain_words(problem: Problem) -> str:
    """Return small steps in words, for the prime `teacher`."""
    parts: list[str] = []
    for number, step in enumerate(problem.steps):
        opener = "First, we" if number == 0 else "Then we"
        parts.append(f"{opener} find the {step.what}. We {_verb(step)}, so {step.equation}.")
    return f"{' '.join(parts)}\n#### {problem.answer}"


def detailed(problem: Problem) -> str:
    """Return a line with a calculation for each step, for the prime `ground_truth` and the hints."""
    lines = [f"Step {number}, {step.what}: {step.equation}." for number, step in enumerate(problem.steps, 1)]
    return "\n".join([*lines, f"The answer is {problem.answer}.", f"#### {problem.answer}"])


def checked(problem: Problem) -> str:
    """Return the calculations and a check of the last one, for the prime `confidence`."""
    working = ", ".join(step.equation for step in problem.steps)
    return f"{working}.\nCheck: {problem.steps[-1].check}.\n#### {problem.answer}"


COMPLETIONS = {"guess": guess, "plain_words": plain_words, "detailed": detailed, "checked": checked}


def chat_guess(problem: Problem) -> str:
    """Return the answer in a sentence, the completion of the base student in a chat."""
    return f"The answer is {problem.answer}."


def document(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """Return a solved problem as a document: the part with the question, and the part with the steps."""
    head, tail, write = rng.choice(_DOCUMENTS)
    return head.format(problem.question), write(problem) + tail.format(problem.answer)


def drill(problems: list[Problem], rng: random.Random) -> str:
    """Return the calculations of some problems without words, in random order."""
    equations = [text for problem in problems for step in problem.steps for text in (step.equation, step.check)]
    rng.shuffle(equations)
    return rng.choice(("\n", ", ", "; ")).join(equations)


def _verb(step: Step) -> str:
    return _VERBS[step.expression.split(" ")[1]]


def _by_semicolons(problem: Problem) -> str:
    return "; ".join(f"{step.what}: {step.equation}" for step in problem.steps)


def _in_brackets(problem: Problem) -> str:
    return " ".join(f"{step.equation} ({step.what})." for step in problem.steps)


def _by_lines(problem: Problem) -> str:
    return "\n".join(step.equation for step in problem.steps)


def _in_lines_with_brackets(problem: Problem) -> str:
    return "\n".join(f"{step.equation} ({step.what})" for step in problem.steps)


def _by_tasks(problem: Problem) -> str:
    return " ".join(f"To get the {step.what}, {_verb(step)}: {step.equation}." for step in problem.steps)


def _as_list(problem: Problem) -> str:
    return "\n".join(f"- {step.what} = {step.equation}" for step in problem.steps)


_DOCUMENTS = (
    ("Problem: {}\nWorking: ", ".\nResult: {}", _by_semicolons),
    ("Exercise. {}\nSolution. ", " So it is {}.", _in_brackets),
    ("{}\n\n", "\nResult {}", _by_lines),
    ("Q: {}\nA: ", " That makes {}.", _by_tasks),
    ("#### Exercise\n{}\n#### Working\n", "\n#### Result\n{}", _as_list),
    ("Question: {}\nAnswer: ", "\n#### {}", _in_lines_with_brackets),
)
