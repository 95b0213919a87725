"""Train: the loop that makes an adapter, under DeepSpeed ZeRO, on its own or as Ray Train workers.

What a step computes depends on the rows, the seed and the step alone: the loss is a sum over target tokens,
divided once by their number in the whole step, so worker count, micro-batches and ZeRO stage change nothing
but rounding.
"""

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd import compat
from raykd.config.sections import Train
from raykd.errors import StageError, UserError
from raykd.runtime.metrics import show_training
from raykd.storage import files
from raykd.storage.paths import RoundPaths, TrialPaths
from raykd.storage.schemas import COMPLETE
from raykd.training import checkpoints, schedule
from raykd.training.examples import Example
from raykd.training.trial import TrialSpec, problem_ids, problem_ids_of_round, read_loss_curve, write_trial_status

Report = Callable[[dict[str, Any], Path | None], None]
# About how many points a loss curve has, and how many times a trial tells Ray how far it is: a report waits for
# Ray Train's controller to look, which it does now and then only.
CURVE_POINTS = 60
MAX_REPORTS = 20


def deepspeed_config(train: Train, num_workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a trial (https://www.deepspeed.ai/docs/config-json/).

    Args:
        train: the configuration's section.
        num_workers: how many workers there are: as many as were asked for, or those that are left.
    """
    rows = math.ceil(train.batch_size / num_workers)
    micro = min(train.micro_batch_size, rows)
    accumulation = math.ceil(rows / micro)
    return {
        # Where workers do not divide a step's rows, some of their last forward passes are short or empty.
        "train_batch_size": micro * accumulation * num_workers,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
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


def train_loop(job: TrialSpec, report: Report, resume: Path | None) -> None:
    """Trains one worker's share of a trial, from the start or from a checkpoint, and saves the adapter.

    Runs wherever the process group of `torch.distributed` can be had: under Ray Train, `torchrun`, or alone.

    Args:
        job: the trial.
        report: called by every worker with the metrics so far and, now and then, a checkpoint's folder.
        resume: folder of the checkpoint to go on from.

    Raises:
        UserError: where no row is left to train on.
    """
    import deepspeed
    import torch
    import torch.distributed
    from transformers import get_cosine_schedule_with_warmup
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from raykd.models import loading
    from raykd.training import batching
    from raykd.training.student import build_student, save_adapter
    from raykd.training.validation import validate, validation_steps

    train = job.arm.train
    deepspeed.init_distributed()
    worker, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = deepspeed_config(train, num_workers)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    # Must exist before the model is loaded: under ZeRO stage 3 each worker then loads its own part only.
    zero3_marker = HfDeepSpeedConfig(config)
    tokenizer = loading.load_tokenizer(job.arm.student)
    lesson = _load_training_data(job, tokenizer)
    steps, mine = lesson.steps, schedule.steps_of_round(len(lesson.steps), job.round or 0, job.rounds)
    model = build_student(job.arm, job.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The buffer in which gradients are gathered is as long as it is told, a gigabyte by default, whatever their number.
    config["zero_optimization"]["reduce_bucket_size"] = sum(map(compat.num_elements, trained))
    # DeepSpeed's annotations name the types that it documents for other arguments.
    initialize: Any = deepspeed.initialize
    engine, _, _, _ = initialize(
        model=model,
        model_parameters=trained,
        config=config,
        lr_scheduler=lambda optimizer: get_cosine_schedule_with_warmup(
            optimizer, round(train.warmup_fraction * len(steps)), len(steps)
        ),
    )
    del zero3_marker
    first, tokens, seconds_before = 0, 0, 0.0
    if resume is not None:
        _, state = engine.load_checkpoint(
            str(resume), tag="checkpoint", load_module_strict=False, load_module_only=False
        )
        first, tokens, seconds_before = state["step"], state["target_tokens"], state["seconds"]
    if first < mine.start:
        raise StageError(
            f"trial {job.trial_id}: the checkpoint of step {mine.start}, which round {job.round} begins with, is gone; "
            f"delete {job.folder} to train it anew"
        )
    curve = _LossCurve(TrialPaths(job.folder).metrics, first, write=worker == 0)
    every, told_every, told = max(1, len(steps) // CURVE_POINTS), max(1, len(steps) // MAX_REPORTS), first
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    marks = validation_steps(len(steps), job.sweep.num_validations) if job.sweep else {}
    last: dict[str, Any] = {}
    started, pace = time.monotonic(), _Throughput()
    for step in range(first, mine.stop):
        pace.begin()
        epoch, batch = steps[step]
        count = lesson.tokens(batch)
        # Dropout repeats itself when a step is done again after a failure.
        torch.manual_seed(((job.seed << 40) + (step << 16) + worker) % 2**63)
        shares = schedule.shard_micro_batches(batch, worker, num_workers, micro, accumulation)
        if not count:
            # Nothing to learn from: no step, for the optimizer's momentum alone would move the weights.
            engine.lr_scheduler.step()
            shares = []
        for part in shares:
            inputs = batching.collate(lesson.rows_of(part), tokenizer.pad_token_id or 0, train.packing)
            loss_sum = engine({key: tensor.to(engine.device) for key, tensor in inputs.items()})
            # DeepSpeed averages over workers and accumulation steps; this turns its mean into the sum over
            # all of the step's tokens, divided by their number.
            scale = num_workers * accumulation / count
            engine.backward(loss_sum * scale)
            engine.step()
            totals[0] += loss_sum.detach().double()
            pace.own += lesson.tokens(part)
        totals[1] += count
        tokens += count
        pace.tokens += count
        done = step + 1
        is_checkpoint = done < len(steps) and (done % train.checkpoint_every_steps == 0 or done == mine.stop)
        if done % every == 0 or done == mine.stop or is_checkpoint or done in marks:
            torch.distributed.all_reduce(totals[:1])
            loss = float(totals[0] / totals[1]) if totals[1] else None
            show_training(job.experiment, job.trial_id, worker, loss, *pace.end())
            measured = validate(engine, model.model, tokenizer, job, marks[done]) if done in marks else None
            metrics = {
                "step": done,
                "epoch": epoch,
                "loss": loss,
                "learning_rate": engine.get_lr()[0],
                "target_tokens": tokens,
                "seconds": round(seconds_before + time.monotonic() - started, 3),
                "steps": len(steps),
                "num_workers": num_workers,
                "accelerator": "gpu" if engine.device.type == "cuda" else engine.device.type,
                **({"validation": measured} if measured else {}),
            }
            totals.zero_()
            curve.add(metrics)
            if is_checkpoint:
                _save_checkpoint(engine, metrics, report)
            elif done == len(steps):
                # Not before the adapter is there: whoever is told may end the trial.
                last = metrics
            elif done in marks or done // told_every > told // told_every:
                report(metrics, None)
            else:
                continue
            told = done
    if not tokens and mine.stop == len(steps):
        raise UserError(f"trial {job.trial_id}: no round left a row to train on; in the last: {lesson.dropped}")
    save_adapter(model.model, TrialPaths(job.output_dir).adapter, job.arm.student, write=worker == 0, moved=tokens > 0)
    if worker == 0:
        _mark_complete(job, lesson)
    torch.distributed.barrier()
    if last:
        report(last, None)


@dataclass(frozen=True)
class _TrainingData:
    """The rows of a part of the training, and the order in which all of it goes through them."""

    rows: list[Example | None]
    """None for a problem that has no answer to learn from in this round."""
    dropped: dict[str, int]
    steps: list[tuple[int, list[int]]]

    def rows_of(self, numbers: list[int]) -> list[Example]:
        return [row for number in numbers if (row := self.rows[number]) is not None]

    def tokens(self, numbers: list[int]) -> int:
        return sum(len(row.completion_token_ids) for row in self.rows_of(numbers))


def _load_training_data(job: TrialSpec, tokenizer: Any) -> _TrainingData:
    from raykd.training import examples

    mine = None if job.round is None else problem_ids_of_round(job, job.round)
    found, dropped = examples.build_examples(job.arm, job.problems, job.completions, tokenizer, job.same_tokens, mine)
    # A round may bring nothing; the training as a whole may not.
    if not found and job.round is None:
        raise UserError(f"trial {job.trial_id}: no row is left to train on; dropped: {dropped}")
    rows: list[Example | None] = list(found)
    if job.round is not None:
        # The order is that of all problems, whichever of them are this round's.
        by_problem = {row.problem_id: row for row in found}
        rows = [by_problem.get(problem_id) for problem_id in problem_ids(job)]
    train = job.arm.train
    return _TrainingData(
        rows, dropped, list(schedule.training_order(len(rows), train.batch_size, train.epochs, job.seed))
    )


class _Throughput:
    """How fast it goes, from one look to the next, without what is done at a look."""

    def __init__(self) -> None:
        # Target tokens since the last look, of all workers and of this one.
        self.tokens, self.own = 0, 0
        self._since: float | None = None

    def begin(self) -> None:
        """A step begins."""
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> tuple[float, float]:
        """Target tokens per second of all workers, and of this one."""
        assert self._since is not None, "a step was begun"
        seconds = max(time.monotonic() - self._since, 1e-9)
        speeds = self.tokens / seconds, self.own / seconds
        self.tokens, self.own, self._since = 0, 0, None
        return speeds


def _save_checkpoint(engine: Any, metrics: dict[str, Any], report: Report) -> None:
    """Saves every worker's part of the optimizer and the adapter, and hands it to `report`."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(
            folder,
            tag="checkpoint",
            client_state={name: metrics[name] for name in ("step", "target_tokens", "seconds")},
            exclude_frozen_parameters=True,
        )
        checkpoints.write_checksums(Path(folder), engine.global_rank, engine.world_size)
        report(metrics, Path(folder))


class _LossCurve:
    """The loss curve on disk, without the points that a resumed run makes again."""

    def __init__(self, path: Path, first: int, write: bool) -> None:
        self._path, self._write = path, write
        self._points = [point for point in read_loss_curve(path) if point["step"] <= first]

    def add(self, point: dict[str, Any]) -> None:
        self._points.append(point)
        if self._write:
            files.write_text(self._path, "".join(json.dumps(each) + "\n" for each in self._points))


def _mark_complete(job: TrialSpec, lesson: _TrainingData) -> None:
    """Declares the trial, or its round, complete."""
    counts = {"rows": len(lesson.rows) - lesson.rows.count(None), "dropped": lesson.dropped}
    if job.output_dir != job.folder:
        files.write_json(RoundPaths(job.output_dir).record, counts)
        return
    for number in range(job.round or 0):
        earlier = files.read_json(RoundPaths(job.round_folder(number)).record)
        dropped = dict(Counter(counts["dropped"]) + Counter(earlier["dropped"]))
        counts = {"rows": counts["rows"] + earlier["rows"], "dropped": dropped}
    write_trial_status(job, COMPLETE, **counts)
