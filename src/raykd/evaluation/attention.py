"""Attention: what the heads of every student look at while they read the same text, measured as a stage of Ray Data.

All read the reference solutions of the same test problems, so that they are compared like with like: their own answers
differ in length and wording, and a head that looks elsewhere in another text tells nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import ray.data
import torch
from peft import PeftModel

from raykd import identity
from raykd.cluster.resources import Accelerator, process_bundle
from raykd.config.sections import Attention, Student
from raykd.data import prompts
from raykd.errors import UserError
from raykd.evaluation import attention_heads, attention_spans
from raykd.evaluation.evaluate import check_adapters, test_problem_ids
from raykd.evaluation.student_batch import StudentModel
from raykd.models import loading, tokenization
from raykd.models.loading import load_base_model
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, hashing, row_store, schemas
from raykd.storage.paths import split_file

# Problems that one student reads before it is written what its heads did; fewer are lost with a worker.
PART = 64


def attention_folder_name(attention: Attention, dtype: str) -> str:
    """What the folder of the rows is called: other for what is measured in another way.

    Args:
        attention: the configuration's section.
        dtype: of the model.
    """
    return hashing.content_key(identity.attention_settings(attention, dtype, attention_heads.STATISTICS))[:8]


def measure_attention(
    eval_models: Sequence[StudentModel],
    problems: Path,
    student: Student,
    attention: Attention,
    dtype: str,
    instruction: str,
    kind: Accelerator,
    num_workers: int,
    folder: Path,
) -> int:
    """Has every eval_model read the reference solutions, and seals the folder of what its heads did.

    A text that cannot be read, or a model whose heads cannot be measured, is no reason to lose the rest of an
    experiment: its rows carry why, for it would be the same another time.

    Args:
        eval_models: adapters of the same base model, and that model itself.
        problems: the folder of the splits; `test` is read.
        student: the base model.
        attention: the configuration's section.
        dtype: of the model.
        instruction: what is said about the form of the answer, as in training.
        kind: what the students are read with.
        num_workers: how many of them at a time.
        folder: where `schemas.ATTENTION` rows go.

    Returns:
        How many texts could not be read.

    Raises:
        UserError: where an adapter is damaged, naming it.
    """
    check_adapters(eval_models)
    ids = test_problem_ids(problems)[: attention.num_problems]
    done = row_store.done_ids(folder, schemas.ATTENTION, "attention_id")
    items = []
    for each in eval_models:
        left = [problem_id for problem_id in ids if f"{each.trial_id}/{problem_id}" not in done]
        told = {"trial_id": each.trial_id, "arm": each.arm, "seed": each.seed, "adapter": str(each.adapter or "")}
        items += [{**told, "problem_ids": left[at : at + PART]} for at in range(0, len(left), PART)]
    total = len(ids) * len(eval_models)
    missing = sum(len(item["problem_ids"]) for item in items)
    with ProgressBar("attention", total, done=total - missing, unit="texts") as meter:
        if items:
            resources = process_bundle(kind, attention.accelerator_type)
            # A block a part, so that what is done is seen to be done.
            read = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                MeasureAttention,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={
                    "student": student,
                    "attention": attention,
                    "dtype": dtype,
                    "problems": problems,
                    "instruction": instruction,
                    "kind": kind,
                    "folder": folder,
                },
                compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(items))),
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0),
                resources=resources,
            )
            read.set_name("student-attention")
            for row in read.iter_rows():
                meter.add(row["rows"], row["tokens"])
    config = loading.load_config(student).get_text_config()
    row_store.finalize(
        folder,
        schemas.ATTENTION,
        "attention_id",
        {
            "trials": [each.trial_id for each in eval_models],
            "statistics": list(attention_heads.STATISTICS),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "problems": problems.name,
            "num_problems": len(ids),
            "dtype": dtype,
        },
    )
    return sum(map(bool, row_store.read_rows(folder, schemas.ATTENTION, ["error"])["error"].to_pylist()))


class MeasureAttention:
    """A base model that reads texts with one adapter after the other, and writes what its heads did."""

    def __init__(
        self,
        student: Student,
        attention: Attention,
        dtype: str,
        problems: Path,
        instruction: str,
        kind: Accelerator,
        folder: Path,
    ) -> None:
        self._base = load_base_model(student, getattr(torch, dtype)).to("cuda" if kind == "gpu" else "cpu").eval()
        self._tokenizer = loading.load_tokenizer(student)
        self._problems = {row["problem_id"]: row for row in files.read_table(split_file(problems, "test")).to_pylist()}
        self._limit = tokenization.context_length(student, {})
        self._attention, self._instruction, self._folder = attention, instruction, folder
        self._adapter, self._model = "", self._base

    def __call__(self, batch: pa.Table) -> dict[str, list[int]]:
        rows = [row for item in batch.to_pylist() for row in self._rows(item)]
        row_store.write_part(self._folder, pa.Table.from_pylist(rows, schema=schemas.ATTENTION))
        return {"rows": [len(rows)], "tokens": [sum(row["num_tokens"] for row in rows)]}

    def _rows(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        model, size, ids = self._with(item["adapter"]), self._attention.batch_size, item["problem_ids"]
        read = [row for at in range(0, len(ids), size) for row in self._read(model, ids[at : at + size])]
        told = {name: item[name] for name in ("trial_id", "arm", "seed")}
        return [{"attention_id": f"{item['trial_id']}/{row['problem_id']}", **told, **row} for row in read]

    def _with(self, adapter: str) -> Any:
        """The base model with an adapter, or without one."""
        if adapter != self._adapter:
            if self._adapter:
                self._base = self._model.unload()
            self._model = self._base
            if adapter:
                # In a bucket it has the same name, and is read from a copy.
                with filesystem.local_dir(filesystem.resolve(adapter)) as folder:
                    self._model = PeftModel.from_pretrained(self._base, str(folder)).eval()
            self._adapter = adapter
        return self._model

    def _read(self, model: Any, problem_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of some problems, read side by side; where one cannot be read, it carries why."""
        found: dict[str, attention_heads.Text] = {}
        errors: dict[str, str] = {}
        for problem_id in problem_ids:
            try:
                found[problem_id] = attention_text(
                    self._problems[problem_id], self._tokenizer, self._instruction, self._limit
                )
            except UserError as error:
                errors[problem_id] = str(error)
        values: Mapping[str, Any] = {}
        try:
            if found:
                measured = attention_heads.attention_statistics(
                    model, list(found.values()), self._tokenizer.pad_token_id or 0
                )
                values = dict(zip(found, measured, strict=True))
        except UserError as error:
            errors |= dict.fromkeys(found, str(error))
        return [
            {
                "problem_id": problem_id,
                "num_tokens": len(found[problem_id].completion_token_ids) if problem_id in values else 0,
                "values": values[problem_id].ravel() if problem_id in values else [],
                "error": errors.get(problem_id, ""),
            }
            for problem_id in problem_ids
        ]


def attention_text(
    problem: Mapping[str, Any], tokenizer: Any, instruction: str, limit: int | None
) -> attention_heads.Text:
    """A problem and its reference solution, with what to look for in them.

    Args:
        problem: a row of `schemas.PROBLEM`.
        tokenizer: the student's.
        instruction: what is said about the form of the answer.
        limit: how many tokens the model takes; None where it does not say.

    Raises:
        UserError: where the model's tokenizer or chat template hides what is looked for, or the text is too long.
    """
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer does not tell which characters a token stands for: it has no fast form")
    messages = prompts.student_messages(problem, instruction)
    rendered, question = tokenization.prompt_text(tokenizer, messages), problem["question"].strip()
    start = rendered.find(question)
    if start < 0:
        raise UserError("the model's chat template alters the question, so that its numbers cannot be found")
    prompt = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    numbers = [(start + first, start + last) for first, last in attention_spans.number_spans(question)]
    solution = problem["reference_solution"]
    read = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
    # The token that ends the turn stands for no characters.
    offsets = [*read["offset_mapping"], (len(solution), len(solution))]
    shift = len(prompt["input_ids"])
    text = attention_heads.Text(
        prompt_token_ids=tokenization.prompt_token_ids(tokenizer, messages),
        completion_token_ids=tokenization.answer_token_ids(tokenizer, solution, is_whole=True),
        question_numbers=attention_spans.tokens_in(numbers, prompt["offset_mapping"]),
        previous_results=[
            [shift + at for at in found] for found in attention_spans.previous_results(solution, offsets)
        ],
    )
    assert text.prompt_token_ids == prompt["input_ids"], "a chat template is a text that is tokenised as it stands"
    if limit is not None and len(text) > limit:
        raise UserError(f"problem and reference solution are {len(text)} tokens, more than the model's {limit}")
    return text
