"""Runs: raykd's own command line in processes of its own, undisturbed or not."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.pipeline.plan import Plan, resolve
from raykd.pipeline.run import start

RAYKD = str(Path(sys.executable).parent / "raykd")


@dataclass
class Ran:
    """A finished run, and what it printed."""

    plan: Plan
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def head_ports() -> list[str]:
    """Options of `ray start --head` for the ports that it would not choose freely: there may be two heads."""
    return [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]


def finish(arguments: list[str], cwd: Path) -> Ran:
    """Runs a command to its end, which must be a good one."""
    done = subprocess.run([RAYKD, *arguments], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Ran(plan_of(arguments), done.stdout, done.stderr)


def plan_of(arguments: list[str]) -> Plan:
    """What a command line works on."""
    return resolve(load_experiment(arguments[1], arguments[2:]))


def started_plan(experiment: Experiment, retry_failed: bool = False) -> Plan:
    """An experiment as a command begins it: resolved, with its problems written and its folder claimed."""
    plan = resolve(experiment, retry_failed)
    start(plan, "raykd run small.yaml")
    return plan


@contextmanager
def started(
    condition: Callable[[], bool],
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str] | None = None,
    timeout_s: float = 900,
) -> Iterator[subprocess.Popen[str]]:
    """Starts a command and waits until a condition holds; what it printed is in `cwd`, in `started.log`.

    Yields:
        the process, which is gone after the block.
    """
    log = cwd / "started.log"
    with log.open("w") as stream:
        driver = subprocess.Popen(
            [RAYKD, *arguments], cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert driver.poll() is None, f"ended too early:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"never came so far:\n{log.read_text()}"
            time.sleep(0.05)
        yield driver
    finally:
        driver.kill()
        driver.wait()


def kill_when(
    condition: Callable[[], bool],
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str] | None = None,
) -> list[psutil.Process]:
    """Starts a command and kills its driver (SIGKILL) as soon as a condition holds.

    Returns:
        the processes that it had, the driver apart: all of them must end by themselves.
    """
    with started(condition, arguments, cwd, environment) as driver:
        return psutil.Process(driver.pid).children(recursive=True)


def end_by(signum: int, condition: Callable[[], bool], arguments: list[str], cwd: Path) -> None:
    """Starts a command and sends it a signal when a condition holds.

    It and all that it started must be gone within 30 s, and it must say how to go on.
    """
    with started(condition, arguments, cwd) as run:
        family = psutil.Process(run.pid).children(recursive=True)
        since = time.monotonic()
        run.send_signal(signum)
        assert run.wait(30) == 128 + signum
        wait_for_end(family, max(0, since + 30 - time.monotonic()))
    said = (cwd / "started.log").read_text()
    assert "interrupted; re-run to resume: raykd" in said
    assert "Traceback" not in said


def parts(folder: Path) -> list[Path]:
    """The parts of rows anywhere below a folder."""
    return sorted(folder.rglob("part-*.parquet"))


def kill_family(process: subprocess.Popen[Any]) -> None:
    """Kills a process and all below it, and waits until they are gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    wait_for_end(family)


def wait_for_end(family: list[psutil.Process], timeout_s: float = 120) -> None:
    """Waits until processes are gone; what is still there after that is ended, and fails the test.

    When Ray's own processes die of SIGKILL, its agents tell the head so for 60 s before they give up.
    """
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    for process in alive:
        process.kill()
    assert not alive, f"still running after {timeout_s:g} s: {alive}"
