"""Student: base model with LoRA, tokenizer, rows and batches, and the adapter on disk.

B rows of a micro-batch, T positions, N target tokens, D width, V vocabulary, K top-k.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from raykd import losses, models, prompts, records, storage
from raykd.config import Arm, Loss, Student, Train
from raykd.demo import resolve_model
from raykd.targets import Target, soft_targets

# Target tokens whose logits exist at a time.
CHUNK_TOKENS = 4096


def load_base(student: Student, dtype: torch.dtype) -> Any:
    """The frozen base model."""
    return AutoModelForCausalLM.from_pretrained(resolve_model(student.model), revision=student.revision, dtype=dtype)


def add_lora(model: Any, student: Student, seed: int) -> PeftModel:
    """Wraps a base model in LoRA layers, in float32 and initialised from `seed`.

    Raises:
        ValueError: where a target module is not in the model.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(student.lora.target_modules) - names
    if unknown:
        raise ValueError(f"student.lora.target_modules: {sorted(unknown)} not in the model; it has {sorted(names)}")
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


def training_rows(
    arm: Arm, problems: Path, completions: Path | None, tokenizer: Any, same_as_teacher: bool
) -> tuple[list[Target], dict[str, int]]:
    """The rows that an arm trains on, in the order of the problems' ids, and what was dropped and why.

    Args:
        arm: the arm.
        problems: the folder of the splits; only `train` is read.
        completions: the folder of the teacher's completions; None where targets are the reference solutions.
        tokenizer: the student's.
        same_as_teacher: whether the teacher's token ids are the student's.
    """
    dropped: Counter[str] = Counter()
    by_problem = {}
    if completions is not None:
        rows = storage.open_rows(completions, records.COMPLETION)
        columns = ["problem_id", "completion_id", "completion", "completion_token_ids", "finish_reason"]
        columns += ["is_correct", "error"]
        if arm.targets.kind == "top_k":
            columns += ["topk_ids", "topk_logprobs"]
        for batch in rows.to_batches(columns=columns):
            by_problem |= {row["problem_id"]: row for row in batch.to_pylist()}
    targets = []
    for problem in pyarrow.parquet.read_table(problems / "train.parquet").to_pylist():
        completion = by_problem.get(problem["problem_id"])
        reason = _reason_to_drop(arm, completions is not None, completion)
        if not reason:
            target = _target(arm, problem, completion, tokenizer, same_as_teacher)
            if len(target) <= arm.train.max_length:
                targets.append(target)
                continue
            reason = "too_long"
        dropped[reason] += 1
    return targets, dict(dropped)


def _reason_to_drop(arm: Arm, from_teacher: bool, completion: dict[str, Any] | None) -> str:
    if not from_teacher:
        return ""
    if completion is None or completion["error"]:
        return "error"
    if arm.targets.keep == "correct" and not completion["is_correct"]:
        return "incorrect"
    if not completion["completion_token_ids"]:
        return "empty"
    return ""


def _target(arm: Arm, problem: dict[str, Any], completion: dict[str, Any] | None, tokenizer: Any, same: bool) -> Target:
    messages = prompts.student_messages(problem, arm.prompt.instruction)
    prompt_ids = models.prompt_token_ids(tokenizer, messages)
    if completion is not None and same:
        tokens = completion["completion_token_ids"]
        if arm.targets.kind == "top_k":
            soft = soft_targets(completion, arm.targets.top_k)
            return Target(problem["problem_id"], prompt_ids, tokens, *soft)
        return Target(problem["problem_id"], prompt_ids, tokens)
    text = problem["reference_solution"] if completion is None else completion["completion"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if completion is None or completion["finish_reason"] == "stop":
        # A turn that ended by itself; one that was cut at the limit must not teach to end there.
        tokens = [*tokens, tokenizer.eos_token_id]
    return Target(problem["problem_id"], prompt_ids, tokens)


def collate(rows: list[Target], pad_token_id: int) -> dict[str, Tensor]:
    """A micro-batch, padded on the right.

    Returns:
        `input_ids` and `attention_mask` (B, T); `positions` (N): where in the flattened B x T the logits that
        predict target tokens are; `token_ids` (N); for soft targets `topk_ids`, `topk_logprobs` (N, K).
    """
    # A worker whose share of the last step is empty runs a row without targets, to keep pace with the others.
    length = max((len(row) for row in rows), default=1)
    input_ids = torch.full((max(len(rows), 1), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    positions, token_ids = [], []
    for index, row in enumerate(rows):
        tokens = row.prompt_token_ids + row.completion_token_ids
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        attention_mask[index, : len(tokens)] = 1
        first = index * length + len(row.prompt_token_ids) - 1
        positions.append(torch.arange(first, first + len(row.completion_token_ids)))
        token_ids.append(torch.tensor(row.completion_token_ids))
    if not rows:
        attention_mask[:] = 1
    empty = torch.zeros(0, dtype=torch.long)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": torch.cat(positions) if rows else empty,
        "token_ids": torch.cat(token_ids) if rows else empty,
    }
    if rows and rows[0].topk_ids_TK is not None:
        batch["topk_ids"] = torch.from_numpy(np.concatenate([row.topk_ids_TK for row in rows]))  # type: ignore[arg-type]
        batch["topk_logprobs"] = torch.from_numpy(np.concatenate([row.topk_logprobs_TK for row in rows]))  # type: ignore[arg-type]
    return batch


class Distillation(nn.Module):
    """A student whose forward pass is the sum of its losses over a micro-batch."""

    def __init__(self, model: PeftModel, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch from `collate`, in nats."""
        base: Any = self.model.get_base_model()
        hidden_BTD = base.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch["positions"]]
        if not len(hidden_ND):
            return hidden_BTD.sum() * 0.0
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_ND), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            part = {key: batch[key][chunk] for key in ("token_ids", "topk_ids", "topk_logprobs") if key in batch}
            if len(hidden_ND) > CHUNK_TOKENS:
                # The logits of a chunk are made again in the backward pass rather than kept for all chunks.
                total = total + checkpoint(self._chunk_loss, hidden_ND[chunk], part, use_reentrant=False)
            else:
                total = total + self._chunk_loss(hidden_ND[chunk], part)
        return total

    def _chunk_loss(self, hidden_ND: Tensor, part: dict[str, Tensor]) -> Tensor:
        base: Any = self.model.get_base_model()
        logits_NV = base.lm_head(hidden_ND)
        if "topk_ids" not in part:
            return losses.cross_entropy(logits_NV, part["token_ids"])
        weight = self._loss.cross_entropy_weight
        total = (1 - weight) * losses.forward_kl(logits_NV, part["topk_ids"], part["topk_logprobs"])
        if weight:
            total = total + weight * losses.cross_entropy(logits_NV, part["token_ids"])
        return total


def save_adapter(model: PeftModel, folder: Path, student: Student, write: bool) -> None:
    """Saves the adapter in peft's format, whole or not at all, and checks what was saved.

    Every worker calls it, since under ZeRO stage 3 each holds only a part of the weights.

    Args:
        model: the student.
        folder: where the adapter goes.
        student: for the name of the base model in the adapter's configuration.
        write: whether this worker writes.

    Raises:
        RuntimeError: where the saved weights are empty or have not moved from their initial values.
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
    temporary = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.peft_config["default"].base_model_name_or_path = student.model
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(str(temporary))
    safetensors.torch.save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = safetensors.torch.load_file(temporary / "adapter_model.safetensors")
    moved = [name for name, tensor in saved.items() if "lora_B" in name and tensor.abs().sum() > 0]
    if not moved or any(not tensor.numel() or not tensor.isfinite().all() for tensor in saved.values()):
        raise RuntimeError(f"{temporary}: the adapter as saved is empty, untrained or not finite")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def micro_batch_size(train: Train) -> int:
    """Rows in one worker's forward pass: never more than its share of an optimizer step."""
    return min(train.micro_batch_size, train.batch_size // train.num_workers)
