"""Progress: what a line of a long stage says."""

import io
import time

import pytest

from raykd.progress import Meter


def test_a_log_gets_a_line_at_the_start_and_at_the_end_and_few_between():
    stream = io.StringIO()
    with Meter("teacher", 100, stream=stream) as meter:
        for _ in range(100):
            meter.add(1, tokens=7)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("teacher: 0/100 rows")
    assert lines[1].startswith("teacher: 100/100 rows")
    assert "tokens/s" in lines[1]
    assert "done in 0:00" in lines[1]


def test_time_left_follows_the_rate_once_start_up_is_over(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = Meter("teacher", 1000, done=890, stream=io.StringIO())
    now = 60.0
    meter.add(10)
    assert meter.text().endswith("1:00 so far")
    now = 70.0
    meter.add(10)
    assert "910/1,000" in meter.text()
    assert meter.text().endswith("1:30 left")
