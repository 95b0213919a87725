"""Student: base model with LoRA, tokenizer, rows and batches, and the adapter on disk.

B rows of a micro-batch, T positions, N target tokens, D width, V vocabulary, K top-k.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from raykd import location, losses, models, packed, prompts, records, storage
from raykd.config import Arm
from raykd.demo import resolve_model
from raykd.faults import StageError, UserError
from raykd.sections import Student
from raykd.selection import select
from raykd.targets import Target, soft_targets

# Logits that exist at a time, over all target tokens: a quarter of a GiB in float32.
CHUNK_ELEMENTS = 1 << 26
_SOFT = ("topk_ids", "topk_logprobs")


def load_base(student: Student, dtype: torch.dtype) -> Any:
    """The frozen base model."""
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(student.model),
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        # Never by pickle, which can hold code.
        use_safetensors=True,
        dtype=dtype,
    )


def add_lora(model: Any, student: Student, seed: int) -> PeftModel:
    """Wraps a base model in LoRA layers, in float32 and initialised from `seed`.

    Raises:
        UserError: where a target module is not in the model.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(student.lora.target_modules) - names
    if unknown:
        raise UserError(f"student.lora.target_modules: {sorted(unknown)} not in the model; it has {sorted(names)}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=student.lora.rank,
        # peft types alpha as an integer, and only divides by it.
        lora_alpha=student.lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=student.lora.dropout,
        target_modules=list(student.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def learner(arm: Arm, seed: int) -> "Distillation":
    """A base model with LoRA, ready to be trained.

    Args:
        arm: how.
        seed: of the LoRA layers.
    """
    return wrap(load_base(arm.student, getattr(torch, arm.train.dtype)), arm, seed)


def wrap(base: Any, arm: Arm, seed: int) -> "Distillation":
    """As `learner`, around a base model that is there."""
    if arm.train.packing:
        packed.use(base)
    if arm.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    learner = Distillation(add_lora(base, arm.student, seed), arm)
    # Models are loaded for inference, and then neither checkpoint activations nor drop out.
    learner.train()
    return learner


def training_rows(
    arm: Arm,
    problems: Path,
    completions: Path | None,
    tokenizer: Any,
    same_as_teacher: bool,
    wanted: frozenset[str] | None = None,
) -> tuple[list[Target], dict[str, int]]:
    """The rows that an arm trains on, in the order of the problems and their samples, and what was dropped and why.

    Args:
        arm: the arm.
        problems: the folder of the splits; only `train` is read.
        completions: the folder of the completions; None where targets are the reference solutions.
        tokenizer: the student's.
        same_as_teacher: whether the teacher's token ids are the student's.
        wanted: ids of the problems whose rows are wanted; None for all.
    """
    dropped: Counter[str] = Counter()
    by_problem = _by_problem(arm, completions) if completions else {}
    targets = []
    for problem in storage.read_table(problems / "train.parquet").to_pylist():
        if wanted is not None and problem["problem_id"] not in wanted:
            continue
        if completions is None:
            found = [reference_target(problem, tokenizer, arm.prompt.instruction)]
        else:
            prompt = models.prompt_token_ids(tokenizer, prompts.student_messages(problem, arm.prompt.instruction))
            kept, reasons = select(by_problem.get(problem["problem_id"], []), arm.targets)
            dropped += reasons
            found = [_target(arm, prompt, row, tokenizer, same_as_teacher) for row in kept]
        fitting = [target for target in found if len(target) <= arm.train.max_length]
        dropped["too_long"] += len(found) - len(fitting)
        targets += fitting
    return targets, {reason: count for reason, count in dropped.items() if count}


def reference_target(problem: Mapping[str, Any], tokenizer: Any, instruction: str) -> Target:
    """The tokens of a problem's reference solution as targets.

    Args:
        problem: a row of `records.PROBLEM`.
        tokenizer: the student's.
        instruction: what is said about the form of the answer.
    """
    prompt = models.prompt_token_ids(tokenizer, prompts.student_messages(problem, instruction))
    tokens = models.answer_token_ids(tokenizer, problem["reference_solution"], is_whole=True)
    return Target(problem["problem_id"], prompt, tokens)


def _by_problem(arm: Arm, completions: Path) -> dict[str, list[dict[str, Any]]]:
    columns = ["problem_id", "completion_id", "sample_index", "completion", "completion_token_ids", "finish_reason"]
    columns += ["is_correct", "error"]
    soft = _SOFT if arm.targets.kind == "top_k" else ()
    found: dict[str, list[dict[str, Any]]] = {}
    for part in storage.stream_rows(completions, records.COMPLETION, [*columns, *soft]):
        # As Python's objects log-probabilities take ten times the room; only those of chosen rows become some.
        arrays = {name: part[name].combine_chunks() for name in soft}
        for number, row in enumerate(part.select(columns).to_pylist()):
            row |= {name: array[number].values for name, array in arrays.items()}
            found.setdefault(row["problem_id"], []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row["sample_index"])
    return found


def _target(arm: Arm, prompt: list[int], completion: Mapping[str, Any], tokenizer: Any, same: bool) -> Target:
    problem_id, tokens = completion["problem_id"], completion["completion_token_ids"]
    if arm.targets.kind == "top_k":
        whole = {**completion, **{name: completion[name].to_pylist() for name in _SOFT}}
        return Target(problem_id, prompt, tokens, *soft_targets(whole, arm.targets.top_k, len(tokenizer)))
    if not same:
        is_whole = completion["finish_reason"] == "stop"
        tokens = models.answer_token_ids(tokenizer, completion["completion"], is_whole)
    return Target(problem_id, prompt, tokens)


def collate(rows: list[Target], pad_token_id: int, packing: bool) -> dict[str, Tensor]:
    """A micro-batch: rows beneath each other, padded on the right, or one behind the other in a single sequence.

    Returns:
        `input_ids` (B, T), with `attention_mask` (B, T) or, when packed, `position_ids` (1, T), which begin anew with
        each row, and `row_starts` (B + 1) int32; `positions` (N): where in the flattened B x T the logits that predict
        target tokens are; `token_ids` (N); for soft targets `topk_ids`, `topk_logprobs` (N, K).
    """
    # A worker whose share of the last step is empty runs a row without targets, to keep pace with the others.
    sequences = [row.prompt_token_ids + row.completion_token_ids for row in rows] or [[pad_token_id]]
    lengths = [len(sequence) for sequence in sequences]
    if packing:
        batch = {
            "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        batch["row_starts"] = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        longest = max(lengths)
        padded = [sequence + [pad_token_id] * (longest - len(sequence)) for sequence in sequences]
        mask = [[1] * length + [0] * (longest - length) for length in lengths]
        batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        starts = np.arange(len(sequences)) * longest
    empty = torch.zeros(0, dtype=torch.long)
    first = [int(start) + len(row.prompt_token_ids) - 1 for start, row in zip(starts, rows, strict=False)]
    spans = [torch.arange(at, at + len(row.completion_token_ids)) for at, row in zip(first, rows, strict=True)]
    batch["positions"] = torch.cat([empty, *spans])
    batch["token_ids"] = torch.tensor([token for row in rows for token in row.completion_token_ids], dtype=torch.long)
    if rows and rows[0].topk_ids_TK is not None:
        batch["topk_ids"] = torch.from_numpy(np.concatenate([row.topk_ids_TK for row in rows]))  # type: ignore[arg-type]
        batch["topk_logprobs"] = torch.from_numpy(np.concatenate([row.topk_logprobs_TK for row in rows]))  # type: ignore[arg-type]
    return batch


class Distillation(nn.Module):
    """A student whose forward pass is the sum of its losses over a micro-batch.

    Of the logits only those that predict target tokens are made, and no more than `chunk_elements` of them at a time.
    At its peak, whatever the batch, the loss needs as much as 3 float32 copies of a chunk where there is but one, and
    4.6 where the logits of several are made again in the backward pass: 1.2 GiB by default.

    Args:
        model: the student.
        arm: what it is trained toward.
        chunk_elements: target tokens times vocabulary in a chunk; `CHUNK_ELEMENTS` where not given.
    """

    def __init__(self, model: PeftModel, arm: Arm, chunk_elements: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._arm = arm
        self._chunk_elements = chunk_elements or CHUNK_ELEMENTS

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch from `collate`, in nats."""
        base: Any = self.model.get_base_model()
        inputs: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        if "row_starts" in batch:
            inputs |= packed.arguments(batch["row_starts"])
        hidden_BTD = base.model(**inputs, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch["positions"]]
        size = max(1, self._chunk_elements // base.config.get_text_config().vocab_size)
        count = self._num_chunks(-(-len(hidden_ND) // size))
        if not count:
            return hidden_BTD.sum() * 0.0
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for number in range(count):
            # Past the end a chunk is empty, and worth nothing.
            chunk = slice(number * size, (number + 1) * size)
            part = {key: batch[key][chunk] for key in ("token_ids", "topk_ids", "topk_logprobs") if key in batch}
            if count > 1:
                # The logits of a chunk are made again in the backward pass rather than kept for all chunks.
                total = total + checkpoint(self._chunk_loss, hidden_ND[chunk], part, use_reentrant=False)
            else:
                total = total + self._chunk_loss(hidden_ND[chunk], part)
        return total

    def _num_chunks(self, own: int) -> int:
        """How many chunks this worker makes that needs `own`.

        Under ZeRO stage 3 the output layer lies in parts with all workers, who gather it together for every chunk:
        each must make as many as the one that needs most.
        """
        base: Any = self.model.get_base_model()
        if not hasattr(base.lm_head.weight, "ds_id"):
            return own
        count = torch.tensor(own, device=next(self.parameters()).device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return int(count)

    def _chunk_loss(self, hidden_ND: Tensor, part: dict[str, Tensor]) -> Tensor:
        base: Any = self.model.get_base_model()
        logits_NV = base.lm_head(hidden_ND)
        if "topk_ids" not in part:
            return losses.cross_entropy(logits_NV, part["token_ids"])
        loss, soft = self._arm.loss, (part["topk_ids"], part["topk_logprobs"])
        total = logits_NV.new_zeros((), dtype=torch.float32)
        if loss.cross_entropy_weight < 1:
            distance = losses.divergence(self._arm.divergence, logits_NV, *soft, loss.tail, loss.temperature)
            total = total + (1 - loss.cross_entropy_weight) * distance
        if loss.cross_entropy_weight > 0:
            total = total + loss.cross_entropy_weight * losses.cross_entropy(logits_NV, part["token_ids"])
        return total


def save_adapter(model: PeftModel, folder: Path, student: Student, write: bool, moved: bool = True) -> None:
    """Saves the adapter in peft's format, whole or not at all, and checks what was saved.

    Every worker calls it, since under ZeRO stage 3 each holds only a part of the weights.

    Args:
        model: the student.
        folder: where the adapter goes.
        student: for the name of the base model in the adapter's configuration.
        write: whether this worker writes.
        moved: whether a step was taken, so that the weights must have moved.

    Raises:
        StageError: where the saved weights are empty or should have moved from their initial values and have not.
    """
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sharded = [parameter for parameter in trainable if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        if not write:
            return
        weights = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
            for name, tensor in get_peft_model_state_dict(model).items()
        }
    with location.written_folder(folder) as temporary:
        _write(model, weights, temporary, student, moved)


def _write(model: PeftModel, weights: dict[str, Tensor], temporary: Path, student: Student, moved: bool) -> None:
    model.peft_config["default"].base_model_name_or_path = student.model
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(str(temporary))
    safetensors.torch.save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = safetensors.torch.load_file(temporary / "adapter_model.safetensors")
    stayed = not any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    if (moved and stayed) or any(not tensor.numel() or not tensor.isfinite().all() for tensor in saved.values()):
        raise StageError(f"{temporary}: the adapter as saved is empty, untrained or not finite")
