"""Spent: seconds add up over attempts, those that were killed included."""

from pathlib import Path

import pytest

from raykd.storage.paths import STAGE_TIME_FILE
from raykd.teacher import timing
from raykd.teacher.timing import StageTimer


def test_attempts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    first, second = tmp_path / "first", tmp_path / "second"
    killed = StageTimer([first, second])
    now[0] += 10
    killed.note()
    assert not list(tmp_path.rglob(STAGE_TIME_FILE)), "only now and then"
    now[0] += 30
    killed.note()
    # It is killed ten seconds later; the same command goes on with one of the two.
    now[0] += 10 + 3600
    again = StageTimer([first])
    now[0] += 7
    assert again.of(first) == 40 / 2 + 7
    assert StageTimer([second]).of(second) == 40 / 2
