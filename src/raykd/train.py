"""Train: the loop that makes an adapter, under DeepSpeed ZeRO, on its own or as Ray Train workers.

What a step computes depends on the rows, the seed and the step alone: the loss is a sum over target tokens,
divided once by their number in the whole step, so worker count, micro-batches and ZeRO stage change nothing
but rounding.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd import placement, storage
from raykd.config import Arm
from raykd.sections import Train

Report = Callable[[dict[str, Any], Path | None], None]
# About how many points a loss curve has, and how many times a trial tells Ray how far it is: a report waits for
# Ray Train's controller to look, which it does now and then only.
CURVE_POINTS = 60
REPORTS = 20
CONTROLLER_LOOKS_EVERY_S = 0.25


@dataclass(frozen=True)
class Job:
    """One trial: all that a training worker needs."""

    trial_id: str
    arm_name: str
    arm: Arm
    seed: int
    overrides: dict[str, Any]
    problems: Path
    completions: Path | None
    """Folder of the teacher's completions; None where targets are the reference solutions."""
    same_tokens: bool
    """Whether the teacher's token ids mean the same to the student."""
    folder: Path
    """The trial's folder."""


def deepspeed_config(train: Train, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a trial (https://www.deepspeed.ai/docs/config-json/).

    Args:
        train: the configuration's section.
        micro_batch_size: completions in one worker's forward pass.
    """
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // train.num_workers // micro_batch_size,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        # Gradients of many micro-batches are summed in float32, whatever the weights are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": train.zero_stage},
        # LoRA's few weights need no fused kernel, and PyTorch's runs on every device.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.learning_rate, "weight_decay": train.weight_decay, "torch_adam": True},
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def loop(job: Job, report: Report, resume: Path | None) -> None:
    """Trains one worker's share of a trial, from the start or from a checkpoint, and saves the adapter.

    Runs wherever the process group of `torch.distributed` can be had: under Ray Train, `torchrun`, or alone.

    Args:
        job: the trial.
        report: called by every worker with the metrics so far and, now and then, a checkpoint's folder.
        resume: folder of the checkpoint to go on from.

    Raises:
        ValueError: where no row is left to train on.
    """
    import deepspeed
    import torch
    import torch.distributed
    from transformers import get_cosine_schedule_with_warmup
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from raykd import models, student, targets

    train = job.arm.train
    micro = student.micro_batch_size(train)
    config = deepspeed_config(train, micro)
    # Must exist before the model is loaded: under ZeRO stage 3 each worker then loads its own part only.
    zero3_marker = HfDeepSpeedConfig(config)
    deepspeed.init_distributed()
    tokenizer = models.load_tokenizer(job.arm.student.model, job.arm.student.revision)
    rows, dropped = student.training_rows(job.arm, job.problems, job.completions, tokenizer, job.same_tokens)
    if not rows:
        raise ValueError(f"trial {job.trial_id}: no row is left to train on; dropped: {dropped}")
    steps = list(targets.batches(len(rows), train.batch_size, train.epochs, job.seed))
    base = student.load_base(job.arm.student, getattr(torch, train.dtype))
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = student.Distillation(student.add_lora(base, job.arm.student, job.seed), job.arm)
    # DeepSpeed's annotations name the types that it documents for other arguments.
    initialize: Any = deepspeed.initialize
    engine, _, _, _ = initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=config,
        lr_scheduler=lambda optimizer: get_cosine_schedule_with_warmup(
            optimizer, round(train.warmup_fraction * len(steps)), len(steps)
        ),
    )
    del zero3_marker
    worker, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first, seconds_before = 0, 0.0
    if resume is not None:
        _, state = engine.load_checkpoint(
            str(resume), tag="checkpoint", load_module_strict=False, load_module_only=False
        )
        first, seconds_before = state["step"], state["seconds"]
    curve = _Curve(job.folder / "metrics.jsonl", first, write=worker == 0)
    every, told_every, told = max(1, len(steps) // CURVE_POINTS), max(1, len(steps) // REPORTS), first
    tokens_before = sum(len(rows[row].completion_token_ids) for _, batch in steps[:first] for row in batch)
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    started, tokens = time.monotonic(), tokens_before
    for step in range(first, len(steps)):
        epoch, batch = steps[step]
        count = sum(len(rows[row].completion_token_ids) for row in batch)
        # Dropout repeats itself when a step is done again after a failure.
        torch.manual_seed((job.seed << 40) + (step << 16) + worker)
        for part in targets.share(batch, worker, num_workers, train.batch_size // num_workers, micro):
            inputs = student.collate([rows[row] for row in part], tokenizer.pad_token_id or 0, train.packing)
            loss_sum = engine({key: tensor.to(engine.device) for key, tensor in inputs.items()})
            # DeepSpeed averages over workers and accumulation steps; this turns its mean into the sum over
            # all of the step's tokens, divided by their number.
            scale = num_workers * config["gradient_accumulation_steps"] / count
            engine.backward(loss_sum * scale)
            engine.step()
            totals[0] += loss_sum.detach().double()
        totals[1] += count
        tokens += count
        done = step + 1
        if done % every == 0 or done == len(steps) or done % train.checkpoint_every_steps == 0:
            torch.distributed.all_reduce(totals[:1])
            metrics = {
                "step": done,
                "epoch": epoch,
                "loss": float(totals[0] / totals[1]),
                "learning_rate": engine.get_lr()[0],
                "target_tokens": tokens,
                "seconds": round(seconds_before + time.monotonic() - started, 3),
                "steps": len(steps),
            }
            totals.zero_()
            curve.add(metrics)
            if done % train.checkpoint_every_steps == 0 and done < len(steps):
                _checkpoint(engine, metrics, report)
            elif done // told_every > told // told_every or done == len(steps):
                report(metrics, None)
            else:
                continue
            told = done
    student.save_adapter(model.model, job.folder / "adapter", job.arm.student, write=worker == 0)
    if worker == 0:
        _finish(job, curve.points, len(rows), dropped)
    torch.distributed.barrier()


def _checkpoint(engine: Any, metrics: dict[str, Any], report: Report) -> None:
    """Saves every worker's part of the optimizer and the adapter, and hands it to `report`."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(
            folder,
            tag="checkpoint",
            client_state={"step": metrics["step"], "seconds": metrics["seconds"]},
            exclude_frozen_parameters=True,
        )
        report(metrics, Path(folder))


class _Curve:
    """The loss curve on disk, without the points that a resumed run makes again."""

    def __init__(self, path: Path, first: int, write: bool) -> None:
        self._path, self._write = path, write
        lines = path.read_text().splitlines() if path.exists() else []
        self.points = [point for line in lines if (point := json.loads(line))["step"] <= first]

    def add(self, point: dict[str, Any]) -> None:
        self.points.append(point)
        if self._write:
            storage.write_text(self._path, "".join(json.dumps(each) + "\n" for each in self.points))


def _finish(job: Job, curve: list[dict[str, Any]], rows: int, dropped: dict[str, int]) -> None:
    """Declares the trial complete."""
    last = curve[-1]
    storage.write_json(
        job.folder / "trial.json",
        {
            **describe(job),
            "status": "complete",
            "error": "",
            "rows": rows,
            "dropped": dropped,
            "steps": last["step"],
            "target_tokens": last["target_tokens"],
            "seconds": last["seconds"],
            "loss_first": curve[0]["loss"],
            "loss_last": last["loss"],
            "adapter": str(job.folder / "adapter"),
        },
    )


def describe(job: Job) -> dict[str, Any]:
    """What a trial is, for its `trial.json`."""
    return {
        "trial_id": job.trial_id,
        "arm": job.arm_name,
        "seed": job.seed,
        "overrides": job.overrides,
        "strategy": job.arm.prompt.strategy if job.completions else "",
    }


def fit(job: Job, kind: placement.Accelerator, callbacks: list[Any], storage_path: Path) -> None:
    """Runs a trial's workers under Ray Train, from their last checkpoint where there is one.

    Args:
        job: the trial.
        kind: what its workers run on.
        callbacks: Ray Train callbacks, such as the one that reports to Ray Tune.
        storage_path: where Ray Train keeps checkpoints, below the trial's id.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = kind == "gpu"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(CONTROLLER_LOOKS_EVERY_S))
    TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend=None if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.arm.train.num_workers,
            use_gpu=gpu,
            resources_per_worker=placement.worker_resources(kind),
        ),
        run_config=RunConfig(
            name=job.trial_id,
            storage_path=str(storage_path),
            failure_config=FailureConfig(max_failures=job.arm.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": {} if gpu else {"DS_ACCELERATOR": "cpu"}},
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    # DeepSpeed reads its ranks here; Ray Train knows them.
    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        loop(config["job"], report, None)
    else:
        with checkpoint.as_directory() as folder:
            loop(config["job"], report, Path(folder))
