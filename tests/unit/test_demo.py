"""The demonstration: correct problems, and models that match their README."""

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from raykd.data.demo_problem_kinds import KINDS
from raykd.data.demo_problems import GENERATOR_VERSION, SPLITS, generate, generate_problems
from raykd.models.builtin import MODELS, resolve_model
from raykd.storage import hashing

AWKWARD = (
    "naïve café 😀 ½ ² 中文 12\u00a0345",
    "  two  spaces\n\n\ttab \r\n 1,234.50 <<48/2=24>>24 $5%",
    "<|not special|> #### -7",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "",
)


def oracle(answer: str) -> list[tuple[Fraction, Fraction]]:
    """Return each calculation of a solution as (computed, written) result."""
    operations = {
        "+": lambda x, y: x + y,
        "-": lambda x, y: x - y,
        "*": lambda x, y: x * y,
        "/": lambda x, y: x / y,
    }
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
    return [(operations[sign](Fraction(a), Fraction(b)), Fraction(c)) for a, sign, b, c in found]


@pytest.mark.parametrize("split", SPLITS)
def test_reference_calculations_are_right_and_end_in_the_answer(split: str):
    for row in generate(split, 500, seed=3):
        steps, final = row["answer"].rsplit("\n#### ", 1)
        pairs = oracle(steps)
        assert len(pairs) == len(steps.split("\n")) >= 2
        assert all(worked == written for worked, written in pairs)
        assert pairs[-1][1] == int(final)
        assert row["question"].isascii()
        assert row["answer"].isascii()


def test_steps_use_known_numbers_only():
    for problem in generate_problems("train", 500, seed=4):
        known = set(re.findall(r"\d+", problem.question)) | ({"2"} if problem.kind == "half" else set())
        for step in problem.steps:
            assert set(re.findall(r"\d+", step.expression)) <= known
            known.add(str(step.result))


def test_solutions_of_all_styles_are_right():
    from raykd.demo.styles import COMPLETIONS, document, drill

    rng = random.Random(0)
    for problem in generate_problems("train", 200, seed=5):
        texts = [write(problem) for write in COMPLETIONS.values()]
        assert all(text.split("\n")[-1] == f"#### {problem.answer}" for text in texts)
        texts += ["".join(document(problem, rng)), drill([problem], rng)]
        for text in texts:
            assert all(worked == written for worked, written in oracle(text))


def test_every_kind_is_generated():
    assert {p.kind for p in generate_problems("train", 500)} == {kind.name for kind in KINDS}


def test_questions_are_unique_across_splits():
    questions = {split: {row["question"] for row in generate(split, 3000, seed=6)} for split in SPLITS}
    assert all(len(q) == 3000 for q in questions.values())
    for one, other in combinations(SPLITS, 2):
        assert not questions[one] & questions[other]


def test_numbers_are_unique_across_splits():
    """The calculations of a kind determine its numbers: no training problem rephrases a test problem."""
    sums = {
        split: {(p.kind, tuple(s.expression for s in p.steps)) for p in generate_problems(split, 4000)}
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not sums[one] & sums[other]


def test_seed_determines_the_problems():
    first = list(generate("train", 50, seed=1))
    assert first == list(generate("train", 50, seed=1))
    assert first == list(islice(generate("train", 80, seed=1), 50))
    assert first != list(generate("train", 50, seed=2))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        next(generate("dev", 1))


def test_resolve_model_maps_built_in_names():
    assert resolve_model("raykd/demo-teacher") == str(MODELS["raykd/demo-teacher"])
    assert resolve_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS["raykd/demo-teacher"])


def test_tokenizer_round_trips(tokenizer: Any):
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_a_token(tokenizer: Any):
    tokens = tokenizer.tokenize("12 apples and 345 pears cost 67.89 dollars: 12 * 345")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("123456789") + list("12345")


def test_chat_template_matches_training(tokenizer: Any):
    from raykd.demo.tokenizer import render_chat

    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 6 * 12?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == render_chat(messages)
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "72"}], tokenize=False)
    assert whole == text + "72" + tokenizer.eos_token


def test_models_share_a_tokenizer():
    files = [(folder / "tokenizer.json").read_bytes() for folder in MODELS.values()]
    assert files[0] == files[1]


def test_weights_are_small_and_have_metrics():
    size = sum(p.stat().st_size for folder in MODELS.values() for p in folder.rglob("*") if p.is_file())
    assert size <= 12e6
    for name, folder in MODELS.items():
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["test"]["n"] >= 500
        assert 0 <= metrics["test"]["none"]["strict"] <= 1
        assert ("ground_truth" in metrics["test"]) == (name == "raykd/demo-teacher")


def greedy_accuracy(folder: Path, strategy: str, count: int = 40) -> dict[str, float]:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from raykd.config.strategies import BUILT_IN
    from raykd.data.prompts import teacher_messages
    from raykd.demo.evaluate import complete, score

    problems = list(generate_problems("test", count + 1, seed=8))
    answers = [p.answer for p in problems]
    prompts = [
        teacher_messages(
            {"question": p.question, "reference_answer": str(p.answer), "other_answer": str(o.answer)},
            BUILT_IN[strategy],
        )
        for p, o in pairwise(problems)
    ]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, _ = complete(model, AutoTokenizer.from_pretrained(folder), prompts)
    return score(texts, answers[:-1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: with models this small, several threads are slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("strategy", ["teacher", "ground_truth", "confidence", "gold_hint"])
def test_primed_teacher_solves_most_problems(strategy: str):
    assert greedy_accuracy(MODELS["raykd/demo-teacher"], strategy)["strict"] >= 0.8


@pytest.mark.usefixtures("one_thread")
def test_unprimed_teacher_solves_few_problems():
    assert greedy_accuracy(MODELS["raykd/demo-teacher"], "none")["strict"] <= 0.6


@pytest.mark.usefixtures("one_thread")
def test_base_student_solves_few_problems():
    accuracy = greedy_accuracy(MODELS["raykd/demo-student"], "none")
    assert max(accuracy.values()) <= 0.15


def test_generator_version_matches_the_rows():
    rows = [row for split in SPLITS for seed in (0, 1) for row in generate(split, 400, seed)]
    digest = hashing.text_digest(json.dumps(rows))[:20]
    assert (GENERATOR_VERSION, digest) == (1, "d12e1cbcb61ecfcb7b7d"), (
        "the generated rows changed: raise GENERATOR_VERSION in raykd/data/demo_problems.py, so that problem sets and "
        "completions of earlier rows are not reused, and update both values here"
    )
