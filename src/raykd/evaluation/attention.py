"""Attention statistics of every student on the same texts, computed as a Ray Data stage.

All students read the reference solutions of the same test problems. Their own answers differ in length and wording, so
that differences between heads would come from the texts.
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
from raykd.cluster.data_stage import run_stage
from raykd.cluster.resources import Accelerator, process_bundle
from raykd.config.sections import Attention
from raykd.config.training import Student
from raykd.data import prompts
from raykd.errors import UserError
from raykd.evaluation import attention_heads, attention_spans
from raykd.evaluation.evaluate import check_adapters, test_problem_ids
from raykd.evaluation.student_batch import StudentModel, digests, discard_outdated
from raykd.models import loading, tokenization
from raykd.models.loading import load_base_model
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, hashing, row_store, schemas
from raykd.storage.paths import split_file
from raykd.storage.provenance import provenance

# Problems of one student that a worker reads before it writes rows: at most so many are lost with a worker.
PART = 64


def attention_folder_name(attention: Attention, dtype: str) -> str:
    """Return the name of the folder of the rows: a different one for all settings that change a statistic.

    Args:
        attention: the section `attention`.
        dtype: of the model, such as "bfloat16".
    """
    return hashing.content_key(identity.attention_settings(attention, dtype, attention_heads.STATISTICS))[:8]


def measure_attention(
    eval_models: Sequence[StudentModel],
    *,
    problems: Path,
    student: Student,
    attention: Attention,
    dtype: str,
    instruction: str,
    accelerator: Accelerator,
    num_workers: int,
    folder: Path,
) -> int:
    """Measure every student's attention heads on the reference solutions, and finalize the folder of rows.

    A text that does not fit, or a model whose heads cannot be measured, does not fail the stage, since it would fail
    again: the rows carry the reason in `error`.

    Args:
        eval_models: adapters of the same base model, and that model itself.
        problems: the folder of the splits; the `test` split is read.
        student: the base model.
        attention: the section `attention`.
        dtype: of the model, such as "bfloat16".
        instruction: the sentence about the answer's form, as in training.
        accelerator: the device of the workers.
        num_workers: number of workers, each with one copy of the base model.
        folder: the output folder of `schemas.ATTENTION` rows.

    Returns:
        The number of rows with an error.

    Raises:
        UserError: an adapter is damaged; the message names its file.
    """
    check_adapters(eval_models)
    problem_ids = test_problem_ids(problems)[: attention.num_problems]
    discard_outdated(folder, schemas.ATTENTION, eval_models)
    parts = _pending_parts(eval_models, problem_ids, folder)
    total = len(problem_ids) * len(eval_models)
    num_pending = sum(len(part["problem_ids"]) for part in parts)
    with ProgressBar("attention", total, done=total - num_pending, unit="texts") as progress:
        if parts:
            row_store.reopen(folder)
            measuring = {
                "student": student,
                "attention": attention,
                "dtype": dtype,
                "problems": problems,
                "instruction": instruction,
                "accelerator": accelerator,
                "folder": folder,
            }
            run_stage(
                # A block for each part, so that the progress bar moves with every part.
                ray.data.from_items(parts, override_num_blocks=len(parts)),
                MeasureAttention,
                measuring,
                "student-attention",
                lambda counts: progress.add(counts["rows"], counts["tokens"]),
                batch_size=1,
                batch_format="pyarrow",
                num_actors=min(num_workers, len(parts)),
                bundle=process_bundle(accelerator, attention.accelerator_type),
            )
    config = loading.load_config(student).get_text_config()
    row_store.finalize(
        folder,
        schemas.ATTENTION,
        "attention_id",
        {
            "trials": digests(eval_models),
            "statistics": list(attention_heads.STATISTICS),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "problems": problems.name,
            "num_problems": len(problem_ids),
            "dtype": dtype,
            "made_with": provenance(),
        },
    )
    errors = row_store.read_rows(folder, schemas.ATTENTION, ["error"])["error"].to_pylist()
    return sum(error != "" for error in errors)


def _pending_parts(
    eval_models: Sequence[StudentModel], problem_ids: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Return the items of the stage: a student, and up to `PART` problems that it has not read."""
    done = row_store.done_ids(folder, schemas.ATTENTION, "attention_id")
    parts = []
    for model in eval_models:
        pending = [problem_id for problem_id in problem_ids if f"{model.trial_id}/{problem_id}" not in done]
        parts += [
            {
                "trial_id": model.trial_id,
                "arm": model.arm,
                "seed": model.seed,
                "adapter_digest": model.digest,
                "adapter": str(model.adapter or ""),
                "problem_ids": pending[start : start + PART],
            }
            for start in range(0, len(pending), PART)
        ]
    return parts


class MeasureAttention:
    """Stage that reads texts with one base model and changing adapters, and writes the statistics of its heads.

    Args:
        student: the base model.
        attention: the section `attention`.
        dtype: of the model, such as "bfloat16".
        problems: the folder of the splits; the `test` split is read.
        instruction: the sentence about the answer's form.
        accelerator: the device of this worker.
        folder: the output folder of `schemas.ATTENTION` rows.
    """

    def __init__(
        self,
        student: Student,
        attention: Attention,
        dtype: str,
        problems: Path,
        instruction: str,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        device = "cuda" if accelerator == "gpu" else "cpu"
        self._base = load_base_model(student, getattr(torch, dtype)).to(device).eval()
        self._tokenizer = loading.load_tokenizer(student)
        self._problems = {row["problem_id"]: row for row in files.read_table(split_file(problems, "test")).to_pylist()}
        self._context_length = tokenization.context_length(student, {})
        self._attention, self._instruction, self._folder = attention, instruction, folder
        self._adapter, self._model = "", self._base

    def __call__(self, batch: pa.Table) -> dict[str, list[int]]:
        rows = [row for part in batch.to_pylist() for row in self._measure_part(part)]
        row_store.write_part(self._folder, pa.Table.from_pylist(rows, schema=schemas.ATTENTION))
        return {"rows": [len(rows)], "tokens": [sum(row["num_tokens"] for row in rows)]}

    def _measure_part(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        model, batch_size, problem_ids = self._load(part["adapter"]), self._attention.batch_size, part["problem_ids"]
        student = {name: part[name] for name in ("trial_id", "arm", "seed", "adapter_digest")}
        rows = []
        for start in range(0, len(problem_ids), batch_size):
            rows += self._measure_batch(model, problem_ids[start : start + batch_size])
        return [{"attention_id": f"{part['trial_id']}/{row['problem_id']}", **student, **row} for row in rows]

    def _load(self, adapter: str) -> Any:
        """Return the base model with an adapter; without one for an empty path."""
        if adapter != self._adapter:
            if self._adapter:
                self._base = self._model.unload()
            self._model = self._base
            if adapter:
                # peft reads local folders only.
                with filesystem.local_dir(filesystem.resolve(adapter)) as folder:
                    self._model = PeftModel.from_pretrained(self._base, str(folder)).eval()
            self._adapter = adapter
        return self._model

    def _measure_batch(self, model: Any, problem_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows of problems that are read in one forward pass; a failed one carries its error."""
        texts: dict[str, attention_heads.Text] = {}
        errors: dict[str, str] = {}
        for problem_id in problem_ids:
            try:
                texts[problem_id] = attention_text(
                    self._problems[problem_id], self._tokenizer, self._instruction, self._context_length
                )
            except UserError as error:
                errors[problem_id] = str(error)
        statistics: Mapping[str, Any] = {}
        try:
            if texts:
                statistics_BSLH = attention_heads.attention_statistics(
                    model, list(texts.values()), self._tokenizer.pad_token_id or 0
                )
                statistics = dict(zip(texts, statistics_BSLH, strict=True))
        except UserError as error:
            errors |= dict.fromkeys(texts, str(error))
        rows = []
        for problem_id in problem_ids:
            row: dict[str, Any] = {
                "problem_id": problem_id,
                "num_tokens": 0,
                "values": [],
                "error": errors.get(problem_id, ""),
            }
            if problem_id in statistics:
                row["num_tokens"] = len(texts[problem_id].completion_token_ids)
                row["values"] = statistics[problem_id].ravel()
            rows.append(row)
        return rows


def attention_text(
    problem: Mapping[str, Any], tokenizer: Any, instruction: str, context_length: int | None
) -> attention_heads.Text:
    """Return a problem and its reference solution as tokens, with the positions of numbers and results.

    Args:
        problem: a row of `schemas.PROBLEM`.
        tokenizer: the student's.
        instruction: the sentence about the answer's form.
        context_length: maximum number of tokens; None for no limit.

    Raises:
        UserError: the text is too long, or its characters cannot be mapped to tokens because of the model's tokenizer
            or chat template.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the model's tokenizer does not map tokens to characters; attention needs a model with a fast tokenizer"
        )
    messages = prompts.student_messages(problem, instruction)
    prompt, question = tokenization.prompt_text(tokenizer, messages), problem["question"].strip()
    question_start = prompt.find(question)
    if question_start < 0:
        raise UserError("the model's chat template changes the question, so that its numbers cannot be found in it")
    prompt_tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    numbers = [(question_start + start, question_start + end) for start, end in attention_spans.number_spans(question)]
    solution = problem["reference_solution"]
    solution_tokens = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)
    # The end-of-turn token covers no characters.
    offsets = [*solution_tokens["offset_mapping"], (len(solution), len(solution))]
    num_prompt_tokens = len(prompt_tokens["input_ids"])
    text = attention_heads.Text(
        prompt_token_ids=tokenization.prompt_token_ids(tokenizer, messages),
        completion_token_ids=tokenization.answer_token_ids(tokenizer, solution, is_whole=True),
        question_numbers=attention_spans.tokens_in(numbers, prompt_tokens["offset_mapping"]),
        previous_results=[
            [num_prompt_tokens + index for index in indices]
            for indices in attention_spans.previous_results(solution, offsets)
        ],
    )
    assert text.prompt_token_ids == prompt_tokens["input_ids"], "the rendered prompt has the tokens of the messages"
    if context_length is not None and len(text) > context_length:
        raise UserError(
            f"problem and reference solution are {len(text)} tokens, more than the model's {context_length}"
        )
    return text
