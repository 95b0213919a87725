"""Export an experiment's test as a task of lm-evaluation-harness, to score its students independently of raykd.

The task has the prompts of `raykd evaluate`, by the same protocol, and the answer filters of the harness's `gsm8k`.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from raykd.config.experiment import Experiment
from raykd.data import grading, prompts
from raykd.models import tokenization
from raykd.models.builtin import resolve_model
from raykd.storage import files, filesystem
from raykd.storage.paths import split_file

# Copies a folder of a bucket: its arguments are the source and the destination.
_COPY_SCRIPT = "import fsspec, sys; fsspec.url_to_fs(sys.argv[1])[0].get(*sys.argv[1:], recursive=True)"


def task_name(experiment: Experiment) -> str:
    """Return the name of the task."""
    return f"raykd_{experiment.name}"


def write_task(experiment: Experiment, problems: Path, folder: Path) -> None:
    """Write the task: `<name>.yaml`, and the prompts as JSON lines beside it.

    Args:
        experiment: the experiment.
        problems: the folder of the splits; the `test` split is read.
        folder: the output folder.
    """
    rows = files.read_table(split_file(problems, "test")).to_pylist()
    # The harness's filter requires a blank after "####", which not every dataset has.
    documents = [_document(experiment, row["question"], f"#### {row['reference_answer']}") for row in rows]
    file = folder / f"{experiment.evaluate.protocol}.jsonl"
    files.write_text(file, "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    files.write_text(folder / f"{task_name(experiment)}.yaml", yaml.safe_dump(_task(experiment, file), width=1000))


def lm_eval_command(experiment: Experiment, folder: Path, adapter: str) -> str:
    """Return the shell command that scores one student with the harness.

    Args:
        experiment: the experiment.
        folder: the folder of the task.
        adapter: the folder of the student's adapter; empty for the base student.

    Returns:
        The command. Commands that copy task and adapter from a bucket precede it: the harness reads local folders only.
    """
    copies = []
    if filesystem.is_remote(folder):
        copies = [["python", "-c", _COPY_SCRIPT, f"{folder}/", folder.name]]
        folder = Path(folder.name)
        if adapter:
            copies.append(["python", "-c", _COPY_SCRIPT, f"{adapter}/", "adapter"])
            adapter = "adapter"
    sampling = experiment.evaluate.sampling
    model = {
        "pretrained": resolve_model(experiment.student.model),
        **({"revision": experiment.student.revision} if experiment.student.revision else {}),
        **({"peft": adapter} if adapter else {}),
        "dtype": experiment.evaluate.engine.engine_kwargs.get("dtype", "auto"),
        # Fixed, because some chat templates insert the current date.
        "chat_template_args": {"date_string": tokenization.DATE_STRING},
    }
    command = ["lm_eval", "--model", "hf", "--model_args", json.dumps(model)]
    command += ["--include_path", str(folder), "--tasks", task_name(experiment), "--batch_size", "16"]
    if experiment.evaluate.protocol != "zero_shot_raw":
        command += ["--apply_chat_template"]
    if prompts.protocol_exemplars(experiment.evaluate.protocol):
        command += ["--fewshot_as_multiturn", "true"]
    if sampling.temperature:
        command += ["--seed", str(sampling.seed)]
    return " && ".join(map(shlex.join, [*copies, command]))


def _document(experiment: Experiment, question: str, solution: str) -> dict[str, str]:
    messages = prompts.student_messages({"question": question}, experiment.prompt.instruction)
    is_raw = experiment.evaluate.protocol == "zero_shot_raw"
    return {"prompt": prompts.raw_prompt(messages) if is_raw else messages[-1]["content"], "solution": solution}


def _task(experiment: Experiment, file: Path) -> dict[str, Any]:
    evaluation = experiment.evaluate
    sampling, exemplars = evaluation.sampling, prompts.protocol_exemplars(evaluation.protocol)
    samples = [_document(experiment, exemplar.question, exemplar.answer) for exemplar in exemplars]
    random_sampling = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    return {
        "task": task_name(experiment),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file if filesystem.is_remote(file) else file.absolute())}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{solution}}",
        "num_fewshot": len(samples),
        **({"fewshot_config": {"sampler": "first_n", "samples": samples}} if samples else {}),
        "generation_kwargs": {
            "until": prompts.stop_strings(evaluation),
            "do_sample": bool(random_sampling),
            "max_gen_toks": sampling.max_tokens,
            **random_sampling,
        },
        "repeats": 1,
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": grading.STRICT_PATTERN},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": grading.FLEXIBLE_PATTERN},
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(grading.IGNORED_PATTERNS),
            }
        ],
        "metadata": {"version": 1.0},
    }
