"""Evaluate all students on the test problems in one engine pass.

The stage that scores an answer also writes it, so an interrupted run resumes from the rows on disk.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd import compat, identity
from raykd.cluster.data_stage import run_stage
from raykd.cluster.resources import Accelerator
from raykd.config.sections import Evaluate
from raykd.config.training import Student
from raykd.data import grading, prompts
from raykd.evaluation.student_batch import (
    PROMPT_COLUMNS,
    StudentModel,
    digests,
    discard_outdated,
    finish_reason,
    prediction_id,
    student_answers,
    with_null_adapter,
)
from raykd.models import tokenization
from raykd.models.adapters import check_adapter, check_digest
from raykd.models.loading import load_tokenizer
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, hashing, row_store, schemas
from raykd.storage.paths import NULL_ADAPTER, split_file
from raykd.storage.provenance import provenance


def evaluate_students(
    eval_models: list[StudentModel],
    *,
    problems: Path,
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Answer every test problem with every student, score the answers, and finalize the folder of predictions.

    Args:
        eval_models: adapters of the same base model, and that model itself.
        problems: the folder of the splits; the `test` split is read.
        student: the base model.
        evaluation: the section `evaluate`.
        instruction: the sentence about the answer's form, as in training.
        accelerator: the device of the engine.
        folder: the output folder of `schemas.PREDICTION` rows.

    Raises:
        StageError: more than `evaluation.max_error_rate` of the rows failed; the message lists some.
        UserError: an adapter is damaged; the message names its file.
    """
    check_adapters(eval_models)
    problem_ids = test_problem_ids(problems)
    expected_ids = {
        prediction_id(model, problem_id, sample)
        for model in eval_models
        for problem_id in problem_ids
        for sample in range(evaluation.num_samples)
    }
    discard_outdated(folder, schemas.PREDICTION, eval_models)
    done = row_store.done_ids(folder, schemas.PREDICTION, "prediction_id") & expected_ids
    eval_models = with_null_adapter(eval_models, folder / NULL_ADAPTER)
    with ProgressBar("students", len(expected_ids), done=len(done), unit="answers") as progress:
        if len(done) < len(expected_ids):
            row_store.reopen(folder)
            answers = student_answers(
                split_file(problems, "test"),
                eval_models,
                done,
                student=student,
                evaluation=evaluation,
                instruction=instruction,
                accelerator=accelerator,
            )
            scoring = {
                "folder": folder,
                "end_token_ids": tokenization.end_token_ids(student),
                "evaluation": evaluation,
            }
            run_stage(
                answers,
                ScoreAnswers,
                scoring,
                "student-answers",
                lambda counts: progress.add(counts["rows"], counts["tokens"]),
                batch_size=evaluation.batch_size,
            )
    option = "evaluate.max_error_rate"
    row_store.check_failures(folder, schemas.PREDICTION, "prediction_id", "students", option, evaluation.max_error_rate)
    row_store.finalize(
        folder,
        schemas.PREDICTION,
        "prediction_id",
        {
            "trials": digests(eval_models),
            "evaluation": identity.evaluation_settings(evaluation),
            "problems": problems.name,
            "made_with": provenance(),
        },
    )


def check_adapters(eval_models: Sequence[StudentModel]) -> None:
    """Raise UserError if an adapter is not the one that was trained; the message names the file."""
    for model in eval_models:
        if model.adapter:
            check_digest(model.adapter, model.digest)
            check_adapter(model.adapter, model.rank)


def folder_name(evaluation: Evaluate) -> str:
    """Return the name of the predictions folder: a different one for all settings that change an answer."""
    return f"{evaluation.protocol}-{hashing.content_key(identity.evaluation_settings(evaluation))[:8]}"


def collect_predictions(folder: Path, file: Path) -> None:
    """Write the complete predictions of an experiment, of all evaluation settings, into one Parquet file.

    The file has the columns of `schemas.PREDICTION` and `evaluation`: the name of the predictions folder, which
    identifies the settings. Its metadata hold the digests of the manifests: a file that has the same is left unchanged.

    Args:
        folder: the parent of the predictions folders.
        file: the Parquet file.
    """
    manifests = filesystem.find_in_subdirs(folder, row_store.MANIFEST)
    if not manifests:
        return
    digests_by_folder = {manifest.parent.name: row_store.manifest_digest(manifest.parent) for manifest in manifests}
    content = {"manifests": hashing.content_key(digests_by_folder)}
    if file.exists() and files.table_metadata(file).get("manifests") == content["manifests"]:
        return
    tables = []
    for manifest in manifests:
        table = row_store.read_rows(manifest.parent, schemas.PREDICTION)
        table = table.sort_by([(name, "ascending") for name in ("trial_id", "problem_id", "sample_index")])
        name = pa.array([manifest.parent.name] * len(table), pa.string())
        tables.append(table.add_column(0, "evaluation", name))
    files.write_table(file, pa.concat_tables(tables).replace_schema_metadata(content))


def check_student_lengths(split: Path, *, student: Student, evaluation: Evaluate, instruction: str, role: str) -> None:
    """Raise UserError if too many prompts leave the student no room to answer; the message lists some.

    Args:
        split: the Parquet file of the problems.
        student: the base model.
        evaluation: protocol, sampling and engine; `max_error_rate` is the share of prompts that may be too long.
        instruction: the sentence about the answer's form.
        role: the subject of the message, such as "students".
    """
    limit = tokenization.context_length(student, evaluation.engine.engine_kwargs)
    if limit is None:
        return
    tokenizer = load_tokenizer(student)
    rows = files.read_table(split, ["problem_id", "question"]).to_pylist()
    needed_tokens = (
        (
            row["problem_id"],
            evaluation.sampling.max_tokens
            + len(tokenization.question_token_ids(tokenizer, row, instruction, evaluation.protocol)),
        )
        for row in rows
    )
    tokenization.check_lengths(
        needed_tokens, len(rows), limit, evaluation.max_error_rate, role, "evaluate.engine", "max_tokens"
    )


def test_problem_ids(problems: Path) -> list[str]:
    """Return the ids of the test problems, in their order."""
    return files.read_table(split_file(problems, "test"), ["problem_id"])["problem_id"].to_pylist()


class ScoreAnswers:
    """Stage that scores answers, writes them, and returns counts for the progress bar.

    Args:
        folder: the output folder of `schemas.PREDICTION` rows.
        end_token_ids: tokens that end an answer.
        evaluation: the section `evaluate`, for the protocol's stop strings.
    """

    def __init__(self, folder: Path, end_token_ids: set[int], evaluation: Evaluate) -> None:
        self._folder, self._end_token_ids = folder, end_token_ids
        self._stop_strings = prompts.stop_strings(evaluation)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        table = pa.Table.from_pylist([self._score(row) for row in rows], schema=schemas.PREDICTION)
        row_store.write_part(self._folder, table)
        return {"rows": [len(rows)], "tokens": [sum(table["num_tokens"].to_pylist())]}

    def _score(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text, error = row["generated_text"], row[compat.INFERENCE_ERROR]
        tokens = row["generated_tokens"]
        reason = finish_reason(tokens, self._end_token_ids, error)
        # The engine leaves the stop string at the end of the text (`sampling_params`).
        stop_string = next((stop for stop in self._stop_strings if text.endswith(stop)), None)
        if stop_string:
            text, reason = text.removesuffix(stop_string), "stop"
        strict, flexible = grading.strict_match(text), grading.flexible_extract(text)
        return {
            **{name: row[name] for name in PROMPT_COLUMNS},
            "seed": int(row["seed"]),
            "sample_index": int(row["sample_index"]),
            "completion": text,
            "num_tokens": len(tokens),
            "finish_reason": reason,
            "answer_strict": strict,
            "answer_flexible": flexible,
            "is_correct_strict": grading.is_correct(strict, row["reference_answer"]),
            "is_correct_flexible": grading.is_correct(flexible, row["reference_answer"]),
            "error": error,
        }
