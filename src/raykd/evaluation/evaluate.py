"""Evaluate all students on the test problems in one engine pass.

The stage that scores an answer also writes it, so an interrupted run resumes from the rows on disk.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from raykd import compat, identity
from raykd.cluster import resources
from raykd.config.sections import Evaluate, Student
from raykd.data import grading, prompts
from raykd.evaluation.student_batch import (
    PROMPT_COLUMNS,
    StudentModel,
    finish_reason,
    prediction_id,
    student_answers,
    with_null_adapter,
)
from raykd.models import tokenization
from raykd.models.adapters import check_adapter
from raykd.models.loading import load_tokenizer
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, hashing, row_store, schemas
from raykd.storage.paths import split_file


def evaluate_students(
    eval_models: list[StudentModel],
    problems: Path,
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    kind: resources.Accelerator,
    folder: Path,
) -> None:
    """Has every eval_model answer every test problem, and seals the folder of predictions.

    Args:
        eval_models: adapters of the same base model, and that model itself.
        problems: the folder of the splits; `test` is asked.
        student: the base model.
        evaluation: the configuration's section.
        instruction: what is said about the form of the answer, as in training.
        kind: what the engine runs on.
        folder: where `schemas.PREDICTION` rows go.

    Raises:
        StageError: where more than `evaluation.max_error_rate` of the rows failed, naming some.
        UserError: where an adapter is damaged, naming it.
    """
    check_adapters(eval_models)
    ids = test_problem_ids(problems)
    wanted = {
        prediction_id(each, problem_id, sample)
        for each in eval_models
        for problem_id in ids
        for sample in range(evaluation.num_samples)
    }
    total = len(wanted)
    done = row_store.done_ids(folder, schemas.PREDICTION, "prediction_id") & wanted
    eval_models = with_null_adapter(eval_models, folder / "null_adapter")
    with ProgressBar("students", total, done=len(done), unit="answers") as meter:
        if len(done) < total:
            scored = student_answers(
                split_file(problems, "test"), eval_models, done, student, evaluation, instruction, kind
            ).map_batches(
                ScoreAnswers,
                batch_size=evaluation.batch_size,
                fn_constructor_kwargs={
                    "folder": folder,
                    "ends": tokenization.end_token_ids(student),
                    "evaluation": evaluation,
                },
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=0,
            )
            scored.set_name("student-answers")
            for row in scored.iter_rows():
                meter.add(row["rows"], row["tokens"])
    option = "evaluate.max_error_rate"
    row_store.check_failures(folder, schemas.PREDICTION, "prediction_id", "students", option, evaluation.max_error_rate)
    row_store.finalize(
        folder,
        schemas.PREDICTION,
        "prediction_id",
        {
            "trials": [each.trial_id for each in eval_models],
            "asked": identity.evaluation_settings(evaluation),
            "problems": problems.name,
        },
    )


def check_adapters(eval_models: Sequence[StudentModel]) -> None:
    """Raises UserError where an adapter is not as raykd writes it, naming the file."""
    for each in eval_models:
        if each.adapter:
            check_adapter(each.adapter, each.rank)


def folder_name(evaluation: Evaluate) -> str:
    """What the folder of answers is called: other for each way of asking."""
    return f"{evaluation.protocol}-{hashing.content_key(identity.evaluation_settings(evaluation))[:8]}"


def collect_predictions(folder: Path, file: Path) -> None:
    """Writes all complete answers of an experiment into one file, in however many ways they were asked.

    To the columns of `schemas.PREDICTION` comes `evaluation`, the name of the folder of answers, by which ways of
    asking are told apart. Nothing is written where the file is newer than all of them.

    Args:
        folder: of the folders of answers.
        file: the Parquet file.
    """
    manifests = filesystem.find_in_subdirs(folder, row_store.MANIFEST)
    if not manifests or (file.exists() and file.stat().st_mtime > max(each.stat().st_mtime for each in manifests)):
        return
    tables = []
    for manifest in manifests:
        table = row_store.read_rows(manifest.parent, schemas.PREDICTION)
        table = table.sort_by([(name, "ascending") for name in ("trial_id", "problem_id", "sample_index")])
        name = pa.array([manifest.parent.name] * len(table), pa.string())
        tables.append(table.add_column(0, "evaluation", name))
    files.write_table(file, pa.concat_tables(tables))


def check_student_lengths(split: Path, student: Student, evaluation: Evaluate, instruction: str, whose: str) -> None:
    """Raises UserError where more prompts than may fail leave the student no room to answer, naming some.

    Args:
        split: the Parquet file of the problems.
        student: the base model.
        evaluation: how they are asked.
        instruction: what is said about the form of the answer.
        whose: who answers what, for the message.
    """
    limit = tokenization.context_length(student, evaluation.engine.engine_kwargs)
    if limit is None:
        return
    tokenizer = load_tokenizer(student)
    rows = files.read_table(split, ["problem_id", "question"]).to_pylist()
    room = evaluation.sampling.max_tokens
    needs = (
        (
            row["problem_id"],
            room + len(tokenization.question_token_ids(tokenizer, row, instruction, evaluation.protocol)),
        )
        for row in rows
    )
    tokenization.check_lengths(
        needs, len(rows), limit, evaluation.max_error_rate, whose, "evaluate.engine", "max_tokens"
    )


def test_problem_ids(problems: Path) -> list[str]:
    """The test problems, in their order."""
    return files.read_table(split_file(problems, "test"), ["problem_id"])["problem_id"].to_pylist()


class ScoreAnswers:
    """Scores answers, writes them, and passes on the counts."""

    def __init__(self, folder: Path, ends: set[int], evaluation: Evaluate) -> None:
        self._folder, self._ends = folder, ends
        self._stop = prompts.stop_strings(evaluation)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        table = pa.Table.from_pylist([self._score(row) for row in rows], schema=schemas.PREDICTION)
        row_store.write_part(self._folder, table)
        return {"rows": [len(rows)], "tokens": [sum(table["num_tokens"].to_pylist())]}

    def _score(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text, error = row["generated_text"], row[compat.INFERENCE_ERROR]
        tokens = row["generated_tokens"]
        ended = finish_reason(tokens, self._ends, error)
        if at := next((each for each in self._stop if text.endswith(each)), None):
            text, ended = text.removesuffix(at), "stop"
        strict, flexible = grading.strict_match(text), grading.flexible_extract(text)
        return {
            **{name: row[name] for name in PROMPT_COLUMNS},
            "seed": int(row["seed"]),
            "sample_index": int(row["sample_index"]),
            "completion": text,
            "num_tokens": len(tokens),
            "finish_reason": ended,
            "answer_strict": strict,
            "answer_flexible": flexible,
            "is_correct_strict": grading.is_correct(strict, row["reference_answer"]),
            "is_correct_flexible": grading.is_correct(flexible, row["reference_answer"]),
            "error": error,
        }
