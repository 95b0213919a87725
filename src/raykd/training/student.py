"""The student: base model with LoRA, its loss over a micro-batch, and its adapter on disk.

B rows of a micro-batch, T positions, N target tokens, D width, V vocabulary, K top-k.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raykd import compat
from raykd.config.experiment import Arm
from raykd.config.training import Student
from raykd.errors import StageError, UserError
from raykd.models.adapters import WEIGHTS_FILE
from raykd.models.loading import load_base_model
from raykd.storage import filesystem
from raykd.training import losses
from raykd.training.packing import enable_packing, packed_inputs

# Logits of a chunk, target tokens times vocabulary: a quarter of a GiB in float32.
CHUNK_ELEMENTS = 1 << 26


def add_lora(model: Any, student: Student, seed: int) -> PeftModel:
    """Return a base model with LoRA layers, which are in float32 and initialized from `seed`.

    Raises:
        UserError: the model has no module of a name in `student.lora.target_modules`.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(student.lora.target_modules) - names
    if unknown:
        raise UserError(f"student.lora.target_modules: the model has no {sorted(unknown)}; choose from {sorted(names)}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=student.lora.r,
        # peft annotates alpha as an integer, but also divides floats by the rank.
        lora_alpha=student.lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=student.lora.lora_dropout,
        target_modules=list(student.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def build_student(arm: Arm, seed: int) -> "Distillation":
    """Load the base model of an arm and return it with LoRA and its loss, in training mode.

    Args:
        arm: the arm.
        seed: for the initial LoRA weights.
    """
    return wrap_student(load_base_model(arm.student, getattr(torch, arm.train.dtype)), arm, seed)


def wrap_student(base: Any, arm: Arm, seed: int) -> "Distillation":
    """Return a loaded base model with LoRA and its loss, in training mode.

    Args:
        base: the base model; packing and activation checkpointing are enabled on it as the arm says.
        arm: the arm.
        seed: for the initial LoRA weights.
    """
    if arm.train.packing:
        enable_packing(base)
    if arm.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    distillation = Distillation(add_lora(base, arm.student, seed), arm)
    # transformers loads models in evaluation mode, in which they neither checkpoint activations nor apply dropout.
    distillation.train()
    return distillation


class Distillation(nn.Module):
    """A student whose forward pass returns the summed loss of a micro-batch.

    Only logits that predict target tokens are computed, at most `chunk_elements` at a time. The peak memory of the loss
    does not depend on the batch: 3 float32 copies of a chunk if there is one chunk; 4.6 copies if there are several,
    whose logits are recomputed in the backward pass. By default that is 1.2 GiB.

    Args:
        model: the student.
        arm: the arm, for its loss and kind of targets.
        chunk_elements: target tokens times vocabulary in a chunk; None for `CHUNK_ELEMENTS`.
    """

    def __init__(self, model: PeftModel, arm: Arm, chunk_elements: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._arm = arm
        self._chunk_elements = chunk_elements or CHUNK_ELEMENTS

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed loss of a micro-batch from `collate`, in nats: a float32 scalar."""
        base: Any = self.model.get_base_model()
        inputs: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        if "row_starts" in batch:
            inputs |= packed_inputs(batch["row_starts"])
        hidden_BTD = base.model(**inputs, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch["positions"]]
        chunk_size = max(1, self._chunk_elements // base.config.get_text_config().vocab_size)
        num_chunks = self._num_chunks(-(-len(hidden_ND) // chunk_size))
        if not num_chunks:
            # A worker without rows still takes part in the backward pass.
            return hidden_BTD.sum() * 0.0
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for number in range(num_chunks):
            # Beyond this worker's own chunks the slice is empty, and its loss is 0.
            chunk = slice(number * chunk_size, (number + 1) * chunk_size)
            targets = {key: batch[key][chunk] for key in ("token_ids", "topk_ids", "topk_logprobs") if key in batch}
            if num_chunks > 1:
                # Recomputes the logits of a chunk in the backward pass, instead of keeping those of all chunks.
                total = total + checkpoint(self._chunk_loss, hidden_ND[chunk], targets, use_reentrant=False)
            else:
                total = total + self._chunk_loss(hidden_ND[chunk], targets)
        return total

    def _num_chunks(self, num_own: int) -> int:
        """Return the number of chunks to compute, given the number that this worker needs.

        Under ZeRO stage 3 the output layer is sharded, and all workers gather it together for every chunk. Each must
        therefore compute as many chunks as the worker that needs most.
        """
        base: Any = self.model.get_base_model()
        if not compat.is_sharded(base.lm_head.weight):
            return num_own
        count = torch.tensor(num_own, device=next(self.parameters()).device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return int(count)

    def _chunk_loss(self, hidden_ND: Tensor, targets: dict[str, Tensor]) -> Tensor:
        base: Any = self.model.get_base_model()
        logits_NV = base.lm_head(hidden_ND)
        if "topk_ids" not in targets:
            return losses.cross_entropy(logits_NV, targets["token_ids"])
        loss = self._arm.loss
        total = logits_NV.new_zeros((), dtype=torch.float32)
        if loss.cross_entropy_weight < 1:
            divergence = losses.divergence(
                self._arm.divergence,
                logits_NV,
                topk_ids_NK=targets["topk_ids"],
                topk_logprobs_NK=targets["topk_logprobs"],
                missing_mass=loss.missing_mass,
                temperature=loss.temperature,
            )
            total = total + (1 - loss.cross_entropy_weight) * divergence
        if loss.cross_entropy_weight > 0:
            total = total + loss.cross_entropy_weight * losses.cross_entropy(logits_NV, targets["token_ids"])
        return total


def save_adapter(model: PeftModel, folder: Path, student: Student, write: bool, is_trained: bool = True) -> None:
    """Save the adapter in peft's format, atomically, and check the saved weights.

    All workers must call it: under ZeRO stage 3 each has only a shard of the weights.

    Args:
        model: the student.
        folder: the output folder.
        student: the section `student`, for the name of the base model in the adapter's configuration.
        write: whether this worker writes.
        is_trained: whether an optimizer step was taken, so that the weights must differ from their initial values.

    Raises:
        StageError: the saved weights are empty, not finite, or unchanged although `is_trained`.
    """
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sharded = [parameter for parameter in trainable if compat.is_sharded(parameter)]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        if not write:
            return
        weights = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().clone()
            for name, tensor in get_peft_model_state_dict(model).items()
        }
    with filesystem.atomic_write_dir(folder) as temporary:
        _write_adapter(model, weights, temporary, student, is_trained)


def _write_adapter(
    model: PeftModel, weights: dict[str, Tensor], temporary: Path, student: Student, is_trained: bool
) -> None:
    model.peft_config["default"].base_model_name_or_path = student.model
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(str(temporary))
    safetensors.torch.save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    saved = safetensors.torch.load_file(temporary / WEIGHTS_FILE)
    # peft initializes every lora_B to 0.
    is_unchanged = not any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    is_invalid = any(not tensor.numel() or not tensor.isfinite().all() for tensor in saved.values())
    if is_invalid or (is_trained and is_unchanged):
        raise StageError(f"{temporary}: the saved adapter is empty, unchanged by training, or not finite")
