"""One side of the training benchmark, in a separate process: `python training_side.py FOLDER SIDE`.

Prints one line of JSON: target tokens per second, milliseconds per step, peak memory of the process, the time of the
matrix products alone as a percentage of the measured time, and the losses.
The sides are raykd's loop on `hard` targets, on `top_k` targets, and on hard targets `padded` to the longest row; TRL's
SFTTrainer without (`trl`) and with packing (`trl_packed`); one and two Ray Train workers with a core each.
All use the same rows in the same order and the same initial LoRA weights.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import limits
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.models import loading
from raykd.training import examples, loop, schedule, student
from raykd.training.trainer import train_trial, worker_env
from raykd.training.trial import TrialSpec
from raykd.training.trial_record import read_loss_curve

# Untimed first steps, which include lazy loading.
WARM = 3
PACKED_LENGTH = 1024


def main() -> None:
    folder, side = Path(sys.argv[1]), sys.argv[2]
    # Libraries print to standard output too: they get standard error instead.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    experiment = load_experiment(folder / "experiment.yaml", [])
    trial = trial_spec(experiment, folder, side)
    if side.startswith("trl"):
        points = _trl(trial, side == "trl_packed")
    else:
        points = _workers(trial) if "worker" in side else _ours(trial)
    peak, total = bench.peak_mb(), points[-1]["target_tokens"]
    points = points[WARM:]
    tokens = points[-1]["target_tokens"] - points[0]["target_tokens"]
    seconds = points[-1]["seconds"] - points[0]["seconds"]
    steps = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(points)]
    figures = {
        "tokens/s": tokens / seconds,
        "step, ms": 1000 * statistics.median(steps),
        "peak MB": peak,
        "losses": [point["loss"] for point in points],
    }
    # Workers run in other processes, with other cores than those on which the limit is measured.
    if "worker" not in side:
        figures["of the limit, %"] = 100 * tokens / total * _minimum_seconds(trial) / seconds
    print(json.dumps(figures), file=output, flush=True)


def trial_spec(experiment: Experiment, folder: Path, side: str) -> TrialSpec:
    """Return a trial of the arm of that name; TRL's sides use the arm with hard targets."""
    name = side if side in experiment.arms else "hard"
    (problems,) = (folder / "problems").glob("*/")
    return TrialSpec(
        trial_id=side,
        arm_name=name,
        arm=experiment.arm(name),
        seed=0,
        overrides={},
        problems=problems,
        completions=folder / "completions",
        same_tokens=True,
        experiment=experiment.name,
        folder=folder / "trials" / f"{side}-{time.time_ns()}",
        config_id=name,
    )


def _minimum_seconds(trial: TrialSpec) -> float:
    """Return the seconds of all steps if they consisted of large matrix products only."""
    import torch

    _, rows = _rows(trial)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return limits.count_operations(student.build_student(trial.arm, trial.seed), rows) / limits.product_rate(device)


def _ours(trial: TrialSpec) -> Sequence[Mapping[str, Any]]:
    import torch

    # The environment that torchrun or Ray Train would set.
    os.environ |= worker_env("gpu" if torch.cuda.is_available() else "cpu")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Record the loss of every step.
    loop.CURVE_POINTS = 1 << 30
    loop.train_loop(trial, lambda metrics, checkpoint: None, None)
    return read_loss_curve(trial.folder / "metrics.jsonl")


def _workers(trial: TrialSpec) -> Sequence[Mapping[str, Any]]:
    """Train under Ray Train. The peak memory is the driver's."""
    import ray

    ray.init(address="local", num_cpus=trial.arm.train.num_workers, include_dashboard=False, log_to_driver=False)
    train_trial(trial, "cpu", [], trial.folder / "checkpoints")
    ray.shutdown()
    return read_loss_curve(trial.folder / "metrics.jsonl")


def _trl(trial: TrialSpec, packing: bool) -> Sequence[Mapping[str, Any]]:
    """Train with TRL on the same model, rows and order."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    train, points = trial.arm.train, []
    tokenizer, rows = _rows(trial)

    class RecordSteps(TrainerCallback):
        """Record the time and loss of each step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                points.append({"seconds": time.monotonic(), "target_tokens": 0, "loss": logs["loss"]})

    class OrderedTrainer(SFTTrainer):
        """Use the rows in their order, which is that of raykd's loop."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    model = student.add_lora(
        loading.load_base_model(trial.arm.student, getattr(torch, train.dtype)), trial.arm.student, trial.seed
    )
    trainer = OrderedTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(_examples(rows))),
        args=SFTConfig(
            output_dir=str(trial.folder),
            # A packed row has about as many tokens as a batch of unpacked rows.
            per_device_train_batch_size=1 if packing else train.batch_size,
            num_train_epochs=1,
            learning_rate=train.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(train.warmup_fraction * len(rows) // train.batch_size),
            max_grad_norm=train.max_grad_norm,
            weight_decay=train.weight_decay,
            bf16=False,
            max_length=PACKED_LENGTH if packing else train.max_length,
            completion_only_loss=True,
            packing=packing,
            gradient_checkpointing=train.gradient_checkpointing,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        callbacks=[RecordSteps()],
    )
    counted = _count_targets(trainer)
    trainer.train()
    for point, tokens in zip(points, counted, strict=False):
        point["target_tokens"] = tokens
    return points


def _rows(trial: TrialSpec) -> tuple[Any, list[examples.Example]]:
    """Return the tokenizer, and the rows of all steps in the order of raykd's loop."""
    from raykd.models import loading

    tokenizer, arm = loading.load_tokenizer(trial.arm.student), trial.arm
    rows, _ = examples.build_examples(arm, trial.problems, trial.completions, tokenizer, trial.same_tokens)
    order = schedule.training_order(len(rows), arm.train.batch_size, arm.train.epochs, trial.seed)
    return tokenizer, [rows[number] for _, batch in order for number in batch]


def _examples(rows: list[examples.Example]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "input_ids": [*row.prompt_token_ids, *row.completion_token_ids],
            "completion_mask": [0] * len(row.prompt_token_ids) + [1] * len(row.completion_token_ids),
        }


def _count_targets(trainer: Any) -> list[int]:
    """Return a list that grows by the cumulative number of target tokens at each step."""
    counted: list[int] = []
    inner = trainer.compute_loss

    def counting(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        counted.append((counted[-1] if counted else 0) + int((inputs["labels"][:, 1:] != -100).sum()))
        return inner(model, inputs, *more, **named)

    trainer.compute_loss = counting
    return counted


if __name__ == "__main__":
    main()
