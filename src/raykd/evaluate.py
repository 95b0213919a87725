"""Evaluate: every adapter of an experiment, and the student without one, in one pass of one engine.

The stage that scores an answer also writes it, so a run that was killed goes on from the rows that are there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import safetensors.numpy
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from raykd import adapters, answers, compat, identity, location, models, placement, protocols, records, storage
from raykd.config import UNTOUCHED
from raykd.demo import resolve_model
from raykd.faults import as_user_error
from raykd.memory import padded_rank
from raykd.progress import Meter
from raykd.sections import Evaluate, Student


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A student that answers the test problems."""

    trial_id: str
    arm: str
    seed: int
    adapter: Path | None
    """Folder of the adapter, in peft's format; None for the untouched student."""
    rank: int = 0
    """Rank of the adapter; 0 for the untouched student."""
    problem_ids: frozenset[str] | None = None
    """The problems that it answers; None for all."""


UNTOUCHED_STUDENT = Contestant(UNTOUCHED, UNTOUCHED, 0, None)


def evaluate(
    contestants: list[Contestant],
    problems: Path,
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    kind: placement.Accelerator,
    folder: Path,
) -> None:
    """Has every contestant answer every test problem, and seals the folder of predictions.

    Args:
        contestants: adapters of the same base model, and that model itself.
        problems: the folder of the splits; `test` is asked.
        student: the base model.
        evaluation: the configuration's section.
        instruction: what is said about the form of the answer, as in training.
        kind: what the engine runs on.
        folder: where `records.PREDICTION` rows go.

    Raises:
        StageError: where more than `evaluation.max_error_rate` of the rows failed, naming some.
        UserError: where an adapter is damaged, naming it.
    """
    check_adapters(contestants)
    ids = test_ids(problems)
    wanted = {
        _prediction_id(each, problem_id, sample)
        for each in contestants
        for problem_id in ids
        for sample in range(evaluation.samples)
    }
    total = len(wanted)
    done = storage.done_ids(folder, records.PREDICTION, "prediction_id") & wanted
    contestants = _with_null_adapter(contestants, folder / "null_adapter")
    with Meter("students", total, done=len(done), unit="answers") as meter:
        if len(done) < total:
            scored = answered(
                problems / "test.parquet", contestants, done, student, evaluation, instruction, kind
            ).map_batches(
                Score,
                batch_size=evaluation.batch_size,
                fn_constructor_kwargs={
                    "folder": folder,
                    "ends": models.end_token_ids(student),
                    "evaluation": evaluation,
                },
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=0,
            )
            scored.set_name("student-answers")
            for row in scored.iter_rows():
                meter.add(row["rows"], row["tokens"])
    option = "evaluate.max_error_rate"
    storage.check_failures(folder, records.PREDICTION, "prediction_id", "students", option, evaluation.max_error_rate)
    storage.seal(
        folder,
        records.PREDICTION,
        "prediction_id",
        {
            "trials": [each.trial_id for each in contestants],
            "asked": identity.way_of_asking(evaluation),
            "problems": problems.name,
        },
    )


def check_adapters(contestants: Sequence[Contestant]) -> None:
    """Raises UserError where an adapter is not as raykd writes it, naming the file."""
    for each in contestants:
        if each.adapter:
            adapters.check(each.adapter, each.rank)


def folder_name(evaluation: Evaluate) -> str:
    """What the folder of answers is called: other for each way of asking."""
    return f"{evaluation.protocol}-{storage.content_key(identity.way_of_asking(evaluation))[:8]}"


def collect(folder: Path, file: Path) -> None:
    """Writes all complete answers of an experiment into one file, in however many ways they were asked.

    To the columns of `records.PREDICTION` comes `evaluation`, the name of the folder of answers, by which ways of
    asking are told apart. Nothing is written where the file is newer than all of them.

    Args:
        folder: of the folders of answers.
        file: the Parquet file.
    """
    manifests = location.in_each(folder, storage.MANIFEST)
    if not manifests or (file.exists() and file.stat().st_mtime > max(each.stat().st_mtime for each in manifests)):
        return
    tables = []
    for manifest in manifests:
        table = storage.read_rows(manifest.parent, records.PREDICTION)
        table = table.sort_by([(name, "ascending") for name in ("trial_id", "problem_id", "sample_index")])
        name = pa.array([manifest.parent.name] * len(table), pa.string())
        tables.append(table.add_column(0, "evaluation", name))
    storage.write_table(file, pa.concat_tables(tables))


def check_lengths(split: Path, student: Student, evaluation: Evaluate, instruction: str, whose: str) -> None:
    """Raises UserError where more prompts than may fail leave the student no room to answer, naming some.

    Args:
        split: the Parquet file of the problems.
        student: the base model.
        evaluation: how they are asked.
        instruction: what is said about the form of the answer.
        whose: who answers what, for the message.
    """
    limit = models.context_length(student, evaluation.engine.engine_kwargs)
    if limit is None:
        return
    tokenizer = models.load_tokenizer(student)
    rows = storage.read_table(split, ["problem_id", "question"]).to_pylist()
    room = evaluation.sampling.max_tokens
    needs = (
        (row["problem_id"], room + len(models.question_token_ids(tokenizer, row, instruction, evaluation.protocol)))
        for row in rows
    )
    models.check_room(needs, len(rows), limit, evaluation.max_error_rate, whose, "evaluate.engine", "max_tokens")


def answered(
    split: Path,
    contestants: list[Contestant],
    done: set[str],
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    kind: placement.Accelerator,
) -> ray.data.Dataset:
    """The stream of all contestants' answers to a split's problems, from one engine.

    Args:
        split: the Parquet file of the problems.
        contestants: who answers what; either all have an adapter or none has.
        done: ids of answers that are there.
        student: the base model.
        evaluation: how they are asked; where it is random, the seed of an answer is that of sampling, contestant,
            problem and sample, whatever else is asked beside it.
        instruction: what is said about the form of the answer, as in training.
        kind: what the engine runs on.
    """
    path, system = location.for_arrow(split)
    questions = ray.data.read_parquet(path, filesystem=system).map_batches(
        Ask,
        batch_size=256,
        batch_format="pyarrow",
        fn_constructor_kwargs={
            "contestants": contestants,
            "student": student,
            "evaluation": evaluation,
            "instruction": instruction,
            "done": done,
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    questions = questions.repartition(target_num_rows_per_block=evaluation.batch_size)
    return _processor(contestants, student, evaluation, kind)(questions)


def _with_null_adapter(contestants: list[Contestant], folder: Path) -> list[Contestant]:
    """Gives the untouched student an adapter that adds nothing, where others in the same engine have one.

    vLLM marks a row without an adapter by the index -1, which its kernels for the CPU take for the last adapter:
    in one batch with others, the untouched student would answer as one of them (`vllm.lora.ops.torch_ops`).
    """
    adapted = next((each for each in contestants if each.adapter), None)
    if adapted is None or adapted.adapter is None:
        return contestants
    with location.here(adapted.adapter / "adapter_model.safetensors") as file:
        weights = safetensors.numpy.load_file(file)
    nothing = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}
    with location.written_folder(folder) as local:
        safetensors.numpy.save_file(nothing, local / "adapter_model.safetensors", metadata={"format": "pt"})
        (local / "adapter_config.json").write_bytes(location.read(adapted.adapter / "adapter_config.json"))
    null = dataclasses.replace(UNTOUCHED_STUDENT, adapter=folder, rank=adapted.rank)
    return [null if each == UNTOUCHED_STUDENT else each for each in contestants]


def test_ids(problems: Path) -> list[str]:
    """The test problems, in their order."""
    return storage.read_table(problems / "test.parquet", ["problem_id"])["problem_id"].to_pylist()


def _prediction_id(contestant: Contestant, problem_id: str, sample: int) -> str:
    """The name of an answer."""
    return f"{contestant.trial_id}/{problem_id}" + (f"/{sample}" if sample else "")


def _processor(
    contestants: list[Contestant], student: Student, evaluation: Evaluate, kind: placement.Accelerator
) -> Any:
    """Ray Data's vLLM stage, with an adapter for each row."""
    kwargs, env = placement.engine_settings(evaluation.engine, kind)
    adapters = [each for each in contestants if each.adapter is not None]
    if adapters:
        kwargs |= {
            "enable_lora": True,
            "max_loras": min(evaluation.max_loras, len(adapters)),
            # An adapter may be smaller than the one it is told.
            "max_lora_rank": padded_rank(max(each.rank for each in adapters)),
        }
    # Of a bucket Ray copies an adapter to the engine's node.
    loading = next((location.for_engine(each.adapter)[0] for each in adapters if each.adapter), None)
    if student.revision:
        kwargs["revision"] = student.revision
    kwargs["trust_remote_code"] = student.trust_remote_code
    with as_user_error("evaluate.engine", ValueError):
        config = vLLMEngineProcessorConfig(
            model_source=resolve_model(student.model),
            engine_kwargs=kwargs,
            runtime_env={"env_vars": env},
            batch_size=evaluation.batch_size,
            concurrency=1,
            dynamic_lora_loading_path=loading,
            should_continue_on_error=True,
            # Prompts come as tokens, and answers are detokenised by the engine.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            placement_group_config={"bundles": placement.engine_bundles(evaluation.engine, kind)},
            log_engine_metrics=not kwargs.get("disable_log_stats", False),
        )
    return build_processor(
        config,
        preprocess=lambda row: {**row, "sampling_params": sampling_params(evaluation, int(row["answer_seed"]))},
    )


def sampling_params(evaluation: Evaluate, seed: int) -> dict[str, Any]:
    """vLLM's sampling parameters."""
    sampling, stop = evaluation.sampling, protocols.stop_strings(evaluation)
    params = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "top_p": sampling.top_p}
    if sampling.temperature:
        params["seed"] = seed
    if stop:
        # Kept at first: whether an answer ended there is told by its end.
        params |= {"stop": stop, "include_stop_str_in_output": True}
    return params


class Ask:
    """Turns problems into a row for each contestant and sample, leaving out what was answered before."""

    def __init__(
        self, contestants: list[Contestant], student: Student, evaluation: Evaluate, instruction: str, done: set[str]
    ) -> None:
        self._tokenizer = models.load_tokenizer(student)
        self._contestants, self._model = contestants, resolve_model(student.model)
        self._evaluation, self._instruction, self._done = evaluation, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        problems = batch.to_pylist()
        protocol, seed = self._evaluation.protocol, self._evaluation.sampling.seed
        tokens = [models.question_token_ids(self._tokenizer, each, self._instruction, protocol) for each in problems]
        # One after the other: the engine then changes adapters now and then only, and an answer's neighbours, with
        # which it is written, are its student's.
        rows = [
            {
                "prediction_id": prediction_id,
                "trial_id": each.trial_id,
                "arm": each.arm,
                "seed": each.seed,
                "protocol": protocol,
                "problem_id": problem["problem_id"],
                "sample_index": sample,
                "question": problem["question"],
                "reference_answer": problem["reference_answer"],
                "model": location.for_engine(each.adapter)[1] if each.adapter else self._model,
                "tokenized_prompt": prompt,
                "answer_seed": _answer_seed(seed, each, problem["problem_id"], sample),
            }
            for each in self._contestants
            for problem, prompt in zip(problems, tokens, strict=True)
            for sample in range(self._evaluation.samples)
            if (each.problem_ids is None or problem["problem_id"] in each.problem_ids)
            and (prediction_id := _prediction_id(each, problem["problem_id"], sample)) not in self._done
        ]
        return pa.Table.from_pylist(rows, schema=_QUESTION)


# What of an answer is known before it is given.
ASKED = ("prediction_id", "trial_id", "arm", "seed", "protocol", "problem_id", "sample_index", "question")
ASKED += ("reference_answer",)
_QUESTION = pa.schema(
    [
        *(records.PREDICTION.field(name) for name in ASKED),
        # Which adapter answers; the base model's own name stands for none.
        pa.field("model", pa.string()),
        pa.field("tokenized_prompt", pa.list_(pa.int32())),
        pa.field("answer_seed", pa.int64()),
    ]
)


def _answer_seed(seed: int, contestant: Contestant, problem_id: str, sample: int) -> int:
    # Of no key: another version of a key must not draw other answers.
    drawn = f"{seed}/{contestant.arm}/{contestant.seed}/{problem_id}/{sample}"
    # 28 bits: small enough for whatever takes it as an integer on the way to the engine.
    return int(storage.digest(drawn)[:7], 16)


def finish_reason(tokens: Sequence[int], ends: set[int], error: str) -> str:
    """How an answer ended: `stop` by itself, `length` where it was cut, or `error`."""
    if error:
        return "error"
    # Whatever does not end in an end token was cut: at `max_tokens`, or where the engine's context ended.
    return "stop" if len(tokens) and int(tokens[-1]) in ends else "length"


class Score:
    """Scores answers, writes them, and passes on the counts."""

    def __init__(self, folder: Path, ends: set[int], evaluation: Evaluate) -> None:
        self._folder, self._ends = folder, ends
        self._stop = protocols.stop_strings(evaluation)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        table = pa.Table.from_pylist([self._score(row) for row in rows], schema=records.PREDICTION)
        storage.write_part(self._folder, table)
        return {"rows": [len(rows)], "tokens": [sum(table["num_tokens"].to_pylist())]}

    def _score(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text, error = row["generated_text"], row[compat.INFERENCE_ERROR]
        tokens = row["generated_tokens"]
        ended = finish_reason(tokens, self._ends, error)
        if at := next((each for each in self._stop if text.endswith(each)), None):
            text, ended = text.removesuffix(at), "stop"
        strict, flexible = answers.strict_match(text), answers.flexible_extract(text)
        return {
            **{name: row[name] for name in ASKED},
            "seed": int(row["seed"]),
            "sample_index": int(row["sample_index"]),
            "completion": text,
            "num_tokens": len(tokens),
            "finish_reason": ended,
            "answer_strict": strict,
            "answer_flexible": flexible,
            "is_correct_strict": answers.is_correct(strict, row["reference_answer"]),
            "is_correct_flexible": answers.is_correct(flexible, row["reference_answer"]),
            "error": error,
        }
