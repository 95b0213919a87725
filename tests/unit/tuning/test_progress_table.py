"""Training progress: a table on a terminal, lines in a log."""

import fcntl
import io
import os
import pty
import select
import struct
import termios
from pathlib import Path
from typing import Any

import pytest

from raykd.config.experiment import Experiment
from raykd.runtime import console
from raykd.storage.schemas import COMPLETE, STOPPED
from raykd.training.trial import TrialSpec, write_trial_status
from raykd.tuning.progress_table import TrialProgressTable
from runs import started_plan


@pytest.fixture
def trials(tmp_path: Path) -> dict[str, TrialSpec]:
    tree = {
        "name": "swept",
        "storage": str(tmp_path),
        "dataset": {"source": "demo", "num_train": 20, "num_validation": 10, "num_test": 2},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
        "arms": {"bare": {}},
        "sweep": {"space": {"train.learning_rate": {"grid": [0.01, 0.001, 0.0001]}}, "num_validations": 2},
    }
    plan = started_plan(Experiment.model_validate(tree))
    return {trial.trial_id: trial for trial in plan.trials}


class Trial:
    """A Tune trial with the attributes that callbacks read."""

    def __init__(self, trial: TrialSpec) -> None:
        self.config = {"trial_id": trial.trial_id}


def report_progress(trials: dict[str, TrialSpec]) -> None:
    """Report three trials: one completes, one is stopped, one does not start."""
    progress_table = TrialProgressTable(trials, len(trials))
    progress_table.setup()
    good, poor, _ = trials.values()
    first_validation: dict[str, Any] = {"number": 1, "n": 10, "accuracy": 0.4}
    for trial in (good, poor):
        progress_table.on_trial_start(1, [], Trial(trial))
        result = {"step": 5, "steps": 10, "target_tokens": 100, "validation": first_validation}
        progress_table.on_trial_result(1, [], Trial(trial), result)
    write_trial_status(poor, STOPPED)
    progress_table.on_trial_complete(1, [], Trial(poor))
    result = {
        "step": 10,
        "steps": 10,
        "target_tokens": 200,
        "validation": first_validation | {"number": 2, "accuracy": 0.9},
    }
    progress_table.on_trial_result(1, [], Trial(good), result)
    write_trial_status(good, COMPLETE)
    progress_table.on_trial_complete(1, [], Trial(good))
    progress_table.close()


def test_terminal_shows_a_table(trials: dict[str, TrialSpec], monkeypatch: pytest.MonkeyPatch):
    main, terminal_fd = pty.openpty()
    fcntl.ioctl(terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal_fd, "w") as terminal:
        monkeypatch.setattr(console, "output_stream", lambda: terminal)
        report_progress(trials)
        terminal.flush()
        shown = ""
        while select.select([main], [], [], 0.2)[0]:
            shown += os.read(main, 1 << 20).decode()
    os.close(main)
    last = [line for line in shown.splitlines() if "bare" in line][-3:]
    for line, words in zip(
        last,
        [
            ["0.01", "complete", "10/10", "90.0 % of 10 (2 of 2)"],
            ["0.001", "stopped", "5/10", "40.0 % of 10 (1 of 2)"],
            ["0.0001", "waiting", "not measured"],
        ],
        strict=True,
    ):
        assert all(word in line for word in words), line


def test_log_has_a_line_for_each_ended_trial(trials: dict[str, TrialSpec], monkeypatch: pytest.MonkeyPatch):
    log = io.StringIO()
    monkeypatch.setattr(console, "output_stream", lambda: log)
    report_progress(trials)
    lines = [line for line in log.getvalue().splitlines() if "bare" in line]
    assert lines == [
        "1/3 bare, seed 0 at train.learning_rate=0.001: stopped, 40.0 % of 10 (1 of 2)",
        "2/3 bare, seed 0 at train.learning_rate=0.01: complete, 90.0 % of 10 (2 of 2)",
    ]


def test_repeated_steps_count_once(trials: dict[str, TrialSpec], monkeypatch: pytest.MonkeyPatch):
    log = io.StringIO()
    monkeypatch.setattr(console, "output_stream", lambda: log)
    trial = next(iter(trials.values()))
    progress_table = TrialProgressTable({trial.trial_id: trial}, 1)
    progress_table.setup()
    progress_table.on_trial_start(1, [], Trial(trial))
    # A worker dies after step 8, and the trial resumes from the checkpoint of step 5.
    for step in (5, 8, 6, 9, 10):
        progress_table.on_trial_result(1, [], Trial(trial), {"step": step, "steps": 10, "target_tokens": 20 * step})
    progress_table.close()
    assert "training: 10/10 steps" in log.getvalue().splitlines()[-1]
