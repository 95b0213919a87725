"""Answers are scored as by lm-evaluation-harness, and the exported task matches its `gsm8k`."""

import itertools
import json
import random
import shlex
from pathlib import Path

import lm_eval
import pyarrow as pa
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.data import grading, prompts
from raykd.evaluation import lm_eval_task
from raykd.models import tokenization
from raykd.storage import files, schemas

EXPERIMENT = """
name: exported
teacher: {model: raykd/demo-teacher}
student: {model: raykd/demo-student}
dataset: {num_train: 8, num_test: 4}
"""
PROBLEMS = [
    {
        "problem_id": f"p{number}",
        "question": f"What is {number} + 1 in {{braces}}?",
        "reference_solution": f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}",
        "reference_answer": str(number + 1),
        "other_answer": "7",
    }
    for number in range(4)
]


def exported(folder: Path, *overrides: str) -> tuple[Experiment, dict]:
    """Export the task of an experiment, and return the experiment and the task's YAML."""
    file = folder / "experiment.yaml"
    file.write_text(EXPERIMENT)
    experiment = load_experiment(file, ["prompt.instruction=End with a number.", *overrides])
    files.write_table(folder / "test.parquet", pa.Table.from_pylist(PROBLEMS, schema=schemas.PROBLEM))
    lm_eval_task.write_task(experiment, folder, folder / "lm_eval")
    return experiment, yaml.safe_load((folder / "lm_eval" / "raykd_exported.yaml").read_text())


def loaded(folder: Path):
    """Return the task as the harness loads it."""
    manager = TaskManager(include_path=str(folder / "lm_eval"), include_defaults=False)
    return manager.load("raykd_exported")["tasks"]["raykd_exported"]


def awkward_outputs(num_random: int) -> list[str]:
    """Return outputs that are hard to parse: many forms of many numbers, and random texts."""
    numbers = ["18", "1,800", "-3", "-1,234,567.50", "0.5", ".5", "5.", "18.00", "$18", "-$18", "$-18", "18%", "1e3"]
    numbers += ["٣", "１８", "½", "−7", "007", "1 800", "3/4", "..", "$.", ",", "-", "--5", "5-3", "1,2,3", "12.5.7"]
    stated = ["#### {}", "####{}", "#### {}.", "####  {}", "##### {}", "#### ${}", "#### {} apples", "#### **{}**"]
    stated += ["The answer is {}.", "The answer is {}", r"\boxed{{{}}}", "so {} = x", "{}", "({})", "{}!\n", "*{}*"]
    stated += ["#### {}\n#### 5", "#### 5\n#### {}", "{}\n\nQuestion: what is 3 + 4?\nAnswer: 7", "= {},", "\t{}\u00a0"]
    stated += ["It is {}... or so", "#### \n{}", "####\u00a0{}", "#### {}\x00", "#### {}\r\n", "𝟙 {}", "é {} Ω"]
    outputs = [form.format(number) for form, number in itertools.product(stated, numbers)]
    outputs += ["", " ", "\n", "no number at all", "####", "#### ", "#### eighteen", "####.", "#### ,", "#### -"]
    # An answer truncated at every position.
    whole = "She bakes 2 * 1,200 = <<2*1200=2400>>2,400 rolls, at $1.50 each: $3,600.00.\n#### 3,600"
    outputs += [whole[:end] for end in range(len(whole) + 1)]
    draw = random.Random(11)
    alphabet = [*"0123456789.,,..--$$##  \n", "#### ", "a", "B", "%", "é", "٣", "{", "\\boxed{", "}", "\u2028", "€"]
    outputs += ["".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(num_random)]
    return outputs


# `make test` grades a tenth as many random outputs.
@pytest.mark.parametrize("num_random", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_grading_matches_the_harness(tmp_path: Path, num_random: int):
    exported(tmp_path)
    task = loaded(tmp_path)
    outputs = awkward_outputs(num_random)
    assert len(outputs) > num_random + 700
    for solution in ("#### 18", "so\n#### -3", "#### 1,800", "#### 5", "#### 0.5"):
        doc = {"prompt": "?", "solution": solution}
        instances = [Instance("generate_until", doc, ("?", {}), 0) for _ in outputs]
        for instance, output in zip(instances, outputs, strict=True):
            instance.resps = [output]
        task._instances = instances
        task.apply_filters()
        counts = dict.fromkeys(("right", "none"), 0)
        for instance, output in zip(instances, outputs, strict=True):
            for name, extract in (
                ("strict-match", grading.strict_match),
                ("flexible-extract", grading.flexible_extract),
            ):
                harness_answer, answer = instance.filtered_resps[name], extract(output)
                score = task.process_results(doc, [harness_answer])["exact_match"]
                assert bool(score) == grading.is_correct(answer, solution), (name, output, harness_answer, answer)
                # The one difference: a match of dots and signs without a digit is not an answer here.
                is_none = harness_answer == "[invalid]" or not any(character.isdigit() for character in harness_answer)
                assert (answer is None) == is_none, (name, output, harness_answer, answer)
                assert is_none or grading.is_correct(answer, harness_answer), (name, output, harness_answer, answer)
                counts["right"] += bool(score)
                counts["none"] += is_none
        # The outputs must be diverse.
        assert counts["right"] > 20 and counts["none"] > num_random // 5


def test_filters_and_metrics_match_the_harness_gsm8k_task(tmp_path: Path):
    _, task = exported(tmp_path)
    gsm8k_task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    assert task["filter_list"] == gsm8k_task["filter_list"]
    assert task["metric_list"] == gsm8k_task["metric_list"]
    assert task["output_type"] == gsm8k_task["output_type"]


@pytest.mark.parametrize("protocol", ["zero_shot_chat", "eight_shot_cot", "zero_shot_raw"])
def test_harness_prompts_match_student_prompts(tmp_path: Path, protocol: str):
    experiment, _ = exported(tmp_path, f"evaluate.protocol={protocol}", "evaluate.sampling.max_tokens=77")
    task = loaded(tmp_path)
    is_chat = protocol != "zero_shot_raw"
    task.build_all_requests(
        rank=0,
        world_size=1,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        # Renders the turns as JSON instead of with a model's template.
        chat_template=(lambda turns, add_generation_prompt=True: json.dumps(turns)) if is_chat else None,
        tokenizer_name="exported",
    )
    assert len(task.instances) == len(PROBLEMS)
    for problem, instance in zip(PROBLEMS, task.instances, strict=True):
        prompt, settings = instance.args[:2]
        messages = prompts.student_messages(problem, "End with a number.", prompts.protocol_exemplars(protocol))
        expected = messages if is_chat else prompts.raw_prompt(messages)
        assert (json.loads(prompt) if is_chat else prompt) == expected
        assert settings["max_gen_toks"] == 77 and not settings["do_sample"]
        assert settings["until"] == prompts.stop_strings(experiment.evaluate)


def test_command_has_adapter_task_and_chat_template(tmp_path: Path):
    experiment, _ = exported(tmp_path, "evaluate.engine.engine_kwargs.dtype=float32")
    command = lm_eval_task.lm_eval_command(experiment, tmp_path / "lm_eval", "trials/none-s0/adapter")
    words = shlex.split(command)
    model = json.loads(words[words.index("--model_args") + 1])
    assert model["peft"] == "trials/none-s0/adapter" and model["dtype"] == "float32"
    # The date of raykd's own prompts.
    assert model["chat_template_args"] == {"date_string": tokenization.DATE_STRING}
    assert "--apply_chat_template" in words
    assert "--tasks raykd_exported" in command and "fewshot" not in command
    raw = load_experiment(tmp_path / "experiment.yaml", ["evaluate.protocol=zero_shot_raw"])
    assert "--apply_chat_template" not in lm_eval_task.lm_eval_command(
        raw, tmp_path, ""
    ) and "peft" not in lm_eval_task.lm_eval_command(raw, tmp_path, "")


def test_reference_answer_matches_the_harness_filter(tmp_path: Path):
    file = tmp_path / "experiment.yaml"
    file.write_text(EXPERIMENT)
    rows = [PROBLEMS[0] | {"reference_solution": "0 + 1 = 1\n####1"}]
    files.write_table(tmp_path / "test.parquet", pa.Table.from_pylist(rows, schema=schemas.PROBLEM))
    lm_eval_task.write_task(load_experiment(file), tmp_path, tmp_path / "lm_eval")
    (doc,) = loaded(tmp_path).test_docs()
    assert loaded(tmp_path).process_results(doc, ["1"])["exact_match"] == 1
