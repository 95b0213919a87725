"""Training progress on the user's screen: steps and throughput, and for a sweep a table of its trials."""

import io
from collections.abc import Mapping
from typing import Any

from ray import tune
from rich.console import Group
from rich.live import Live
from rich.table import Table

from raykd.config.overrides import format_hparams
from raykd.config.sections import Sweep
from raykd.runtime import console, metrics
from raykd.runtime.console import ProgressBar
from raykd.runtime.rich_console import SafeConsole, cell
from raykd.storage.paths import TrialPaths
from raykd.storage.schemas import FAILED
from raykd.training.trial import TrialSpec, trial_status
from raykd.training.trial_record import read_loss_curve

# Lines of the terminal that the live table leaves free, and its fewest rows.
MARGIN, MIN_ROWS = 6, 4
RUNNING_STATES = ("", metrics.TRAINING)


class TrialProgressTable(tune.Callback):
    """Shows the steps of all trials on one line, and the state of each trial of a sweep.

    A terminal shows a live table; a log gets a line whenever a trial ends.

    Args:
        trials: the trials by id; the search may add some while the table is shown.
        num_trials: the final number of trials.
    """

    def __init__(self, trials: Mapping[str, TrialSpec], num_trials: int) -> None:
        self._trials = trials
        self._num_trials = num_trials
        self._last_results: dict[str, Mapping[str, Any]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        """Steps and target tokens of each trial that the progress bar has counted."""
        self._validations: dict[str, dict[str, Any]] = {}
        self._states: dict[str, str] = {}
        self._bar: ProgressBar | None = None
        self._live: Live | None = None

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        # Not in the constructor: Tune pickles its callbacks before it calls `setup`, and streams cannot be pickled.
        stream = console.output_stream()
        if self._is_sweep and stream.isatty():
            # The table renders the bar's text below its rows; the bar's own output is discarded.
            self._bar = ProgressBar("training", None, unit="steps", stream=io.StringIO())
            terminal = SafeConsole(stream)
            self._live = Live(
                get_renderable=lambda: self._render(terminal.height), console=terminal, refresh_per_second=2
            )
            self._live.start()
        else:
            self._bar = ProgressBar("training", None, unit="steps").__enter__()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._set_state(trial.config["trial_id"], metrics.TRAINING)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id = trial.config["trial_id"]
        if trial_id not in self._trials or self._bar is None:
            return
        if "validation" in result:
            self._validations[trial_id] = result["validation"]
        if "step" in result:
            self._count(trial_id, result)

    def _count(self, trial_id: str, result: Mapping[str, Any]) -> None:
        assert self._bar is not None, "Tune calls setup before any result"
        self._last_results[trial_id] = result
        self._bar.total = self._total_steps()
        # Steps that are repeated after a checkpoint count once.
        steps_before, tokens_before = self._counted.get(trial_id, (0, 0))
        steps, tokens = max(steps_before, result["step"]), max(tokens_before, result["target_tokens"])
        self._counted[trial_id] = (steps, tokens)
        self._bar.add(steps - steps_before, tokens - tokens_before)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_end(trial.config["trial_id"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_end(trial.config["trial_id"])

    def close(self) -> None:
        """Stop updating the screen and leave its last state."""
        if self._live is not None:
            self._live.stop()
        elif self._bar is not None:
            self._bar.__exit__()

    @property
    def _is_sweep(self) -> bool:
        # Without any trial yet, all of them come from a search.
        return all(trial.sweep for trial in self._trials.values())

    def _set_state(self, trial_id: str, state: str) -> None:
        self._states[trial_id] = state
        if trial := self._trials.get(trial_id):
            metrics.show_trials(trial.experiment, {trial_id: state})

    def _on_end(self, trial_id: str) -> None:
        trial = self._trials.get(trial_id)
        if trial is None:
            return
        self._set_state(trial_id, trial_status(trial))
        if self._bar is not None and (curve := read_loss_curve(TrialPaths(trial.folder).metrics)):
            # Tune does not receive the last result of a trial whose workers were lost.
            self._count(trial_id, curve[-1])
        if trial.sweep and self._live is None and self._bar is not None:
            self._bar.note(self._end_message(trial, trial.sweep))

    def _end_message(self, trial: TrialSpec, sweep: Sweep) -> str:
        num_ended = sum(state not in RUNNING_STATES for state in self._states.values())
        point = f" at {format_hparams(trial.hparams)}" if trial.hparams else ""
        score = format_score(sweep, self._validations.get(trial.trial_id))
        return (
            f"{num_ended}/{self._num_trials} {trial.arm_name}, seed {trial.seed}{point}: "
            f"{self._states[trial.trial_id]}, {score}"
        )

    def _total_steps(self) -> int:
        """Return the steps of all trials, where trials without a result count as the mean of the others."""
        steps = [
            # A trial that was stopped early has no more steps to do.
            result["steps"] if self._states.get(trial_id, "") in RUNNING_STATES else result["step"]
            for trial_id, result in self._last_results.items()
        ]
        return round(sum(steps) / len(steps) * self._num_trials)

    def _render(self, height: int) -> Group:
        assert self._bar is not None, "setup creates the bar before the table"
        table = Table(box=None, pad_edge=False)
        for column in ("Arm", "Seed", "At", "State", "Step", "Validation"):
            table.add_column(column, justify="right" if column in ("Seed", "Step") else "left")
        num_rows = max(height - MARGIN, MIN_ROWS)
        trial_ids = sorted(self._trials, key=self._sort_key)
        for trial_id in trial_ids[:num_rows]:
            table.add_row(*map(cell, self._row(trial_id)))
        num_hidden = len(trial_ids) - num_rows
        more = [cell(f"and {num_hidden} more")] if num_hidden > 0 else []
        return Group(table, *more, cell(self._bar.text()))

    def _row(self, trial_id: str) -> tuple[str, ...]:
        trial, result = self._trials[trial_id], self._last_results.get(trial_id)
        steps = f"{result['step']}/{result['steps']}" if result else ""
        score = format_score(trial.sweep, self._validations.get(trial_id)) if trial.sweep else ""
        state = self._states.get(trial_id, "") or metrics.WAITING
        return trial.arm_name, str(trial.seed), format_hparams(trial.hparams), state, steps, score

    def _sort_key(self, trial_id: str) -> tuple[int, float]:
        """Sort running trials first, then ended, failed and waiting ones, each by their metric, the best first."""
        order = {metrics.TRAINING: 0, FAILED: 2, "": 3}
        return order.get(self._states.get(trial_id, ""), 1), self._metric_key(trial_id)

    def _metric_key(self, trial_id: str) -> float:
        validation, sweep = self._validations.get(trial_id), self._trials[trial_id].sweep
        if not validation or not sweep:
            return float("inf")
        return -validation["accuracy"] if sweep.metric == "accuracy" else validation["loss"]


def format_score(sweep: Sweep, validation: dict[str, Any] | None) -> str:
    """Return the last validation result of a trial as text: `48.0 % of 50 (2 of 4)`.

    Args:
        sweep: the section `sweep`, which names the metric.
        validation: the result, as the trial reported it; None if there is none yet.
    """
    if not validation:
        return "not measured"
    metric = f"{100 * validation['accuracy']:.1f} %" if sweep.metric == "accuracy" else f"{validation['loss']:.3f} nats"
    return f"{metric} of {validation['n']} ({validation['number']} of {sweep.num_validations})"
