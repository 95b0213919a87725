"""Signals: the first one unwinds under any handler, and shutdown takes at most the grace period."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import signal, sys, time
from raykd.runtime import signals
signals.GRACE_S = float(sys.argv[2])

def another(signum, frame):
    sys.exit(signum)

try:
    with signals.graceful_shutdown():
        if sys.argv[1] == "overridden":
            signal.signal(signal.SIGTERM, another)
        print("in", flush=True)
        try:
            time.sleep(60)
        finally:
            if sys.argv[1] == "hangs":
                while True:
                    time.sleep(1)
            print("cleaned up", flush=True)
except KeyboardInterrupt as interrupted:
    sys.exit(interrupted.status)
"""


def run_program(mode: str, *sent: int, grace_s: float = 30) -> tuple[int, str, float]:
    """Return the exit status, the output and the seconds since the last signal."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, str(grace_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout and program.stdout.readline() == "in\n"
    for signum in sent:
        time.sleep(0.3)
        program.send_signal(signum)
    since = time.monotonic()
    out, _ = program.communicate(timeout=30)
    return program.returncode, out, time.monotonic() - since


@pytest.mark.parametrize("mode", ["plain", "overridden"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_unwinds_and_sets_the_exit_status(mode: str, signum: int):
    status, out, _ = run_program(mode, signum)
    assert (status, out) == (128 + signum, "cleaned up\n")


def test_second_signal_exits_at_once():
    status, _, seconds = run_program("hangs", signal.SIGTERM, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert seconds < 20, "the grace period was not cut short"


def test_hanging_shutdown_exits_after_the_grace_period():
    assert run_program("hangs", signal.SIGINT, grace_s=0.5)[0] == 128 + signal.SIGINT
