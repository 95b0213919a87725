"""Console: progress lines, and the log of library output."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

from raykd.runtime import console
from raykd.runtime.console import ProgressBar
from raykd.runtime.rich_console import SafeConsole, cell


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


def test_output_that_cannot_be_written_stops_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        with ProgressBar("teacher", 2, stream=pipe) as meter:
            meter.note("a note")
            meter.add(2)
        assert meter.text().startswith("teacher: 2/2 rows")
        output = console.Output(pipe)
        assert output.write("x" * 100_000) == 100_000
        output.flush()
        # The rest is discarded: closing the pipe writes nothing to it either.
        assert str(Path(f"/proc/self/fd/{pipe.fileno()}").readlink()) == os.devnull


def test_reader_that_goes_away_stops_no_command():
    code = (
        "from raykd.runtime.console import print_result, print_status\n"
        "for number in range(20_000): print_status(f'line {number}'); print_result(f'line {number}')"
    )
    command = f'{sys.executable} -c "{code}" 2>&1 | head -1; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "line 0\n", "")


def test_libraries_cannot_control_the_terminal():
    code = (
        "import logging, warnings\n"
        "from raykd.runtime.console import make_output_safe\n"
        "make_output_safe(); make_output_safe()\n"
        "logging.warning('model %s', 'llama\\x1b[2J\\u202e')\n"
        "warnings.warn('model llama\\x1b]0;title\\x07')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stderr.replace("\n", "").isprintable()
    assert "model llama\\x1b[2J\\u202e" in run.stderr and "model llama\\x1b]0;title\\x07" in run.stderr


def test_tables_show_control_characters_as_escapes():
    output = io.StringIO()
    table = Table("Column")
    table.add_row(cell("\x1b]0;title\x07\x1b[2J\u202egnorw"))
    SafeConsole(output, width=80, force_terminal=True).print(table, "plain\x1b[2J")
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    assert "\x1b" not in text and "\u202e" not in text
    assert "\\x1b]0;title" in text and "\\u202egnorw" in text and "plain\\x1b[2J" in text
