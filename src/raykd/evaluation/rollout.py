"""Rollout: students answer training problems with their adapters as they are now, all in one engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from raykd import compat
from raykd.cluster import resources
from raykd.config.engine import Sampling
from raykd.config.sections import Evaluate, Student
from raykd.data import grading
from raykd.evaluation.evaluate import check_adapters
from raykd.evaluation.student_batch import StudentModel, finish_reason, student_answers
from raykd.models import tokenization
from raykd.runtime.console import ProgressBar
from raykd.storage import row_store, schemas
from raykd.storage.paths import split_file


def write_rollouts(
    folders: Mapping[StudentModel, Path],
    problems: Path,
    student: Student,
    evaluation: Evaluate,
    sampling: Sampling,
    instruction: str,
    kind: resources.Accelerator,
) -> None:
    """Has students answer the training problems that each is given, and seals a folder for each.

    Args:
        folders: who answers, and where the answers go, as rows of `schemas.COMPLETION` without log-probabilities.
        problems: the folder of the splits; `train` is asked.
        student: the base model.
        evaluation: the engine's configuration.
        sampling: how they answer.
        instruction: what is said about the form of the answer.
        kind: what the engine runs on.

    Raises:
        StageError: where more than `evaluation.max_error_rate` of a student's answers failed, naming some.
        UserError: where an adapter is damaged, naming it.
    """
    check_adapters(list(folders))
    done = {
        id_ for folder in folders.values() for id_ in row_store.done_ids(folder, schemas.COMPLETION, "completion_id")
    }
    total = sum(len(each.problem_ids or ()) for each in folders)
    with ProgressBar("rollouts", total, done=len(done), unit="answers") as meter:
        if len(done) < total:
            asked = evaluation.as_in_training(sampling)
            kept = student_answers(
                split_file(problems, "train"), list(folders), done, student, asked, instruction, kind
            ).map_batches(
                WriteRollouts,
                batch_size=evaluation.batch_size,
                fn_constructor_kwargs={
                    "folders": {each.trial_id: folder for each, folder in folders.items()},
                    "ends": tokenization.end_token_ids(student),
                },
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=0,
            )
            kept.set_name("student-rollouts")
            for row in kept.iter_rows():
                meter.add(row["rows"], row["tokens"])
    for eval_model, folder in folders.items():
        whose, option = f"trial {eval_model.trial_id}, its own answers", "evaluate.max_error_rate"
        row_store.check_failures(folder, schemas.COMPLETION, "completion_id", whose, option, evaluation.max_error_rate)
        told = {
            "trial": eval_model.trial_id,
            "sampling": sampling.model_dump(),
            "adapter": str(eval_model.adapter or ""),
        }
        row_store.finalize(folder, schemas.COMPLETION, "completion_id", told)


class WriteRollouts:
    """Writes answers as completions, each student's in its own folder, and passes on the counts."""

    def __init__(self, folders: Mapping[str, Path], ends: set[int]) -> None:
        self._folders, self._ends = folders, ends

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        for trial_id in dict.fromkeys(row["trial_id"] for row in rows):
            made = [self._completion(row) for row in rows if row["trial_id"] == trial_id]
            table = pa.Table.from_pylist(made, schema=schemas.COMPLETION)
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
            # An answer that failed has no tokens, of its prompt neither.
            "prompt_token_ids": [] if error else [int(token) for token in row["prompt_token_ids"]],
            "completion": text,
            "completion_token_ids": tokens,
            "finish_reason": finish_reason(tokens, self._ends, error),
            **grading.grade_completion(text, row["reference_answer"]),
            "topk_ids": [],
            "topk_logprobs": [],
            "error": error,
        }
