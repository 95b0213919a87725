"""Batch inference of students: the base model and all adapters in one vLLM engine."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import safetensors.numpy
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from raykd.cluster import engine, resources
from raykd.config.experiment import BASE
from raykd.config.sections import Evaluate, Student
from raykd.data import prompts
from raykd.errors import as_user_error
from raykd.models import tokenization
from raykd.models.adapters import padded_rank
from raykd.models.builtin import resolve_model
from raykd.models.loading import load_tokenizer
from raykd.storage import filesystem, hashing, schemas


@dataclasses.dataclass(frozen=True)
class StudentModel:
    """A student that answers the test problems."""

    trial_id: str
    arm: str
    seed: int
    adapter: Path | None
    """Folder of the adapter, in peft's format; None for the base student."""
    rank: int = 0
    """Rank of the adapter; 0 for the base student."""
    problem_ids: frozenset[str] | None = None
    """The problems that it answers; None for all."""


BASE_STUDENT = StudentModel(BASE, BASE, 0, None)


def student_answers(
    split: Path,
    eval_models: list[StudentModel],
    done: set[str],
    student: Student,
    evaluation: Evaluate,
    instruction: str,
    kind: resources.Accelerator,
) -> ray.data.Dataset:
    """The stream of all eval_models' answers to a split's problems, from one engine.

    Args:
        split: the Parquet file of the problems.
        eval_models: who answers what; either all have an adapter or none has.
        done: ids of answers that are there.
        student: the base model.
        evaluation: how they are asked; where it is random, the seed of an answer is that of sampling, eval_model,
            problem and sample, whatever else is asked beside it.
        instruction: what is said about the form of the answer, as in training.
        kind: what the engine runs on.
    """
    path, system = filesystem.for_arrow(split)
    questions = ray.data.read_parquet(path, filesystem=system).map_batches(
        BuildEvalPrompts,
        batch_size=256,
        batch_format="pyarrow",
        fn_constructor_kwargs={
            "eval_models": eval_models,
            "student": student,
            "evaluation": evaluation,
            "instruction": instruction,
            "done": done,
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    questions = questions.repartition(target_num_rows_per_block=evaluation.batch_size)
    return _processor(eval_models, student, evaluation, kind)(questions)


def with_null_adapter(eval_models: list[StudentModel], folder: Path) -> list[StudentModel]:
    """Gives the base student an adapter that adds nothing, where others in the same engine have one.

    vLLM marks a row without an adapter by the index -1, which its kernels for the CPU take for the last adapter:
    in one batch with others, the base student would answer as one of them (`vllm.lora.ops.torch_ops`).
    """
    adapted = next((each for each in eval_models if each.adapter), None)
    if adapted is None or adapted.adapter is None:
        return eval_models
    with filesystem.local_copy(adapted.adapter / "adapter_model.safetensors") as file:
        weights = safetensors.numpy.load_file(file)
    nothing = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}
    with filesystem.atomic_write_dir(folder) as local:
        safetensors.numpy.save_file(nothing, local / "adapter_model.safetensors", metadata={"format": "pt"})
        (local / "adapter_config.json").write_bytes(filesystem.read_bytes(adapted.adapter / "adapter_config.json"))
    null = dataclasses.replace(BASE_STUDENT, adapter=folder, rank=adapted.rank)
    return [null if each == BASE_STUDENT else each for each in eval_models]


def prediction_id(eval_model: StudentModel, problem_id: str, sample: int) -> str:
    """The name of an answer."""
    return f"{eval_model.trial_id}/{problem_id}" + (f"/{sample}" if sample else "")


def _processor(
    eval_models: list[StudentModel], student: Student, evaluation: Evaluate, kind: resources.Accelerator
) -> Any:
    """Ray Data's vLLM stage, with an adapter for each row."""
    kwargs, env = engine.engine_settings(evaluation.engine, kind)
    adapters = [each for each in eval_models if each.adapter is not None]
    if adapters:
        kwargs |= {
            "enable_lora": True,
            "max_loras": min(evaluation.max_loras, len(adapters)),
            # An adapter may be smaller than the one it is told.
            "max_lora_rank": padded_rank(max(each.rank for each in adapters)),
        }
    # Of a bucket Ray copies an adapter to the engine's node.
    loading = next((filesystem.for_engine(each.adapter)[0] for each in adapters if each.adapter), None)
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
            placement_group_config={"bundles": resources.engine_bundles(evaluation.engine, kind)},
            log_engine_metrics=not kwargs.get("disable_log_stats", False),
        )
    return build_processor(
        config,
        preprocess=lambda row: {**row, "sampling_params": sampling_params(evaluation, int(row["answer_seed"]))},
    )


def sampling_params(evaluation: Evaluate, seed: int) -> dict[str, Any]:
    """vLLM's sampling parameters."""
    sampling, stop = evaluation.sampling, prompts.stop_strings(evaluation)
    params = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "top_p": sampling.top_p}
    if sampling.temperature:
        params["seed"] = seed
    if stop:
        # Kept at first: whether an answer ended there is told by its end.
        params |= {"stop": stop, "include_stop_str_in_output": True}
    return params


class BuildEvalPrompts:
    """Turns problems into a row for each eval_model and sample, leaving out what was answered before."""

    def __init__(
        self, eval_models: list[StudentModel], student: Student, evaluation: Evaluate, instruction: str, done: set[str]
    ) -> None:
        self._tokenizer = load_tokenizer(student)
        self._contestants, self._model = eval_models, resolve_model(student.model)
        self._evaluation, self._instruction, self._done = evaluation, instruction, done

    def __call__(self, batch: pa.Table) -> pa.Table:
        problems = batch.to_pylist()
        protocol, seed = self._evaluation.protocol, self._evaluation.sampling.seed
        tokens = [
            tokenization.question_token_ids(self._tokenizer, each, self._instruction, protocol) for each in problems
        ]
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
                "model": filesystem.for_engine(each.adapter)[1] if each.adapter else self._model,
                "tokenized_prompt": prompt,
                "answer_seed": _answer_seed(seed, each, problem["problem_id"], sample),
            }
            for each in self._contestants
            for problem, prompt in zip(problems, tokens, strict=True)
            for sample in range(self._evaluation.num_samples)
            if (each.problem_ids is None or problem["problem_id"] in each.problem_ids)
            and (prediction_id := prediction_id(each, problem["problem_id"], sample)) not in self._done
        ]
        return pa.Table.from_pylist(rows, schema=_PROMPT_SCHEMA)


# What of an answer is known before it is given.
PROMPT_COLUMNS = ("prediction_id", "trial_id", "arm", "seed", "protocol", "problem_id", "sample_index", "question")
PROMPT_COLUMNS += ("reference_answer",)
_PROMPT_SCHEMA = pa.schema(
    [
        *(schemas.PREDICTION.field(name) for name in PROMPT_COLUMNS),
        # Which adapter answers; the base model's own name stands for none.
        pa.field("model", pa.string()),
        pa.field("tokenized_prompt", pa.list_(pa.int32())),
        pa.field("answer_seed", pa.int64()),
    ]
)


def _answer_seed(seed: int, eval_model: StudentModel, problem_id: str, sample: int) -> int:
    # Of no key: another version of a key must not draw other answers.
    drawn = f"{seed}/{eval_model.arm}/{eval_model.seed}/{problem_id}/{sample}"
    # 28 bits: small enough for whatever takes it as an integer on the way to the engine.
    return int(hashing.text_digest(drawn)[:7], 16)


def finish_reason(tokens: Sequence[int], ends: set[int], error: str) -> str:
    """How an answer ended: `stop` by itself, `length` where it was cut, or `error`."""
    if error:
        return "error"
    # Whatever does not end in an end token was cut: at `max_tokens`, or where the engine's context ended.
    return "stop" if len(tokens) and int(tokens[-1]) in ends else "length"
