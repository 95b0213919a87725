"""Generate: problems x strategies become completions, through Ray Data and the served teacher, resumable by row.

The stage that asks the teacher also writes: what one call answered lies on disk before the next row counts.
So whatever is killed, at most the calls in flight are asked again (Ray Data's own checkpoint commits whole
blocks, and counts rows with an error as done).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayError

from raykd.config.sections import Teacher
from raykd.data import grading, prompts
from raykd.errors import StageError, reported_error
from raykd.models import loading, tokenization
from raykd.runtime.console import ProgressBar
from raykd.storage import files, filesystem, row_store, schemas
from raykd.storage.paths import split_file
from raykd.teacher.client import QUESTION_SCHEMA, TeacherClient
from raykd.teacher.completion_set import CompletionSet, completion_id
from raykd.teacher.server import start_failure
from raykd.teacher.timing import StageTimer


def generate_completions(
    wanted: list[CompletionSet],
    problems: Path,
    teacher: Teacher,
    instruction: str,
    app: str,
    experiment: str,
    versions: Mapping[str, str],
) -> None:
    """Asks the served teacher all that is missing, for all strategies in one stream, and seals each folder.

    Args:
        wanted: what is asked.
        problems: the folder of the splits; `train` is asked.
        teacher: the configuration's section.
        instruction: what is said about the form of the answer.
        app: the Serve application's name.
        experiment: the experiment's name, for who watches.
        versions: of the packages that matter, for the manifest.

    Raises:
        StageError: where more than `teacher.max_error_rate` of a strategy's rows failed, naming some.
    """
    spent = StageTimer(request.folder for request in wanted)
    num_problems = files.num_rows(split_file(problems, "train"))
    totals = {request.folder: num_problems * request.num_samples for request in wanted}
    done = _done_ids(wanted)
    path, system = filesystem.for_arrow(split_file(problems, "train"))
    questions = ray.data.read_parquet(path, filesystem=system).map_batches(
        BuildTeacherPrompts,
        batch_size=256,
        batch_format="pyarrow",
        fn_constructor_kwargs={"requests": wanted, "teacher": teacher, "instruction": instruction, "done": done},
        compute=ray.data.ActorPoolStrategy(size=1),
        # The pipeline's actors wait far more than they work: they take no core from the engine, nor from Ray Data.
        num_cpus=0,
    )
    _ask_teacher(questions, wanted, sum(totals.values()), sum(map(len, done.values())), teacher, app, experiment, spent)
    for request in wanted:
        _finalize(request, totals[request.folder], teacher.max_error_rate, spent, versions)


def score_completions(
    wanted: Mapping[Path, CompletionSet],
    problems: Path,
    teacher: Teacher,
    instruction: str,
    app: str,
    experiment: str,
    versions: Mapping[str, str],
) -> None:
    """Has the served teacher score what students wrote, token by token and primed, and seals each folder.

    Args:
        wanted: the requests, by the folder of the answers that each is about (rows of `schemas.COMPLETION`).
        problems: the folder of the splits that were answered.
        teacher: the configuration's section.
        instruction: what is said about the form of the answer.
        app: the Serve application's name.
        experiment: the experiment's name, for who watches.
        versions: of the packages that matter, for the manifest.

    Raises:
        StageError: as `generate`.
    """
    requests = list(wanted.values())
    spent = StageTimer(request.folder for request in requests)
    done = _done_ids(requests)
    totals = {folder: _num_to_score(folder) for folder in wanted}
    # A row a folder: each may hold many small parts, and Ray Data would open all of them at once.
    questions = ray.data.from_items([{"answers": str(folder)} for folder in wanted]).map_batches(
        BuildScoringPrompts,
        batch_size=1,
        fn_constructor_kwargs={
            "wanted": dict(wanted),
            "problems": problems,
            "teacher": teacher,
            "instruction": instruction,
            "done": done,
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    _ask_teacher(
        questions, requests, sum(totals.values()), sum(map(len, done.values())), teacher, app, experiment, spent
    )
    for folder, request in wanted.items():
        total = totals[folder] + _keep_empty_answers(folder, request)
        # What the student failed to answer was judged by how many of its answers may fail.
        failed = row_store.num_failed(folder, schemas.COMPLETION)
        limit = (teacher.max_error_rate * (total - failed) + failed) / max(1, total)
        _finalize(request, total, limit, spent, versions)


def _done_ids(wanted: list[CompletionSet]) -> dict[Path, set[str]]:
    return {each.folder: row_store.done_ids(each.folder, schemas.COMPLETION, "completion_id") for each in wanted}


def _num_to_score(folder: Path) -> int:
    """How many answers have at least a token."""
    rows = row_store.read_rows(folder, schemas.COMPLETION, ["completion_token_ids"])
    return sum(map(bool, rows["completion_token_ids"].to_pylist()))


def _keep_empty_answers(folder: Path, request: CompletionSet) -> int:
    """Adds the answers that cannot be scored to those that were, so that they are counted where rows are chosen."""
    rows = row_store.read_rows(folder, schemas.COMPLETION).to_pylist()
    nothing = [
        {
            **row,
            "completion_id": completion_id(request, row["problem_id"], 0),
            "strategy": request.strategy_name,
        }
        for row in rows
        if not row["completion_token_ids"]
    ]
    if nothing:
        table = pa.Table.from_pylist(nothing, schema=schemas.COMPLETION)
        row_store.write_part(request.folder, table)
    return len(nothing)


def _ask_teacher(
    questions: ray.data.Dataset,
    wanted: list[CompletionSet],
    total: int,
    already: int,
    teacher: Teacher,
    app: str,
    experiment: str,
    spent: StageTimer,
) -> None:
    """Streams questions through the served teacher; the completions are written on the way.

    Args:
        questions: rows of `client.QUESTION_SCHEMA`.
        wanted: the requests that they belong to.
        total: how many there are, those that were answered before included.
        already: how many were answered before.
        teacher: the configuration's section.
        app: the Serve application's name.
        experiment: the experiment's name, for who watches.
        spent: what their seconds are noted in.
    """
    in_flight = teacher.concurrency * (1 if teacher.endpoint else teacher.replicas.max)
    # Blocks as large as a call, so that each call can be under way, and written, on its own.
    counts = questions.repartition(target_num_rows_per_block=teacher.batch_size).map_batches(
        TeacherClient,
        batch_size=teacher.batch_size,
        fn_constructor_kwargs={
            "app": app,
            "experiment": experiment,
            "teacher": teacher,
            "requests": wanted,
            "in_flight": in_flight,
        },
        compute=ray.data.ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=in_flight, max_concurrent_calls_per_actor=in_flight
        ),
        num_cpus=0,
    )
    # What Ray's dashboard shows of it.
    counts.set_name(f"{experiment}-completions")
    with ProgressBar("teacher", total, done=already) as meter:
        if already >= total:
            return
        try:
            for row in counts.iter_rows():
                meter.add(row["rows"], row["tokens"])
                spent.note()
        except RayError as error:
            # Where it is the teacher that failed, say so rather than where that was noticed.
            if teacher.endpoint is None and (failed := start_failure(app)):
                raise StageError(failed) from None
            if told := reported_error(error):
                raise told from error
            raise


class BuildTeacherPrompts:
    """Turns problems into the teacher's prompt tokens, leaving out what was answered before."""

    def __init__(
        self, requests: list[CompletionSet], teacher: Teacher, instruction: str, done: Mapping[Path, set[str]]
    ) -> None:
        self._tokenizer = loading.teacher_tokenizer(teacher)
        self._requests, self._instruction, self._done = requests, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Strategy by strategy, so that neighbours share a prime, which the engine then computes once.
        rows = [
            question_row(self._tokenizer, problem, request, self._instruction, sample_index)
            for request in self._requests
            for sample_index in range(request.num_samples)
            for problem in batch.to_pylist()
            if completion_id(request, problem["problem_id"], sample_index) not in self._done[request.folder]
        ]
        return pa.Table.from_pylist(rows, schema=QUESTION_SCHEMA)


class BuildScoringPrompts:
    """Turns students' answers into what the teacher is to score, under its own prompt and prime."""

    def __init__(
        self,
        wanted: Mapping[Path, CompletionSet],
        problems: Path,
        teacher: Teacher,
        instruction: str,
        done: Mapping[Path, set[str]],
    ) -> None:
        self._tokenizer = loading.teacher_tokenizer(teacher)
        self._wanted = {str(folder): (folder, request) for folder, request in wanted.items()}
        self._instruction, self._done = instruction, done
        rows = files.read_table(split_file(problems, "train")).to_pylist()
        self._problems = {row["problem_id"]: row for row in rows}

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for folder, request in (self._wanted[named] for named in batch["answers"]):
            for part in row_store.stream_rows(folder, schemas.COMPLETION):
                yield pa.Table.from_pylist(list(self._rows(part.to_pylist(), request)), schema=QUESTION_SCHEMA)

    def _rows(self, answers: list[dict[str, Any]], request: CompletionSet) -> Iterator[dict[str, Any]]:
        for answer in answers:
            is_done = completion_id(request, answer["problem_id"], 0) in self._done[request.folder]
            if not answer["completion_token_ids"] or is_done:
                continue
            given = (answer["completion_token_ids"], answer["completion"], answer["finish_reason"])
            problem = self._problems[answer["problem_id"]]
            yield question_row(self._tokenizer, problem, request, self._instruction, 0, given)


def question_row(
    tokenizer: Any,
    problem: Mapping[str, Any],
    request: CompletionSet,
    instruction: str,
    sample_index: int,
    given: tuple[list[int], str, str] | None = None,
) -> dict[str, Any]:
    """A row of `client.QUESTION_SCHEMA`: to be answered, or to be scored.

    Args:
        tokenizer: the teacher's; None where it is sent messages.
        problem: a row of `schemas.PROBLEM`.
        request: what the row belongs to.
        instruction: what is said about the form of the answer.
        sample_index: which of the problem's completions it is.
        given: tokens, text and finish reason of the answer to score; None for the reference solution where the
            request is about that, and for nothing where it is not.
    """
    if given is None and request.source == "reference":
        solution = problem["reference_solution"]
        given = (tokenization.answer_token_ids(tokenizer, solution, is_whole=True), solution, "stop")
    tokens, text, finish = given or ([], "", "")
    messages = prompts.teacher_messages(problem, request.strategy, instruction)
    return {
        "completion_id": completion_id(request, problem["problem_id"], sample_index),
        "problem_id": problem["problem_id"],
        "reference_answer": problem["reference_answer"],
        "strategy": request.strategy_name,
        "sample_index": sample_index,
        "folder": str(request.folder),
        "prompt_token_ids": tokenization.prompt_token_ids(tokenizer, messages) if tokenizer else [],
        "messages": "" if tokenizer else json.dumps(messages),
        "given_token_ids": tokens,
        "given_text": text,
        "given_finish_reason": finish,
    }


def check_teacher_lengths(
    wanted: list[CompletionSet], problems: Path, teacher: Teacher, instruction: str, max_tokens: int
) -> None:
    """Raises UserError where more prompts than may fail leave the teacher no room to answer, naming some.

    Args:
        wanted: what is to be asked.
        problems: the folder of the splits.
        teacher: the configuration's section.
        instruction: what is said about the form of the answer.
        max_tokens: how long an answer may be that is not there yet.
    """
    if teacher.uses_chat_api:
        # How many tokens that is, and how many it takes, its server knows alone.
        return
    limit = tokenization.context_length(teacher, teacher.engine.engine_kwargs)
    if limit is None:
        return
    tokenizer = loading.load_tokenizer(teacher)
    total = files.num_rows(split_file(problems, "train"))
    for request in wanted:
        whose = f"teacher, strategy {request.strategy_name!r}"
        needs = _lengths(request, problems, tokenizer, instruction, max_tokens)
        also = "max_tokens, or the strategy's text" if request.source != "reference" else "the strategy's text"
        tokenization.check_lengths(needs, total, limit, teacher.max_error_rate, whose, "teacher.engine", also)


def _lengths(
    request: CompletionSet, problems: Path, tokenizer: Any, instruction: str, max_tokens: int
) -> Iterator[tuple[str, int]]:
    """Each problem, with the tokens that its prompt and its answer may take."""
    for batch in files.read_batches(split_file(problems, "train")):
        for problem in batch.to_pylist():
            row = question_row(tokenizer, problem, request, instruction, 0)
            given = len(row["given_token_ids"])
            # The engine cannot score without writing a token of its own.
            room = max_tokens + (request.source == "student")
            yield problem["problem_id"], len(row["prompt_token_ids"]) + (given + 1 if given else room)


def _finalize(
    request: CompletionSet, total: int, max_error_rate: float, spent: StageTimer, versions: Mapping[str, str]
) -> None:
    """Checks that all rows of a request are there, and writes the manifest with what they hold.

    Raises:
        StageError: where more than `max_error_rate` of them failed, naming some.
    """
    counts = {
        "answered": 0,
        "correct": 0,
        "answer_first": 0,
        "truncated": 0,
        "completion_tokens": 0,
        "prompt_tokens": 0,
    }
    whose = f"strategy {request.strategy_name!r}"
    errors = row_store.check_failures(
        request.folder, schemas.COMPLETION, "completion_id", whose, "teacher.max_error_rate", max_error_rate
    )
    columns = ["is_correct", "completion", "completion_token_ids", "prompt_token_ids", "finish_reason", "error"]
    for part in row_store.stream_rows(request.folder, schemas.COMPLETION, columns):
        for row in part.to_pylist():
            if row["error"]:
                continue
            counts["answered"] += 1
            counts["correct"] += row["is_correct"]
            counts["answer_first"] += grading.states_answer_first(row["completion"])
            counts["completion_tokens"] += len(row["completion_token_ids"])
            counts["prompt_tokens"] += len(row["prompt_token_ids"])
            counts["truncated"] += row["finish_reason"] == "length"
    assert counts["answered"] + errors == total, "each question has one completion or one error"
    row_store.finalize(
        request.folder,
        schemas.COMPLETION,
        "completion_id",
        {
            "strategy": request.strategy_name,
            "content": request.content,
            **counts,
            "errors": errors,
            "seconds": spent.of(request.folder),
            "versions": dict(versions),
        },
    )
