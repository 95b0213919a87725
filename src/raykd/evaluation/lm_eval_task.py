"""Harness: an experiment's test as a task of lm-evaluation-harness, so that anyone can score its students by that.

The task asks what `raykd evaluate` asks, by the same protocol, and extracts answers as the harness' own `gsm8k` does.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from raykd.config.experiment import Experiment
from raykd.data import prompts
from raykd.models import tokenization
from raykd.models.builtin import resolve_model
from raykd.storage import files, filesystem
from raykd.storage.paths import split_file

_COPIED_FIELDS = "import fsspec, sys; fsspec.url_to_fs(sys.argv[1])[0].get(*sys.argv[1:], recursive=True)"


def task_name(experiment: Experiment) -> str:
    """What the task is called."""
    return f"raykd_{experiment.name}"


def write_task(experiment: Experiment, problems: Path, folder: Path) -> None:
    """Writes the task: `<name>.yaml`, and the problems beside it.

    Args:
        experiment: the experiment.
        problems: the folder of the splits; `test` is read.
        folder: where the task goes.
    """
    rows = files.read_table(split_file(problems, "test")).to_pylist()
    # The harness asks for a blank after the mark, which not every data set has.
    asked = [_document(experiment, row["question"], f"#### {row['reference_answer']}") for row in rows]
    file = folder / f"{experiment.evaluate.protocol}.jsonl"
    files.write_text(file, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in asked))
    files.write_text(folder / f"{task_name(experiment)}.yaml", yaml.safe_dump(_task(experiment, file), width=1000))


def lm_eval_command(experiment: Experiment, folder: Path, adapter: str) -> str:
    """What is typed to have the harness score one student.

    Args:
        experiment: the experiment.
        folder: of the task.
        adapter: the folder of the student's adapter; empty for the base student.

    Returns:
        the command, after those that copy what lies in a bucket, for the harness reads folders only.
    """
    copies = []
    if filesystem.is_remote(folder):
        copies = [["python", "-c", _COPIED_FIELDS, f"{folder}/", folder.name]]
        folder = Path(folder.name)
        if adapter:
            copies.append(["python", "-c", _COPIED_FIELDS, f"{adapter}/", "adapter"])
            adapter = "adapter"
    sampling = experiment.evaluate.sampling
    model = {
        "pretrained": resolve_model(experiment.student.model),
        **({"revision": experiment.student.revision} if experiment.student.revision else {}),
        **({"peft": adapter} if adapter else {}),
        "dtype": experiment.evaluate.engine.engine_kwargs.get("dtype", "auto"),
        # Some templates tell the model the date.
        "chat_template_args": {"date_string": tokenization.DATE_STRING},
    }
    words = ["lm_eval", "--model", "hf", "--model_args", json.dumps(model)]
    words += ["--include_path", str(folder), "--tasks", task_name(experiment), "--batch_size", "16"]
    if experiment.evaluate.protocol != "zero_shot_raw":
        words += ["--apply_chat_template"]
    if prompts.protocol_exemplars(experiment.evaluate.protocol):
        words += ["--fewshot_as_multiturn", "true"]
    if sampling.temperature:
        words += ["--seed", str(sampling.seed)]
    return " && ".join(map(shlex.join, [*copies, words]))


def _document(experiment: Experiment, question: str, solution: str) -> dict[str, str]:
    messages = prompts.student_messages({"question": question}, experiment.prompt.instruction)
    is_raw = experiment.evaluate.protocol == "zero_shot_raw"
    return {"prompt": prompts.raw_prompt(messages) if is_raw else messages[-1]["content"], "solution": solution}


def _task(experiment: Experiment, file: Path) -> dict[str, Any]:
    evaluation = experiment.evaluate
    sampling, shots = evaluation.sampling, prompts.protocol_exemplars(evaluation.protocol)
    shown = [_document(experiment, each.question, each.answer) for each in shots]
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    return {
        "task": task_name(experiment),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file if filesystem.is_remote(file) else file.absolute())}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{solution}}",
        "num_fewshot": len(shown),
        **({"fewshot_config": {"sampler": "first_n", "samples": shown}} if shown else {}),
        "generation_kwargs": {
            "until": prompts.stop_strings(evaluation),
            "do_sample": bool(drawn),
            "max_gen_toks": sampling.max_tokens,
            **drawn,
        },
        "repeats": 1,
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
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
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        ],
        "metadata": {"version": 1.0},
    }
