"""Console: progress lines, and the log of library output."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raykd.runtime import console
from raykd.runtime.console import ProgressBar


def test_progress_in_log_has_few_lines():
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


def test_remaining_time_ignores_start_up(monkeypatch: pytest.MonkeyPatch):
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


def test_elapsed_time_advances_until_the_end():
    stream = io.StringIO()
    with ProgressBar("training", None, unit="steps", stream=stream, log_every_s=0.01) as meter:
        deadline = time.monotonic() + 30
        while not re.search("training: starting  0:0[1-9] so far", stream.getvalue()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        meter.total = 10
        meter.add(10)
    output = stream.getvalue()
    assert "training: 10/10 steps" in output.splitlines()[-1]
    time.sleep(0.2)
    assert stream.getvalue() == output


def test_library_output_goes_to_the_log_and_status_to_the_terminal(tmp_path: Path):
    script = f"""
import logging, os, pathlib, sys
from raykd.runtime import console
early = logging.StreamHandler()
with console.redirect_library_output(pathlib.Path({str(tmp_path / "folder" / "driver.log")!r})):
    console.print_status("status")
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
    assert done.stderr == "status\nafter\n"
    assert done.stdout == "result\n"
    log = (tmp_path / "folder" / "driver.log").read_text()
    assert all(text in log for text in ("early library", "late library", "native code", "printing library"))
    assert "status" not in log


def test_append_to_log_adds_to_the_log_file(tmp_path: Path):
    log = tmp_path / "driver.log"
    log.write_text("output of a library\n")
    assert console.append_to_log(log, "Traceback\n") == log
    assert log.read_text() == "output of a library\nTraceback\n"
    assert [file.name for file in tmp_path.iterdir()] == ["driver.log"]
