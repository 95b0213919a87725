"""Batch inference of students: the base model and all adapters in one vLLM engine."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import safetensors.numpy
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from raykd.cluster import engine, resources
from raykd.cluster.data_stage import map_with_actors
from raykd.config.experiment import BASE
from raykd.config.sections import Evaluate
from raykd.config.training import Student
from raykd.data import prompts
from raykd.errors import as_user_error
from raykd.models import tokenization
from raykd.models.adapters import CONFIG_FILE, WEIGHTS_FILE, padded_rank
from raykd.models.builtin import resolve_model
from raykd.models.loading import load_tokenizer
from raykd.storage import filesystem, hashing, row_store, schemas


@dataclasses.dataclass(frozen=True)
class StudentModel:
    """A student to evaluate: the base model, or an adapter of it."""

    trial_id: str
    arm: str
    seed: int
    adapter: Path | None
    """Folder of the adapter, in peft's format; None for the base student."""
    rank: int = 0
    """Rank of the adapter; 0 for the base student."""
    digest: str = ""
    """Digest of the adapter after training; empty for the base student."""
    problem_ids: frozenset[str] | None = None
    """Ids of the problems that the student answers; None for all."""


BASE_STUDENT = StudentModel(BASE, BASE, 0, None)


def digests(eval_models: Iterable[StudentModel]) -> dict[str, str]:
    """Return the digests of the students' adapters by trial id."""
    return {model.trial_id: model.digest for model in eval_models}


def discard_outdated(folder: Path, schema: pa.Schema, eval_models: Iterable[StudentModel]) -> None:
    """Remove the rows of a student that another adapter of the same trial gave: it was trained again.

    Args:
        folder: a row store with the columns `trial_id` and `adapter_digest`.
        schema: the schema of its rows.
        eval_models: the students as they are now; rows of other students are kept.
    """
    current = digests(eval_models)

    def is_current(rows: pa.Table) -> list[bool]:
        pairs = zip(rows["trial_id"].to_pylist(), rows["adapter_digest"].to_pylist(), strict=True)
        return [current.get(trial_id, digest) == digest for trial_id, digest in pairs]

    row_store.retain(folder, schema, ["trial_id", "adapter_digest"], is_current)


def student_answers(
    split: Path,
    eval_models: list[StudentModel],
    done: set[str],
    *,
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    accelerator: resources.Accelerator,
) -> ray.data.Dataset:
    """Return the dataset of all students' answers to the problems of a split, from one engine. Nothing runs yet.

    The seed of a sampled answer depends on the sampling seed, the student, the problem and the sample number only,
    so that it is the same whatever else the engine answers.

    Args:
        split: the Parquet file of the problems.
        eval_models: the students; either all have an adapter or none has one.
        done: ids of answers that exist and are skipped.
        student: the base model.
        evaluation: protocol, sampling and engine.
        instruction: the sentence about the answer's form, as in training.
        accelerator: the device of the engine.
    """
    path, system = filesystem.for_arrow(split)
    questions = map_with_actors(
        ray.data.read_parquet(path, filesystem=system),
        BuildEvalPrompts,
        {
            "eval_models": eval_models,
            "student": student,
            "evaluation": evaluation,
            "instruction": instruction,
            "done": done,
        },
        batch_size=256,
        batch_format="pyarrow",
    ).repartition(target_num_rows_per_block=evaluation.batch_size)
    return _processor(eval_models, student, evaluation, accelerator)(questions)


def with_null_adapter(eval_models: list[StudentModel], folder: Path) -> list[StudentModel]:
    """Return the students, with an adapter of zeros for the base student if any other has an adapter.

    vLLM marks a row without an adapter by the index -1. Its CPU kernels take that for the last adapter
    (`vllm.lora.ops.torch_ops`): in one batch with adapters, the base student would answer as one of them.

    Args:
        eval_models: the students.
        folder: where the adapter of zeros is written.
    """
    adapted = next((model for model in eval_models if model.adapter), None)
    if adapted is None or adapted.adapter is None:
        return eval_models
    with filesystem.local_copy(adapted.adapter / WEIGHTS_FILE) as file:
        weights = safetensors.numpy.load_file(file)
    # LoRA adds B @ A: zeros in B suffice.
    null_weights = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}
    with filesystem.atomic_write_dir(folder) as local:
        safetensors.numpy.save_file(null_weights, local / WEIGHTS_FILE, metadata={"format": "pt"})
        (local / CONFIG_FILE).write_bytes(filesystem.read_bytes(adapted.adapter / CONFIG_FILE))
    null_student = dataclasses.replace(BASE_STUDENT, adapter=folder, rank=adapted.rank)
    return [null_student if model == BASE_STUDENT else model for model in eval_models]


def prediction_id(eval_model: StudentModel, problem_id: str, sample: int) -> str:
    """Return the id of an answer."""
    return f"{eval_model.trial_id}/{problem_id}" + (f"/{sample}" if sample else "")


def _processor(
    eval_models: list[StudentModel], student: Student, evaluation: Evaluate, accelerator: resources.Accelerator
) -> Any:
    """Return Ray Data's vLLM stage, which selects the adapter by row."""
    kwargs, env = engine.engine_settings(evaluation.engine, accelerator)
    adapted = [model for model in eval_models if model.adapter is not None]
    lora_path = None
    if adapted:
        kwargs |= {
            "enable_lora": True,
            "max_loras": min(evaluation.max_loras, len(adapted)),
            # vLLM accepts adapters of a lower rank than the one it allocates for.
            "max_lora_rank": padded_rank(max(model.rank for model in adapted)),
        }
        # Set for a bucket only, from which Ray copies an adapter to the engine's node.
        lora_path = next(filesystem.for_engine(model.adapter)[0] for model in adapted if model.adapter)
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
            dynamic_lora_loading_path=lora_path,
            should_continue_on_error=True,
            # Prompts are tokenized already, and the engine detokenizes answers.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            placement_group_config={"bundles": resources.engine_bundles(evaluation.engine, accelerator)},
            log_engine_metrics=not kwargs.get("disable_log_stats", False),
        )
    return build_processor(
        config,
        preprocess=lambda row: {**row, "sampling_params": sampling_params(evaluation, int(row["answer_seed"]))},
    )


def sampling_params(evaluation: Evaluate, seed: int) -> dict[str, Any]:
    """Return vLLM's sampling parameters of one answer.

    Args:
        evaluation: sampling, and the stop strings or the protocol that defines them.
        seed: of the answer; left out for greedy answers.
    """
    sampling, stop = evaluation.sampling, prompts.stop_strings(evaluation)
    params = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "top_p": sampling.top_p}
    if sampling.temperature:
        params["seed"] = seed
    if stop:
        # The stop string stays in the text, as the only sign that the answer ended there; `ScoreAnswers` removes it.
        params |= {"stop": stop, "include_stop_str_in_output": True}
    return params


class BuildEvalPrompts:
    """Stage that turns problems into one prompt row for each student and sample, without those answered before.

    Args:
        eval_models: the students.
        student: the base model.
        evaluation: protocol, sampling and number of samples.
        instruction: the sentence about the answer's form.
        done: ids of answers that exist.
    """

    def __init__(
        self, eval_models: list[StudentModel], student: Student, evaluation: Evaluate, instruction: str, done: set[str]
    ) -> None:
        self._tokenizer = load_tokenizer(student)
        self._eval_models, self._base_model = eval_models, resolve_model(student.model)
        self._evaluation, self._instruction, self._done = evaluation, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        problems = batch.to_pylist()
        protocol = self._evaluation.protocol
        prompts_by_problem = [
            tokenization.question_token_ids(self._tokenizer, problem, self._instruction, protocol)
            for problem in problems
        ]
        # Ordered by student: the engine then rarely changes adapters, and the rows that are written together are of
        # one student.
        rows = [
            self._row(model, problem, prompt, sample)
            for model in self._eval_models
            for problem, prompt in zip(problems, prompts_by_problem, strict=True)
            for sample in range(self._evaluation.num_samples)
            if (model.problem_ids is None or problem["problem_id"] in model.problem_ids)
            and prediction_id(model, problem["problem_id"], sample) not in self._done
        ]
        return pa.Table.from_pylist(rows, schema=_PROMPT_SCHEMA)

    def _row(self, model: StudentModel, problem: dict[str, Any], prompt: list[int], sample: int) -> dict[str, Any]:
        problem_id, seed = problem["problem_id"], self._evaluation.sampling.seed
        return {
            "prediction_id": prediction_id(model, problem_id, sample),
            "trial_id": model.trial_id,
            "arm": model.arm,
            "seed": model.seed,
            "adapter_digest": model.digest,
            "protocol": self._evaluation.protocol,
            "problem_id": problem_id,
            "sample_index": sample,
            "question": problem["question"],
            "reference_answer": problem["reference_answer"],
            "model": filesystem.for_engine(model.adapter)[1] if model.adapter else self._base_model,
            "tokenized_prompt": prompt,
            "answer_seed": _answer_seed(seed, model, problem_id, sample),
        }


# The columns of a prediction that are known before the engine answers.
PROMPT_COLUMNS = ("prediction_id", "trial_id", "arm", "seed", "adapter_digest", "protocol", "problem_id")
PROMPT_COLUMNS += ("sample_index", "question", "reference_answer")
_PROMPT_SCHEMA = pa.schema(
    [
        *(schemas.PREDICTION.field(name) for name in PROMPT_COLUMNS),
        # The adapter; the base model's own name for none.
        pa.field("model", pa.string()),
        pa.field("tokenized_prompt", pa.list_(pa.int32())),
        pa.field("answer_seed", pa.int64()),
    ]
)


def _answer_seed(seed: int, eval_model: StudentModel, problem_id: str, sample: int) -> int:
    # The trial id is left out: it holds a content key, and a new version of the key must not change the answers.
    text = f"{seed}/{eval_model.arm}/{eval_model.seed}/{problem_id}/{sample}"
    # 28 bits fit a signed 32-bit integer, the narrowest type on the way to the engine.
    return int(hashing.text_digest(text)[:7], 16)


def finish_reason(tokens: Sequence[int], end_token_ids: set[int], error: str) -> str:
    """Return why an answer ended: `stop` at an end token, `length` if it was truncated, or `error`."""
    if error:
        return "error"
    # Without an end token it was truncated: at `max_tokens`, or at the engine's context length.
    if len(tokens) and int(tokens[-1]) in end_token_ids:
        return "stop"
    return "length"
