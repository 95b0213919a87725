"""Student: base model with LoRA, tokenizer, rows and batches, and the adapter on disk.

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

from raykd.config.experiment import Arm
from raykd.config.sections import Student
from raykd.errors import StageError, UserError
from raykd.models.loading import load_base_model
from raykd.storage import filesystem
from raykd.training import losses
from raykd.training.packing import enable_packing, packed_inputs

# Logits that exist at a time, over all target tokens: a quarter of a GiB in float32.
CHUNK_ELEMENTS = 1 << 26


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
        r=student.lora.r,
        # peft types alpha as an integer, and only divides by it.
        lora_alpha=student.lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=student.lora.lora_dropout,
        target_modules=list(student.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def build_student(arm: Arm, seed: int) -> "Distillation":
    """A base model with LoRA, ready to be trained.

    Args:
        arm: how.
        seed: of the LoRA layers.
    """
    return wrap_student(load_base_model(arm.student, getattr(torch, arm.train.dtype)), arm, seed)


def wrap_student(base: Any, arm: Arm, seed: int) -> "Distillation":
    """As `learner`, around a base model that is there."""
    if arm.train.packing:
        enable_packing(base)
    if arm.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    learner = Distillation(add_lora(base, arm.student, seed), arm)
    # Models are loaded for inference, and then neither checkpoint activations nor drop out.
    learner.train()
    return learner


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
            inputs |= packed_inputs(batch["row_starts"])
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
            distance = losses.divergence(self._arm.divergence, logits_NV, *soft, loss.missing_mass, loss.temperature)
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
    with filesystem.atomic_write_dir(folder) as temporary:
        _write_adapter(model, weights, temporary, student, moved)


def _write_adapter(
    model: PeftModel, weights: dict[str, Tensor], temporary: Path, student: Student, moved: bool
) -> None:
    model.peft_config["default"].base_model_name_or_path = student.model
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(str(temporary))
    safetensors.torch.save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = safetensors.torch.load_file(temporary / "adapter_model.safetensors")
    stayed = not any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    if (moved and stayed) or any(not tensor.numel() or not tensor.isfinite().all() for tensor in saved.values()):
        raise StageError(f"{temporary}: the adapter as saved is empty, untrained or not finite")
