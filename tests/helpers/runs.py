"""Runs of the command line in separate processes, with or without faults."""

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
class FinishedRun:
    """A finished run and its output."""

    plan: Plan
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def head_ports() -> list[str]:
    """Return the options of `ray start --head` for ports that are fixed by default, so that two heads can run."""
    return [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]


def finish(
    arguments: list[str], cwd: Path, timeout_s: float = 900, environment: dict[str, str] | None = None
) -> FinishedRun:
    """Run a command, which must succeed."""
    done = subprocess.run(
        [RAYKD, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return FinishedRun(plan_of(arguments), done.stdout, done.stderr)


def plan_of(arguments: list[str]) -> Plan:
    """Return the plan of a command line."""
    return resolve(load_experiment(arguments[1], arguments[2:]))


def started_plan(experiment: Experiment, retry_failed: bool = False) -> Plan:
    """Resolve an experiment, and write its problems and its run record."""
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
    """Start a command and wait until a condition holds; its output goes to `started.log` in `cwd`.

    Yields:
        The process, which has ended after the block.
    """
    log = cwd / "started.log"
    with log.open("w") as stream:
        driver = subprocess.Popen(
            [RAYKD, *arguments], cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert driver.poll() is None, f"ended before the condition held:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the condition did not hold in time:\n{log.read_text()}"
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
    """Start a command and kill its driver (SIGKILL) as soon as a condition holds.

    Returns:
        The driver's processes, which must end without being killed.
    """
    with started(condition, arguments, cwd, environment) as driver:
        return psutil.Process(driver.pid).children(recursive=True)


def interrupt_when(signum: int, condition: Callable[[], bool], arguments: list[str], cwd: Path) -> None:
    """Start a command and send it a signal when a condition holds.

    All its processes must end within 30 s, and its message must say how to resume.
    """
    with started(condition, arguments, cwd) as run:
        family = psutil.Process(run.pid).children(recursive=True)
        since = time.monotonic()
        run.send_signal(signum)
        assert run.wait(30) == 128 + signum
        wait_for_end(family, max(0, since + 30 - time.monotonic()))
    output = (cwd / "started.log").read_text()
    assert "interrupted; re-run to resume: raykd" in output
    assert "Traceback" not in output


def parts(folder: Path) -> list[Path]:
    """Return the Parquet parts below a folder."""
    return sorted(folder.rglob("part-*.parquet"))


def kill_family(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its descendants, and wait until they have ended."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    wait_for_end(family)


def wait_for_end(family: list[psutil.Process], timeout_s: float = 120) -> None:
    """Wait until processes have ended; kill the remaining ones, and fail if there were any.

    After a SIGKILL of Ray's processes, its agents try to reach the head for 60 s.
    """
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    for process in alive:
        process.kill()
    assert not alive, f"still running after {timeout_s:g} s: {alive}"
