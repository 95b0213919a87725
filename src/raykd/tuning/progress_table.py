"""Scoreboard: what the user sees while trials are trained: how far they are, and in a sweep what each has reached."""

import io
from collections.abc import Mapping
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raykd.config.overrides import format_hparams
from raykd.config.sections import Sweep
from raykd.runtime import console as runtime_console
from raykd.runtime import metrics
from raykd.runtime.console import ProgressBar
from raykd.storage.paths import TrialPaths
from raykd.storage.schemas import FAILED
from raykd.training.trial import TrialSpec, read_loss_curve, trial_status

# Lines of a terminal that a live table leaves free.
MARGIN = 6


class TrialProgressTable(tune.Callback):
    """Shows all trials' steps on one line, and of a sweep how each trial ends.

    On a terminal that is a table which changes; in a log a line is added whenever a trial ends.

    Args:
        jobs: the trials by id; more may be added while it runs.
        num_trials: how many they will be.
    """

    def __init__(self, jobs: Mapping[str, TrialSpec], num_trials: int) -> None:
        self._jobs = jobs
        self._num_trials = num_trials
        self._seen: dict[str, dict[str, Any]] = {}
        self._furthest: dict[str, tuple[int, int]] = {}
        self._measured: dict[str, dict[str, Any]] = {}
        self._states: dict[str, str] = {}
        self._meter: ProgressBar | None = None
        self._live: Live | None = None

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        # Not before Tune has pickled what it was given.
        stream = runtime_console.output_stream()
        if self._is_sweep and stream.isatty():
            # The table shows the meter's line beneath it; by itself it writes to nobody.
            self._meter = ProgressBar("training", None, unit="steps", stream=io.StringIO())
            console = Console(file=stream)
            self._live = Live(
                get_renderable=lambda: self._rendered(console.height), console=console, refresh_per_second=2
            )
            self._live.start()
        else:
            self._meter = ProgressBar("training", None, unit="steps").__enter__()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._be(trial.config["trial_id"], metrics.TRAINING)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id = trial.config["trial_id"]
        if trial_id not in self._jobs or self._meter is None:
            return
        if "validation" in result:
            self._measured[trial_id] = result["validation"]
        if "step" in result:
            self._count(trial_id, result)

    def _count(self, trial_id: str, result: dict[str, Any]) -> None:
        assert self._meter is not None, "it is there before any result"
        self._seen[trial_id] = result
        self._meter.total = self._total()
        # Steps that are done again, from a checkpoint on, were counted.
        before = self._furthest.get(trial_id, (0, 0))
        self._furthest[trial_id] = (max(before[0], result["step"]), max(before[1], result["target_tokens"]))
        self._meter.add(*(now - then for now, then in zip(self._furthest[trial_id], before, strict=True)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.config["trial_id"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial.config["trial_id"])

    def close(self) -> None:
        """Takes the table or the line off the screen, as it stands."""
        if self._live is not None:
            self._live.stop()
        elif self._meter is not None:
            self._meter.__exit__()

    @property
    def _is_sweep(self) -> bool:
        # With none yet, they are the points of a search.
        return all(job.sweep for job in self._jobs.values())

    def _be(self, trial_id: str, state: str) -> None:
        self._states[trial_id] = state
        if job := self._jobs.get(trial_id):
            metrics.show_trials(job.experiment, {trial_id: state})

    def _ended(self, trial_id: str) -> None:
        job = self._jobs.get(trial_id)
        if job is None:
            return
        self._be(trial_id, trial_status(job))
        if self._meter is not None and (curve := read_loss_curve(TrialPaths(job.folder).metrics)):
            # Of a trial whose workers were lost Tune is not told the last.
            self._count(trial_id, curve[-1])
        if job.sweep and self._live is None and self._meter is not None:
            over = sum(state not in ("", metrics.TRAINING) for state in self._states.values())
            at = f" at {format_hparams(job.hparams)}" if job.hparams else ""
            reached = format_score(job.sweep, self._measured.get(trial_id))
            self._meter.note(
                f"{over}/{self._num_trials} {job.arm_name}, seed {job.seed}{at}: {self._states[trial_id]}, {reached}"
            )

    def _total(self) -> int:
        """Steps of all trials; until one reports, it is taken to have as many as those that did."""
        # What a trial left undone at its end is not waited for.
        steps = [
            seen["steps"] if self._states.get(trial_id, "") in ("", metrics.TRAINING) else seen["step"]
            for trial_id, seen in self._seen.items()
        ]
        return round(sum(steps) / len(steps) * self._num_trials)

    def _rendered(self, height: int) -> Group:
        assert self._meter is not None, "it is there before the table"
        table = Table(box=None, pad_edge=False)
        for column in ("Arm", "Seed", "At", "State", "Step", "Validation"):
            table.add_column(column, justify="right" if column in ("Seed", "Step") else "left")
        room = max(height - MARGIN, 4)
        # What is under way first, then what has come furthest.
        order = {metrics.TRAINING: 0, FAILED: 2, "": 3}
        ids = sorted(self._jobs, key=lambda each: (order.get(self._states.get(each, ""), 1), self._rank(each)))
        for trial_id in ids[:room]:
            job, seen = self._jobs[trial_id], self._seen.get(trial_id)
            steps = f"{seen['step']}/{seen['steps']}" if seen else ""
            reached = format_score(job.sweep, self._measured.get(trial_id)) if job.sweep else ""
            state = self._states.get(trial_id, "") or metrics.WAITING
            cells = (job.arm_name, str(job.seed), format_hparams(job.hparams), state, steps, reached)
            table.add_row(*(Text(cell) for cell in cells))
        rest = [Text(f"and {len(ids) - room} more")] if len(ids) > room else []
        return Group(table, *rest, Text(self._meter.text()))

    def _rank(self, trial_id: str) -> float:
        measured, sweep = self._measured.get(trial_id), self._jobs[trial_id].sweep
        if not measured or not sweep:
            return float("inf")
        return -measured["accuracy"] if sweep.metric == "accuracy" else measured["loss"]


def format_score(sweep: Sweep, measured: dict[str, Any] | None) -> str:
    """What a trial reached when it was last measured: `48.0 % of 50 (2 of 4)`."""
    if not measured:
        return "not measured"
    reached = f"{100 * measured['accuracy']:.1f} %" if sweep.metric == "accuracy" else f"{measured['loss']:.3f} nats"
    return f"{reached} of {measured['n']} ({measured['number']} of {sweep.num_validations})"
