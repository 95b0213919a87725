"""The training loop of one worker, under Ray Train, `torchrun` or alone.

A step depends on the rows, the seed and the step number only. The loss is a sum over target tokens, divided once by
their number in the whole step, so that worker count, micro-batches and ZeRO stage change nothing but rounding.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed

from raykd import compat
from raykd.errors import StageError
from raykd.models import loading
from raykd.models.adapters import adapter_digest
from raykd.runtime.metrics import show_training
from raykd.storage import files
from raykd.storage.paths import RoundPaths, TrialPaths
from raykd.storage.schemas import COMPLETE
from raykd.training import batching, schedule
from raykd.training.engine import deepspeed_config, initialize_engine, load_checkpoint, saved_checkpoint
from raykd.training.student import save_adapter
from raykd.training.training_data import TrainingData, load_training_data, no_examples
from raykd.training.trial import TrialSpec, write_trial_status
from raykd.training.trial_record import LossPoint, read_loss_curve, read_round_record
from raykd.training.validation import validate, validation_steps

Report = Callable[[dict[str, Any], Path | None], None]
# The approximate number of points of a loss curve, and the maximum number of reports to Ray Train without a
# checkpoint: each report blocks until Ray Train's controller polls its workers.
CURVE_POINTS = 60
MAX_REPORTS = 20


def train_loop(trial: TrialSpec, report: Report, checkpoint: Path | None) -> None:
    """Train one worker's share of a trial, or of its current round, and save the adapter.

    Args:
        trial: the trial.
        report: called by every worker with the metrics so far and, at some steps, the folder of a checkpoint.
        checkpoint: folder of the checkpoint to resume from; None to start at the first step.

    Raises:
        StageError: the checkpoint at the start of the round is missing.
        UserError: there is no example to train on.
    """
    import deepspeed

    compat.skip_shared_memory_collectives()
    deepspeed.init_distributed()
    run = _TrainingRun(trial, report)
    run.start(checkpoint)
    for step in run.remaining_steps():
        run.take_step(step)
        run.record(step + 1)
    run.save()


class _TrainingRun:
    """One worker's part of a trial: the engine, its data and its progress.

    All workers create it together and call its methods in the same order, since these communicate.
    """

    def __init__(self, trial: TrialSpec, report: Report) -> None:
        self._trial, self._report = trial, report
        self._worker, self._num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        config = deepspeed_config(trial.arm.train, self._num_workers)
        self._micro_batch_size = config["train_micro_batch_size_per_gpu"]
        self._accumulation_steps = config["gradient_accumulation_steps"]
        self._tokenizer = loading.load_tokenizer(trial.arm.student)
        self._data = load_training_data(trial, self._tokenizer)
        self._num_steps = len(self._data.steps)
        self._round_steps = schedule.steps_of_round(self._num_steps, trial.round or 0, trial.rounds)
        self._engine, self._student = initialize_engine(trial, config, self._num_steps)
        self._validations = validation_steps(self._num_steps, trial.sweep.num_validations) if trial.sweep else {}
        # Summed loss (nats) of this worker and target tokens of all workers, since the last point of the loss curve.
        self._loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        self._throughput = _Throughput()
        self._final_metrics: dict[str, Any] = {}
        self._first_step, self._target_tokens, self._seconds_before = 0, 0, 0.0

    def start(self, checkpoint: Path | None) -> None:
        """Load a checkpoint if there is one, and start the clock.

        Raises:
            StageError: the checkpoint at the start of the round is missing.
        """
        if checkpoint is not None:
            state = load_checkpoint(self._engine, checkpoint)
            self._first_step, self._target_tokens = state["step"], state["target_tokens"]
            self._seconds_before = state["seconds"]
        trial = self._trial
        if self._first_step < self._round_steps.start:
            raise StageError(
                f"trial {trial.trial_id}: the checkpoint of step {self._round_steps.start}, at which round "
                f"{trial.round} starts, is missing; delete {trial.folder} to train the trial again"
            )
        self._curve = _LossCurve(TrialPaths(trial.folder).metrics, self._first_step, write=self._worker == 0)
        self._last_reported, self._started = self._first_step, time.monotonic()

    def remaining_steps(self) -> range:
        """Return the optimizer steps to take, counted from 0."""
        return range(self._first_step, self._round_steps.stop)

    def take_step(self, step: int) -> None:
        """Train on this worker's share of an optimizer step."""
        self._throughput.begin_step()
        _, batch = self._data.steps[step]
        num_target_tokens = self._data.num_target_tokens(batch)
        # A step that is repeated after a failure has the same dropout masks.
        torch.manual_seed(((self._trial.seed << 40) + (step << 16) + self._worker) % 2**63)
        if num_target_tokens:
            for row_numbers in schedule.shard_micro_batches(
                batch, self._worker, self._num_workers, self._micro_batch_size, self._accumulation_steps
            ):
                self._backward(row_numbers, num_target_tokens)
        else:
            # No optimizer step: without a gradient, momentum alone would change the weights.
            self._engine.lr_scheduler.step()
        self._loss_and_tokens[1] += num_target_tokens
        self._target_tokens += num_target_tokens
        self._throughput.tokens += num_target_tokens

    def _backward(self, row_numbers: list[int], num_target_tokens: int) -> None:
        """Accumulate the gradients of a micro-batch; the last of a step updates the weights."""
        batch = batching.collate(
            self._data.examples(row_numbers), self._tokenizer.pad_token_id or 0, self._trial.arm.train.packing
        )
        loss_sum = self._engine({key: tensor.to(self._engine.device) for key, tensor in batch.items()})
        # DeepSpeed averages over workers and accumulation steps. The scale turns its mean into the sum over all of
        # the step's tokens, divided by their number.
        scale = self._num_workers * self._accumulation_steps / num_target_tokens
        self._engine.backward(loss_sum * scale)
        self._engine.step()
        self._loss_and_tokens[0] += loss_sum.detach().double()
        self._throughput.own_tokens += self._data.num_target_tokens(row_numbers)

    def record(self, steps_done: int) -> None:
        """Add a point to the loss curve, with a validation, a checkpoint or a report, if one is due."""
        is_checkpoint = self._is_checkpoint_due(steps_done)
        is_validation = steps_done in self._validations
        is_last_of_round = steps_done == self._round_steps.stop
        is_point = steps_done % max(1, self._num_steps // CURVE_POINTS) == 0
        if not (is_point or is_last_of_round or is_checkpoint or is_validation):
            return
        metrics = self._point(steps_done)
        self._curve.add(cast(LossPoint, metrics))
        if is_checkpoint:
            state = {name: metrics[name] for name in ("step", "target_tokens", "seconds")}
            with saved_checkpoint(self._engine, state) as folder:
                self._report(metrics, folder)
        elif steps_done == self._num_steps:
            # Reported after the adapter is saved, since Ray Tune may stop the trial at a report.
            self._final_metrics = metrics
        elif is_validation or self._is_report_due(steps_done):
            self._report(metrics, None)
        else:
            return
        self._last_reported = steps_done

    def _is_checkpoint_due(self, steps_done: int) -> bool:
        if steps_done == self._num_steps:
            return False
        every_steps = self._trial.arm.train.checkpoint_every_steps
        return steps_done % every_steps == 0 or steps_done == self._round_steps.stop

    def _is_report_due(self, steps_done: int) -> bool:
        every_steps = max(1, self._num_steps // MAX_REPORTS)
        return steps_done // every_steps > self._last_reported // every_steps

    def _point(self, steps_done: int) -> dict[str, Any]:
        """Return the metrics since the last point of the loss curve, validation included, and start the next."""
        torch.distributed.all_reduce(self._loss_and_tokens[:1])
        loss_sum, num_tokens = self._loss_and_tokens
        loss = float(loss_sum / num_tokens) if num_tokens else None
        trial = self._trial
        self._check_finite("loss", loss, steps_done)
        tokens_per_second, own_tokens_per_second = self._throughput.end()
        show_training(trial.experiment, trial.trial_id, self._worker, loss, tokens_per_second, own_tokens_per_second)
        validation = None
        if steps_done in self._validations:
            number = self._validations[steps_done]
            validation = validate(self._engine, self._student.model, self._tokenizer, trial, number)
            self._check_finite("validation loss", validation.get("loss"), steps_done)
        epoch, _ = self._data.steps[steps_done - 1]
        metrics = {
            "step": steps_done,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": self._engine.get_lr()[0],
            "target_tokens": self._target_tokens,
            "seconds": round(self._seconds_before + time.monotonic() - self._started, 3),
            "steps": self._num_steps,
            "num_workers": self._num_workers,
            "accelerator": "gpu" if self._engine.device.type == "cuda" else self._engine.device.type,
        }
        if validation is not None:
            metrics["validation"] = validation
        self._loss_and_tokens.zero_()
        return metrics

    def _check_finite(self, name: str, loss: float | None, steps_done: int) -> None:
        """Raise StageError for a loss that is not finite. All workers have the same loss."""
        if loss is None or math.isfinite(loss):
            return
        last = next((point for point in reversed(self._curve.points) if point["loss"] is not None), None)
        before = f"; the loss was {last['loss']:.4g} at step {last['step']}" if last else ""
        raise StageError(
            f"training diverged: the {name} is {loss} at step {steps_done} of {self._num_steps}{before}. Lower "
            "train.learning_rate, or raise train.warmup_fraction"
        )

    def save(self) -> None:
        """Save the adapter, mark the trial or its round as complete, and report the final metrics.

        Raises:
            UserError: no round had an example.
        """
        trial, student = self._trial, self._trial.arm.student
        if not self._target_tokens and self._round_steps.stop == self._num_steps:
            raise no_examples(trial, self._data.dropped)
        is_writer, is_trained = self._worker == 0, self._target_tokens > 0
        save_adapter(
            self._student.model, TrialPaths(trial.output_dir).adapter, student, write=is_writer, is_trained=is_trained
        )
        if is_writer:
            _mark_complete(trial, self._data)
        torch.distributed.barrier()
        if self._final_metrics:
            self._report(self._final_metrics, None)


class _Throughput:
    """Target tokens per second between two points of the loss curve, without the time that a point takes."""

    def __init__(self) -> None:
        # Target tokens since the last point, of all workers and of this worker.
        self.tokens, self.own_tokens = 0, 0
        self._started: float | None = None

    def begin_step(self) -> None:
        """Start the clock at the first step after a point."""
        if self._started is None:
            self._started = time.monotonic()

    def end(self) -> tuple[float, float]:
        """Return target tokens per second of all workers and of this worker, and reset both."""
        assert self._started is not None, "a step precedes every point"
        seconds = max(time.monotonic() - self._started, 1e-9)
        speeds = self.tokens / seconds, self.own_tokens / seconds
        self.tokens, self.own_tokens, self._started = 0, 0, None
        return speeds


class _LossCurve:
    """The loss curve on disk, without the points that a resumed run repeats."""

    def __init__(self, path: Path, first_step: int, write: bool) -> None:
        self._path, self._write = path, write
        self.points = [point for point in read_loss_curve(path) if point["step"] <= first_step]

    def add(self, point: LossPoint) -> None:
        self.points.append(point)
        if self._write:
            files.write_text(self._path, "".join(json.dumps(point) + "\n" for point in self.points))


def _mark_complete(trial: TrialSpec, data: TrainingData) -> None:
    """Write the status of a completed trial, or of a completed round before the last."""
    num_rows, dropped = data.num_examples, Counter(data.dropped)
    digest = adapter_digest(RoundPaths(trial.output_dir).adapter)
    if trial.output_dir != trial.folder:
        record = {"rows": num_rows, "dropped": data.dropped, "adapter_digest": digest}
        files.write_json(RoundPaths(trial.output_dir).record, record)
        return
    for number in range(trial.round or 0):
        earlier = read_round_record(trial.round_folder(number))
        num_rows += earlier["rows"]
        dropped += Counter(earlier["dropped"])
    write_trial_status(trial, COMPLETE, rows=num_rows, dropped=dict(dropped), adapter_digest=digest)
