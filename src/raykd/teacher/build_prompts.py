"""Teacher prompts: rows of prompt tokens to answer or to score, and the check that they fit the context length."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd.config.sections import Teacher
from raykd.data import prompts
from raykd.models import loading, tokenization
from raykd.storage import files, row_store, schemas
from raykd.storage.paths import split_file
from raykd.teacher.completion_set import CompletionSet, completion_id

# The input of `TeacherClient`: a row for each completion.
QUESTION_SCHEMA = pa.schema(
    [
        *(schemas.COMPLETION.field(name) for name in ("completion_id", "problem_id", "strategy", "sample_index")),
        pa.field("reference_answer", pa.string()),
        # Of the completion set that the row belongs to.
        pa.field("folder", pa.string()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        # Chat messages in JSON for a teacher behind a chat API; `prompt_token_ids` is empty then.
        pa.field("messages", pa.string()),
        # The text to score; empty where the teacher generates.
        pa.field("given_token_ids", pa.list_(pa.int32())),
        pa.field("given_text", pa.string()),
        pa.field("given_finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class ScoredText:
    """Text that the teacher scores: a reference solution, or a student's answer."""

    token_ids: list[int]
    text: str
    finish_reason: str


class BuildTeacherPrompts:
    """Ray Data stage: problems become the teacher's prompt tokens, without those that are answered already."""

    def __init__(
        self, completion_sets: list[CompletionSet], teacher: Teacher, instruction: str, done: Mapping[Path, set[str]]
    ) -> None:
        self._tokenizer = loading.teacher_tokenizer(teacher)
        self._completion_sets, self._instruction, self._done = completion_sets, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Ordered by strategy: neighbors share a prime, whose attention keys the engine then computes once.
        rows = [
            question_row(self._tokenizer, problem, completion_set, self._instruction, sample_index)
            for completion_set in self._completion_sets
            for sample_index in range(completion_set.num_samples)
            for problem in batch.to_pylist()
            if completion_id(completion_set, problem["problem_id"], sample_index)
            not in self._done[completion_set.folder]
        ]
        return pa.Table.from_pylist(rows, schema=QUESTION_SCHEMA)


class BuildScoringPrompts:
    """Ray Data stage: students' answers become rows that the teacher scores, under its own prompt and prime."""

    def __init__(
        self,
        completion_sets: Mapping[Path, CompletionSet],
        problems_dir: Path,
        teacher: Teacher,
        instruction: str,
        done: Mapping[Path, set[str]],
    ) -> None:
        self._tokenizer = loading.teacher_tokenizer(teacher)
        self._completion_sets = {
            str(answers_dir): (answers_dir, completion_set) for answers_dir, completion_set in completion_sets.items()
        }
        self._instruction, self._done = instruction, done
        problems = files.read_table(split_file(problems_dir, "train")).to_pylist()
        self._problems = {problem["problem_id"]: problem for problem in problems}

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for answers_dir, completion_set in (self._completion_sets[name] for name in batch["answers"]):
            for part in row_store.stream_rows(answers_dir, schemas.COMPLETION):
                rows = list(self._rows(part.to_pylist(), completion_set))
                yield pa.Table.from_pylist(rows, schema=QUESTION_SCHEMA)

    def _rows(self, answers: list[dict[str, Any]], completion_set: CompletionSet) -> Iterator[dict[str, Any]]:
        for answer in answers:
            id_ = completion_id(completion_set, answer["problem_id"], 0)
            if not answer["completion_token_ids"] or id_ in self._done[completion_set.folder]:
                continue
            scored = ScoredText(answer["completion_token_ids"], answer["completion"], answer["finish_reason"])
            problem = self._problems[answer["problem_id"]]
            yield question_row(self._tokenizer, problem, completion_set, self._instruction, 0, scored)


def question_row(
    tokenizer: Any,
    problem: Mapping[str, Any],
    completion_set: CompletionSet,
    instruction: str,
    sample_index: int,
    scored: ScoredText | None = None,
) -> dict[str, Any]:
    """Return a row of `QUESTION_SCHEMA`.

    Args:
        tokenizer: the teacher's; None for a teacher behind a chat API.
        problem: a row of `schemas.PROBLEM`.
        completion_set: the set that the row belongs to.
        instruction: the instruction on the form of the answer.
        sample_index: index of the completion among those of the problem.
        scored: a student's answer to score. None: the reference solution is scored where that is the source of the
            completion set; else the teacher generates.
    """
    if scored is None and completion_set.source == "reference":
        solution = problem["reference_solution"]
        scored = ScoredText(tokenization.answer_token_ids(tokenizer, solution, is_whole=True), solution, "stop")
    messages = prompts.teacher_messages(problem, completion_set.strategy, instruction)
    return {
        "completion_id": completion_id(completion_set, problem["problem_id"], sample_index),
        "problem_id": problem["problem_id"],
        "reference_answer": problem["reference_answer"],
        "strategy": completion_set.strategy_name,
        "sample_index": sample_index,
        "folder": str(completion_set.folder),
        "prompt_token_ids": tokenization.prompt_token_ids(tokenizer, messages) if tokenizer else [],
        "messages": "" if tokenizer else json.dumps(messages),
        "given_token_ids": scored.token_ids if scored else [],
        "given_text": scored.text if scored else "",
        "given_finish_reason": scored.finish_reason if scored else "",
    }


def check_teacher_lengths(
    completion_sets: list[CompletionSet], problems_dir: Path, teacher: Teacher, instruction: str, max_tokens: int
) -> None:
    """Check that prompts and answers fit the teacher's context length.

    Args:
        completion_sets: the sets to generate or to score.
        problems_dir: the folder of the splits.
        teacher: the `teacher` section.
        instruction: the instruction on the form of the answer.
        max_tokens: most tokens of an answer that does not exist yet.

    Raises:
        UserError: more prompts than `teacher.max_error_rate` are too long; the message names some.
    """
    if teacher.uses_chat_api:
        # The tokenizer and the context length are the server's own.
        return
    limit = tokenization.context_length(teacher, teacher.engine.engine_kwargs)
    if limit is None:
        return
    tokenizer = loading.load_tokenizer(teacher)
    total = files.num_rows(split_file(problems_dir, "train"))
    for completion_set in completion_sets:
        lengths = _lengths(completion_set, problems_dir, tokenizer, instruction, max_tokens)
        remedy = "the strategy's text"
        if completion_set.source != "reference":
            remedy = f"max_tokens, or {remedy}"
        tokenization.check_lengths(
            lengths,
            total,
            limit,
            teacher.max_error_rate,
            f"teacher, strategy {completion_set.strategy_name!r}",
            "teacher.engine",
            remedy,
        )


def _lengths(
    completion_set: CompletionSet, problems_dir: Path, tokenizer: Any, instruction: str, max_tokens: int
) -> Iterator[tuple[str, int]]:
    """Yield each problem's id, and the most tokens that its prompt and its answer take together."""
    for batch in files.read_batches(split_file(problems_dir, "train")):
        for problem in batch.to_pylist():
            row = question_row(tokenizer, problem, completion_set, instruction, 0)
            answer_tokens = len(row["given_token_ids"]) or max_tokens
            if completion_set.is_scored:
                # The engine cannot score a prompt without generating a token.
                answer_tokens += 1
            yield problem["problem_id"], len(row["prompt_token_ids"]) + answer_tokens
