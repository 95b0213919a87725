"""Rollouts: students answer training problems with their current adapters, all in one engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd import compat
from raykd.cluster.data_stage import run_stage
from raykd.cluster.resources import Accelerator
from raykd.config.engine import Sampling
from raykd.config.sections import Evaluate
from raykd.config.training import Student
from raykd.data import grading
from raykd.evaluation.evaluate import check_adapters
from raykd.evaluation.student_batch import StudentModel, finish_reason, student_answers
from raykd.models import tokenization
from raykd.runtime.console import ProgressBar
from raykd.storage import row_store, schemas
from raykd.storage.paths import split_file


def write_rollouts(
    folders: Mapping[StudentModel, Path],
    *,
    problems: Path,
    student: Student,
    evaluation: Evaluate,
    sampling: Sampling,
    instruction: str,
    accelerator: Accelerator,
) -> None:
    """Answer training problems with every student, and finalize a folder of completions for each.

    Args:
        folders: by student (`StudentModel.problem_ids` selects the problems), the output folder of
            `schemas.COMPLETION` rows, which have no log-probabilities.
        problems: the folder of the splits; the `train` split is read.
        student: the base model.
        evaluation: the section `evaluate`, for the engine.
        sampling: sampling of the answers.
        instruction: the sentence about the answer's form.
        accelerator: the device of the engine.

    Raises:
        StageError: more than `evaluation.max_error_rate` of a student's answers failed; the message lists some.
        UserError: an adapter is damaged; the message names its file.
    """
    eval_models = list(folders)
    check_adapters(eval_models)
    done = {
        completion_id
        for folder in folders.values()
        for completion_id in row_store.done_ids(folder, schemas.COMPLETION, "completion_id")
    }
    total = sum(len(model.problem_ids or ()) for model in eval_models)
    with ProgressBar("rollouts", total, done=len(done), unit="answers") as progress:
        if len(done) < total:
            for folder in folders.values():
                row_store.reopen(folder)
            answers = student_answers(
                split_file(problems, "train"),
                eval_models,
                done,
                student=student,
                evaluation=evaluation.as_in_training(sampling),
                instruction=instruction,
                accelerator=accelerator,
            )
            writing = {
                "folders": {model.trial_id: folder for model, folder in folders.items()},
                "end_token_ids": tokenization.end_token_ids(student),
            }
            run_stage(
                answers,
                WriteRollouts,
                writing,
                "student-rollouts",
                lambda counts: progress.add(counts["rows"], counts["tokens"]),
                batch_size=evaluation.batch_size,
            )
    for eval_model, folder in folders.items():
        role, option = f"trial {eval_model.trial_id}, its own answers", "evaluate.max_error_rate"
        row_store.check_failures(folder, schemas.COMPLETION, "completion_id", role, option, evaluation.max_error_rate)
        row_store.finalize(
            folder,
            schemas.COMPLETION,
            "completion_id",
            {
                "trial": eval_model.trial_id,
                "sampling": sampling.model_dump(),
                "adapter_digest": eval_model.digest,
            },
        )


class WriteRollouts:
    """Stage that writes answers as completions, by student, and returns counts for the progress bar.

    Args:
        folders: the output folder by trial id.
        end_token_ids: tokens that end an answer.
    """

    def __init__(self, folders: Mapping[str, Path], end_token_ids: set[int]) -> None:
        self._folders, self._end_token_ids = folders, end_token_ids

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for trial_id in dict.fromkeys(row["trial_id"] for row in rows):
            completions = [self._completion(row) for row in rows if row["trial_id"] == trial_id]
            table = pa.Table.from_pylist(completions, schema=schemas.COMPLETION)
            row_store.write_part(self._folders[trial_id], table)
        return {"rows": [len(rows)], "tokens": [sum(len(row["generated_tokens"]) for row in rows)]}

    def _completion(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text, error = row["generated_text"], row[compat.INFERENCE_ERROR]
        tokens = [int(token) for token in row["generated_tokens"]]
        return {
            "completion_id": row["prediction_id"],
            "problem_id": row["problem_id"],
            "strategy": "",
            "sample_index": 0,
            # A failed row comes without tokens, even those of its prompt.
            "prompt_token_ids": [] if error else [int(token) for token in row["prompt_token_ids"]],
            "completion": text,
            "completion_token_ids": tokens,
            "finish_reason": finish_reason(tokens, self._end_token_ids, error),
            **grading.grade_completion(text, row["reference_answer"]),
            "topk_ids": [],
            "topk_logprobs": [],
            "error": error,
        }
