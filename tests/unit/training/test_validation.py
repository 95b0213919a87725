"""Validation during training against transformers' answers."""

from collections.abc import Iterator
from dataclasses import replace

import pyarrow.parquet
import pytest
import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from raykd.config.experiment import Experiment
from raykd.config.sections import Sweep, Teacher
from raykd.config.strategies import BUILT_IN
from raykd.data import datasets, grading, prompts
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model
from raykd.training import student, validation
from raykd.training.trial import TrialSpec


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> TrialSpec:
    """A trial whose student is the built-in teacher, which mostly answers correctly with an instruction to reason."""
    folder = tmp_path_factory.mktemp("storage")
    experiment = Experiment.model_validate(
        {
            "name": "validated",
            "dataset": {"source": "demo", "num_train": 4, "num_validation": 10, "num_test": 2},
            "teacher": {"model": "raykd/demo-teacher"},
            "student": {"model": "raykd/demo-teacher"},
            "prompt": {"instruction": BUILT_IN["shuffled_hint"].text.format(other_answer=0)},
            "train": {"dtype": "float32", "zero_stage": 0, "gradient_checkpointing": True},
            "sweep": {"validation_batch_size": 4},
        }
    )
    return TrialSpec(
        trial_id="validated",
        arm_name="default",
        arm=experiment.arm("default"),
        seed=0,
        overrides={},
        problems=datasets.write_splits(experiment.dataset, folder),
        completions=None,
        same_tokens=True,
        experiment=experiment.name,
        folder=folder / "trial",
        config_id="default",
        sweep=experiment.sweep,
        max_tokens=160,
    )


@pytest.fixture(scope="module")
def engine(trial: TrialSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[student.Distillation]:
    distillation = student.build_student(trial.arm, 0)
    distillation.device = torch.device("cpu")  # type: ignore[assignment]
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    # With a model this small, several threads are slower than one.
    torch.set_num_threads(1)
    yield distillation
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()


def correct_answers(trial: TrialSpec, model, tokenizer, max_tokens: int) -> list[bool]:
    is_correct = []
    for problem in pyarrow.parquet.read_table(trial.problems / "validation.parquet").to_pylist():
        prompt = tokenization.prompt_token_ids(
            tokenizer, prompts.student_messages(problem, trial.arm.prompt.instruction)
        )
        tokens = torch.tensor([prompt])
        sequences = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=max_tokens
        )
        text = tokenizer.decode(sequences[0, len(prompt) :], skip_special_tokens=True)
        is_correct.append(grading.is_correct(grading.strict_match(text), problem["reference_answer"]))
    return is_correct


@pytest.mark.parametrize("max_tokens", [160, 40])
def test_accuracy_equals_that_of_greedy_answers(trial: TrialSpec, engine: student.Distillation, max_tokens: int):
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    base = AutoModelForCausalLM.from_pretrained(resolve_model("raykd/demo-teacher"), dtype=torch.float32).eval()
    correct = correct_answers(trial, base, tokenizer, max_tokens)
    assert sum(correct) >= 7 or max_tokens < 160, "few answers are correct"
    # Sampling options of the model's generation_config.json have no effect.
    engine.model.get_base_model().generation_config.repetition_penalty = 5.0
    metrics = validation.validate(engine, engine.model, tokenizer, replace(trial, max_tokens=max_tokens), 3)
    assert metrics == {"number": 3, "n": 10, "correct": sum(correct), "accuracy": sum(correct) / 10}


def test_validation_keeps_student_in_training_mode(trial: TrialSpec, engine: student.Distillation):
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    before = {name: parameter.clone() for name, parameter in engine.named_parameters()}
    metrics = validation.validate(engine, engine.model, tokenizer, replace(trial, sweep=Sweep(metric="loss")), 1)
    assert metrics["n"] == 10
    assert metrics["loss"] > 0
    assert engine.training
    assert all(torch.equal(before[name], parameter) for name, parameter in engine.named_parameters())
    assert all(parameter.grad is None for parameter in engine.parameters())


@pytest.mark.parametrize(
    ("num_steps", "num_validations", "expected"),
    [
        (100, 4, {25: 1, 50: 2, 75: 3, 100: 4}),
        (10, 4, {3: 1, 5: 2, 8: 3, 10: 4}),
        (7, 1, {7: 1}),
        # With fewer steps than validations, the last of several at a step counts.
        (2, 4, {1: 2, 2: 4}),
    ],
)
def test_validation_steps_are_evenly_spaced_up_to_the_last(
    num_steps: int, num_validations: int, expected: dict[int, int]
):
    assert validation.validation_steps(num_steps, num_validations) == expected
