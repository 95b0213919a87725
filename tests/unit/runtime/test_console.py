"""Progress: what a line of a long stage says."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raykd.runtime import console
from raykd.runtime.console import ProgressBar


def test_a_log_gets_a_line_at_the_start_and_at_the_end_and_few_between():
    stream = io.StringIO()
    with ProgressBar("teacher", 100, stream=stream) as meter:
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
    meter = ProgressBar("teacher", 1000, done=890, stream=io.StringIO())
    now = 60.0
    meter.add(10)
    assert meter.text().endswith("1:00 so far")
    now = 70.0
    meter.add(10)
    assert "910/1,000" in meter.text()
    assert meter.text().endswith("1:30 left")


def test_the_clock_goes_on_while_nothing_happens_and_stops_with_the_stage():
    stream = io.StringIO()
    with ProgressBar("training", None, unit="steps", stream=stream, log_every_s=0.01) as meter:
        deadline = time.monotonic() + 30
        while not re.search("training: starting  0:0[1-9] so far", stream.getvalue()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        meter.total = 10
        meter.add(10)
    said = stream.getvalue()
    assert "training: 10/10 steps" in said.splitlines()[-1]
    time.sleep(0.2)
    assert stream.getvalue() == said


def test_what_libraries_say_is_in_the_log_and_what_we_say_on_the_screen(tmp_path: Path):
    script = f"""
import logging, os, pathlib, sys
from raykd.runtime import console
early = logging.StreamHandler()
with console.redirect_library_output(pathlib.Path({str(tmp_path / "folder" / "driver.log")!r})):
    console.print_status("ours")
    logging.getLogger("early").addHandler(early)
    logging.getLogger("early").warning("early library")
    logging.getLogger("late").addHandler(logging.StreamHandler())
    logging.getLogger("late").warning("late library")
    os.write(2, b"native code")
    print("printing library")
print("after", file=sys.stderr)
print("result")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "ours\nafter\n"
    assert done.stdout == "result\n"
    log = (tmp_path / "folder" / "driver.log").read_text()
    assert all(said in log for said in ("early library", "late library", "native code", "printing library"))
    assert "ours" not in log


def test_what_is_known_afterwards_is_added_to_a_folders_log(tmp_path: Path):
    log = tmp_path / "driver.log"
    log.write_text("said by a library\n")
    assert console.append_to_log(log, "Traceback\n") == log
    assert log.read_text() == "said by a library\nTraceback\n"
    assert [file.name for file in tmp_path.iterdir()] == ["driver.log"]
