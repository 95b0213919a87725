"""Stage timer: seconds add up over attempts, interrupted ones included."""

from pathlib import Path

import pytest

from raykd.storage.paths import STAGE_TIME_FILE
from raykd.teacher import timing
from raykd.teacher.timing import StageTimer


def test_stage_time_adds_up_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    first, second = tmp_path / "first", tmp_path / "second"
    killed = StageTimer([first, second])
    now[0] += 10
    killed.save()
    assert not list(tmp_path.rglob(STAGE_TIME_FILE)), "saved before the interval"
    now[0] += 30
    killed.save()
    # The attempt is killed ten seconds later; the next one resumes one of the two folders.
    now[0] += 10 + 3600
    resumed = StageTimer([first])
    now[0] += 7
    assert resumed.seconds(first) == 40 / 2 + 7
    assert StageTimer([second]).seconds(second) == 40 / 2
