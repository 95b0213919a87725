"""The DeepSpeed engine of a training worker: its configuration, its set-up and its checkpoints."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import get_cosine_schedule_with_warmup

from raykd import compat
from raykd.config.training import Train
from raykd.training import checkpoints
from raykd.training.student import Distillation, build_student
from raykd.training.trial import TrialSpec

_CHECKPOINT_TAG = "checkpoint"


def deepspeed_config(train: Train, num_workers: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a trial (https://www.deepspeed.ai/docs/config-json/).

    Args:
        train: the section `train`.
        num_workers: the current number of workers, which `train.min_workers` allows to be less than requested.
    """
    rows_per_worker = math.ceil(train.batch_size / num_workers)
    micro_batch_size = min(train.micro_batch_size, rows_per_worker)
    accumulation_steps = math.ceil(rows_per_worker / micro_batch_size)
    return {
        # If the workers do not divide a step's rows evenly, some of their last micro-batches are short or empty.
        "train_batch_size": micro_batch_size * accumulation_steps * num_workers,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        # Gradients of many micro-batches are summed in float32, whatever the dtype of the weights.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": train.zero_stage},
        # LoRA's few weights need no fused kernel, and PyTorch's optimizer runs on every device.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.learning_rate, "weight_decay": train.weight_decay, "torch_adam": True},
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def initialize_engine(trial: TrialSpec, config: dict[str, Any], num_steps: int) -> tuple[Any, Distillation]:
    """Return a DeepSpeed engine and the student that it trains.

    Args:
        trial: the trial.
        config: from `deepspeed_config`.
        num_steps: optimizer steps of the whole training, for the learning rate's schedule.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers reads this object while it loads a model: under ZeRO stage 3 each worker loads its own part only.
    zero3_marker = HfDeepSpeedConfig(config)
    student = build_student(trial.arm, trial.seed)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # DeepSpeed allocates the whole bucket in which gradients are reduced: a gigabyte by default.
    config["zero_optimization"]["reduce_bucket_size"] = sum(map(compat.num_elements, trained))
    # DeepSpeed's annotations give this argument the types of others.
    initialize: Any = deepspeed.initialize
    engine, _, _, _ = initialize(
        model=student,
        model_parameters=trained,
        config=config,
        lr_scheduler=lambda optimizer: get_cosine_schedule_with_warmup(
            optimizer, round(trial.arm.train.warmup_fraction * num_steps), num_steps
        ),
    )
    del zero3_marker
    return engine, student


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint of all workers into an engine.

    Args:
        engine: DeepSpeed's.
        folder: the checkpoint.

    Returns:
        The values saved with it: `step`, `target_tokens` and `seconds`.
    """
    _, state = engine.load_checkpoint(
        str(folder), tag=_CHECKPOINT_TAG, load_module_strict=False, load_module_only=False
    )
    return state


@contextmanager
def saved_checkpoint(engine: Any, state: dict[str, Any]) -> Iterator[Path]:
    """Save this worker's part of the optimizer and the adapter, and yield its temporary folder.

    Args:
        engine: DeepSpeed's.
        state: values to save with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=_CHECKPOINT_TAG, client_state=state, exclude_frozen_parameters=True)
        checkpoints.write_checksums(
            Path(folder), engine.global_rank, engine.world_size, engine.zero_optimization_stage()
        )
        yield Path(folder)
