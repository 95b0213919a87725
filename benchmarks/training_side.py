"""One side of the training benchmark, in a process of its own: `python training_side.py FOLDER SIDE`.

Prints one line of JSON: target tokens per second, milliseconds a step, the process' peak memory, what share of the time
the matrix products alone would take on this machine, the losses.
The sides: raykd's loop on `hard` and on `top_k` targets, and on hard ones `padded` to the longest; TRL's SFTTrainer as
it is (`trl`) and with packing (`trl_packed`); `one_worker` and `two_workers` of Ray Train, with a core each. All take
the same rows in the same order from the same initial LoRA weights.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import limits

from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.models import loading
from raykd.training import examples, loop, schedule, student
from raykd.training.trainer import train_trial, worker_env
from raykd.training.trial import TrialSpec, read_loss_curve

# Steps before these figures begin: the first ones pay for what is loaded late.
WARM = 3
PACKED_LENGTH = 1024


def main() -> None:
    folder, side = Path(sys.argv[1]), sys.argv[2]
    # What libraries print must not come between.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    experiment = load_experiment(folder / "experiment.yaml", [])
    made = job(experiment, folder, side)
    if side.startswith("trl"):
        points = _trl(made, side == "trl_packed")
    else:
        points = _workers(made) if "worker" in side else _ours(made)
    peak, whole = bench.peak_mb(), points[-1]["target_tokens"]
    points = points[WARM:]
    tokens = points[-1]["target_tokens"] - points[0]["target_tokens"]
    seconds = points[-1]["seconds"] - points[0]["seconds"]
    steps = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(points)]
    figures = {
        "tokens/s": tokens / seconds,
        "step, ms": 1000 * statistics.median(steps),
        "peak MB": peak,
        # The limit is measured on all cores of this process.
        **({} if "worker" in side else {"of the limit, %": 100 * tokens / whole * _at_best(made) / seconds}),
        "losses": [point["loss"] for point in points],
    }
    print(json.dumps(figures), file=answer, flush=True)


def job(experiment: Experiment, folder: Path, side: str) -> TrialSpec:
    """The trial: the experiment's arm of that name, TRL's being the one on hard targets."""
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


def _at_best(made: TrialSpec) -> float:
    """Seconds that all steps together would take were they nothing but matrix products, at the rate of large ones."""
    import torch

    _, rows = _rows(made)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return limits.count_operations(student.build_student(made.arm, made.seed), rows) / limits.product_rate(device)


def _ours(made: TrialSpec) -> list[dict[str, Any]]:
    import torch

    # As torchrun would, and Ray Train's workers have it.
    os.environ |= worker_env("gpu" if torch.cuda.is_available() else "cpu")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # A point for each step.
    loop.CURVE_POINTS = 1 << 30
    loop.train_loop(made, lambda metrics, checkpoint: None, None)
    return read_loss_curve(made.folder / "metrics.jsonl")


def _workers(made: TrialSpec) -> list[dict[str, Any]]:
    """As `raykd train` does it. The peak memory is the driver's."""
    import ray

    ray.init(address="local", num_cpus=made.arm.train.num_workers, include_dashboard=False, log_to_driver=False)
    train_trial(made, "cpu", [], made.folder / "checkpoints")
    ray.shutdown()
    return read_loss_curve(made.folder / "metrics.jsonl")


def _trl(made: TrialSpec, packing: bool) -> list[dict[str, Any]]:
    """TRL's trainer on the same model, rows and order."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    told, points = made.arm.train, []
    tokenizer, rows = _rows(made)

    class Notes(TrainerCallback):
        """When each step ended."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                points.append({"seconds": time.monotonic(), "target_tokens": 0, "loss": logs["loss"]})

    class InOrder(SFTTrainer):
        """Takes the rows as they come, for they were shuffled as ours are."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    model = student.add_lora(
        loading.load_base_model(made.arm.student, getattr(torch, told.dtype)), made.arm.student, made.seed
    )
    trainer = InOrder(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(_examples(rows))),
        args=SFTConfig(
            output_dir=str(made.folder),
            # As many tokens a step as unpacked, about.
            per_device_train_batch_size=1 if packing else told.batch_size,
            num_train_epochs=1,
            learning_rate=told.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(told.warmup_fraction * len(rows) // told.batch_size),
            max_grad_norm=told.max_grad_norm,
            weight_decay=told.weight_decay,
            bf16=False,
            max_length=PACKED_LENGTH if packing else told.max_length,
            completion_only_loss=True,
            packing=packing,
            gradient_checkpointing=told.gradient_checkpointing,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        callbacks=[Notes()],
    )
    counted = _count_targets(trainer)
    trainer.train()
    for point, tokens in zip(points, counted, strict=False):
        point["target_tokens"] = tokens
    return points


def _rows(made: TrialSpec) -> tuple[Any, list[examples.Example]]:
    """The tokenizer, and the rows of all steps in our order."""
    from raykd.models import loading

    tokenizer, arm = loading.load_tokenizer(made.arm.student), made.arm
    rows, _ = examples.build_examples(arm, made.problems, made.completions, tokenizer, made.same_tokens)
    order = schedule.training_order(len(rows), arm.train.batch_size, arm.train.epochs, made.seed)
    return tokenizer, [rows[number] for _, batch in order for number in batch]


def _examples(rows: list[examples.Example]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {
            "input_ids": [*row.prompt_token_ids, *row.completion_token_ids],
            "completion_mask": [0] * len(row.prompt_token_ids) + [1] * len(row.completion_token_ids),
        }


def _count_targets(trainer: Any) -> list[int]:
    """A list that fills with the number of targets up to the end of each step."""
    counted: list[int] = []
    inner = trainer.compute_loss

    def counting(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        counted.append((counted[-1] if counted else 0) + int((inputs["labels"][:, 1:] != -100).sum()))
        return inner(model, inputs, *more, **named)

    trainer.compute_loss = counting
    return counted


if __name__ == "__main__":
    main()
