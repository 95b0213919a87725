"""Generation: problems x strategies become completions, through Ray Data and the teacher, resumable by row.

The stage that calls the teacher also writes: the completions of a call are on disk before its rows count as done. So
a run that is killed repeats only the calls in flight. (Ray Data's own checkpoints cover whole blocks, and count rows
with an error as done.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from raykd.cluster.data_stage import map_with_actors, run_stage
from raykd.config.sections import Teacher
from raykd.data import grading
from raykd.errors import StageError, reported_error
from raykd.runtime import metrics
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, row_store, schemas
from raykd.storage.paths import split_file
from raykd.storage.provenance import provenance
from raykd.teacher.build_prompts import BuildScoringPrompts, BuildTeacherPrompts
from raykd.teacher.client import CallHook, TeacherClient
from raykd.teacher.completion_set import CompletionSet, completion_id
from raykd.teacher.server import start_failure
from raykd.teacher.timing import StageTimer

PROMPTS_PER_BATCH = 256


@dataclass(frozen=True)
class GenerationContext:
    """The settings that all completion sets of a generation stage share."""

    problems_dir: Path
    """The folder of the splits; `train` is used."""
    teacher: Teacher
    """The `teacher` section."""
    instruction: str
    """The instruction on the form of the answer."""
    app: str
    """Name of the teacher's Serve application; unused with `teacher.endpoint`."""
    experiment: str
    """The experiment's name, for metrics and Ray's dashboard."""
    on_call: CallHook | None = None
    """Called after each call of the teacher, in the client's process; for benchmarks."""


def generate_completions(completion_sets: list[CompletionSet], context: GenerationContext) -> None:
    """Generate all missing completions, for all strategies in one stream, and finalize each folder.

    Args:
        completion_sets: the sets to complete.
        context: the settings that they share.

    Raises:
        StageError: more rows of a strategy failed than `teacher.max_error_rate`; the message names some.
    """
    timer = StageTimer(each.folder for each in completion_sets)
    train_file = split_file(context.problems_dir, "train")
    num_problems = files.num_rows(train_file)
    totals = {each.folder: num_problems * each.num_samples for each in completion_sets}
    done = _done_ids(completion_sets)
    path, arrow_filesystem = filesystem.for_arrow(train_file)
    questions = map_with_actors(
        ray.data.read_parquet(path, filesystem=arrow_filesystem),
        BuildTeacherPrompts,
        {
            "completion_sets": completion_sets,
            "teacher": context.teacher,
            "instruction": context.instruction,
            "done": done,
        },
        batch_size=PROMPTS_PER_BATCH,
        batch_format="pyarrow",
    )
    _call_teacher(questions, completion_sets, sum(totals.values()), sum(map(len, done.values())), context, timer)
    for each in completion_sets:
        _finalize(each, totals[each.folder], context.teacher.max_error_rate, timer)


def score_completions(completion_sets: Mapping[Path, CompletionSet], context: GenerationContext) -> None:
    """Score students' answers under the teacher's prompt, token by token, and finalize each folder.

    Args:
        completion_sets: the sets to complete, by the folder of the answers to score (rows of `schemas.COMPLETION`).
        context: the settings that they share.

    Raises:
        StageError: as for `generate_completions`.
    """
    timer = StageTimer(each.folder for each in completion_sets.values())
    done = _done_ids(completion_sets.values())
    totals = {answers_dir: _num_to_score(answers_dir) for answers_dir in completion_sets}
    # A row for each folder: a folder may hold many small files, and Ray Data would open all of them at once.
    questions = map_with_actors(
        ray.data.from_items([{"answers": str(answers_dir)} for answers_dir in completion_sets]),
        BuildScoringPrompts,
        {
            "completion_sets": dict(completion_sets),
            "problems_dir": context.problems_dir,
            "teacher": context.teacher,
            "instruction": context.instruction,
            "done": done,
        },
        batch_size=1,
    )
    _call_teacher(
        questions,
        list(completion_sets.values()),
        sum(totals.values()),
        sum(map(len, done.values())),
        context,
        timer,
    )
    for answers_dir, completion_set in completion_sets.items():
        total = totals[answers_dir] + _keep_empty_answers(answers_dir, completion_set)
        # The student's own failures were checked against `evaluate.max_error_rate`: they do not count here.
        num_failed = row_store.num_failed(answers_dir, schemas.COMPLETION)
        limit = (context.teacher.max_error_rate * (total - num_failed) + num_failed) / max(1, total)
        _finalize(completion_set, total, limit, timer)


def _done_ids(completion_sets: Iterable[CompletionSet]) -> dict[Path, set[str]]:
    return {
        each.folder: row_store.done_ids(each.folder, schemas.COMPLETION, "completion_id") for each in completion_sets
    }


def _num_to_score(answers_dir: Path) -> int:
    """Return the number of answers with at least one token."""
    rows = row_store.read_rows(answers_dir, schemas.COMPLETION, ["completion_token_ids"])
    return sum(map(bool, rows["completion_token_ids"].to_pylist()))


def _keep_empty_answers(answers_dir: Path, completion_set: CompletionSet) -> int:
    """Copy the answers without a token to the scored ones, so that training counts them as dropped rows.

    Returns:
        The number of these answers.
    """
    rows = row_store.read_rows(answers_dir, schemas.COMPLETION).to_pylist()
    empty = [
        {
            **row,
            "completion_id": completion_id(completion_set, row["problem_id"], 0),
            "strategy": completion_set.strategy_name,
        }
        for row in rows
        if not row["completion_token_ids"]
    ]
    if empty:
        table = pa.Table.from_pylist(empty, schema=schemas.COMPLETION)
        row_store.write_part(completion_set.folder, table)
    return len(empty)


def _call_teacher(
    questions: ray.data.Dataset,
    completion_sets: list[CompletionSet],
    total: int,
    num_done: int,
    context: GenerationContext,
    timer: StageTimer,
) -> None:
    """Stream questions through the teacher; its client writes the completions.

    Args:
        questions: rows of `build_prompts.QUESTION_SCHEMA`.
        completion_sets: the sets that they belong to.
        total: number of completions, the earlier ones included.
        num_done: number of completions that exist already.
        context: the settings of the stage.
        timer: saves the seconds of each set.
    """
    teacher = context.teacher
    calls_in_flight = teacher.concurrency
    if teacher.endpoint is None:
        calls_in_flight *= teacher.replicas.max
    with ProgressBar("teacher", total, done=num_done) as progress:
        if num_done >= total:
            return

        def count(row: dict[str, Any]) -> None:
            # In the driver: an actor of a short stage may end before Ray exports its counters.
            strategy, source = row.pop("strategy"), row.pop("source")
            new = metrics.CompletionCounts(**row)
            metrics.count_completions(context.experiment, strategy, source, new)
            progress.add(new.done + new.failed, new.tokens)
            timer.save()

        try:
            run_stage(
                # One block for each call, so that every call runs, and is written, by itself.
                questions.repartition(target_num_rows_per_block=teacher.batch_size),
                TeacherClient,
                {
                    "app": context.app,
                    "teacher": teacher,
                    "completion_sets": completion_sets,
                    "max_calls": calls_in_flight,
                    "on_call": context.on_call,
                },
                f"{context.experiment}-completions",
                count,
                batch_size=teacher.batch_size,
                calls_in_flight=calls_in_flight,
            )
        except RayError as error:
            # Report an engine that failed to start, rather than the call that noticed it.
            if teacher.endpoint is None and (failure := start_failure(context.app)):
                raise StageError(failure) from None
            if reported := reported_error(error):
                raise reported from error
            raise


def _finalize(
    completion_set: CompletionSet,
    total: int,
    max_error_rate: float,
    timer: StageTimer,
) -> None:
    """Check that all rows of a completion set exist, and write the manifest with counts of its contents.

    Raises:
        StageError: more rows failed than `max_error_rate`; the message names some.
    """
    num_errors = row_store.check_failures(
        completion_set.folder,
        schemas.COMPLETION,
        "completion_id",
        f"strategy {completion_set.strategy_name!r}",
        "teacher.max_error_rate",
        max_error_rate,
    )
    counts = _count_completions(completion_set.folder)
    assert counts["answered"] + num_errors == total, "each question has one completion or one error"
    row_store.finalize(
        completion_set.folder,
        schemas.COMPLETION,
        "completion_id",
        {
            "strategy": completion_set.strategy_name,
            "content": completion_set.content,
            **counts,
            "errors": num_errors,
            "seconds": timer.seconds(completion_set.folder),
            "made_with": provenance(),
        },
    )


def _count_completions(folder: Path) -> dict[str, int]:
    """Return the counts that a manifest holds: completions without an error, by their properties, and tokens."""
    counts = {
        "answered": 0,
        "correct": 0,
        "answer_first": 0,
        "truncated": 0,
        "completion_tokens": 0,
        "prompt_tokens": 0,
    }
    columns = ["is_correct", "completion", "completion_token_ids", "prompt_token_ids", "finish_reason", "error"]
    for part in row_store.stream_rows(folder, schemas.COMPLETION, columns):
        for row in part.to_pylist():
            if row["error"]:
                continue
            counts["answered"] += 1
            counts["correct"] += row["is_correct"]
            counts["answer_first"] += grading.states_answer_first(row["completion"])
            counts["completion_tokens"] += len(row["completion_token_ids"])
            counts["prompt_tokens"] += len(row["prompt_token_ids"])
            counts["truncated"] += row["finish_reason"] == "length"
    return counts
