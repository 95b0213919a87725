"""`ray job submit`, against a head that asks for a token."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runs import free_port, wait_for_end

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")

PLANTED = "hf_planted0aG9yc2ViYXR0ZXJ5c3RhcGxl"

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with token authentication, and the environment in which a user talks to it."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text("a-token-for-this-test-alone-0123456789abcdef")
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "HF_TOKEN": PLANTED,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--dashboard-port={dashboard}"]
    log = token.parent / "head.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--include-dashboard=true"], env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        wait_until_up(environment, log)
        yield environment
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=180)
        wait_for_end(family)


def wait_until_up(environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True).returncode:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", "python", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_a_job_runs_the_whole_experiment(head: dict[str, str], tmp_path: Path):
    small = ["problems.num_train=16", "problems.num_test=8", "train.batch_size=8", "train.epochs=1"]
    own = "targets: {sequence: student, kind: top_k, rounds: 2, rollout: {max_tokens: 24}}"
    arms = f"arms={{own: {{prompt.strategy: teacher, {own}}}}}"
    done = submit(
        head,
        *["rayjobs/run.py", "configs/quickstart.yaml", f"storage={tmp_path}", *small],
        *["evaluate.sampling.max_tokens=24", arms],
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "succeeded" in done.stdout
    # The teacher has room beside the students, so it stays up from round to round.
    assert done.stdout.count("starting the engine for 1 students") == 2
    assert done.stdout.count("starting the teacher") == 1
    report = re.search(r"report: (\S+)", done.stdout)
    assert report
    assert Path(report[1]).exists()
    assert (tmp_path / "experiments" / "quickstart" / "results.csv").read_text().count("\n") == 3
    # What the environment holds is in nothing that was written, nor in what Ray tells of its jobs.
    listed = subprocess.run([RAY, "job", "list"], env=head, capture_output=True, text=True, timeout=120)
    assert "rayjobs/run.py" in listed.stdout + listed.stderr
    assert PLANTED not in done.stdout + done.stderr + listed.stdout + listed.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and PLANTED.encode() in file.read_bytes()]


def test_a_job_with_a_mistake_fails_and_says_so(head: dict[str, str]):
    done = submit(head, "rayjobs/train.py", "configs/quickstart.yaml", "train.epoch=3")
    assert done.returncode != 0
    assert "did you mean 'epochs'" in done.stdout + done.stderr


def test_without_the_token_nobody_gets_in(head: dict[str, str], tmp_path: Path):
    (tmp_path / "token").write_text("another-token-altogether-0123456789abcdef")
    refused = submit({**head, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, "rayjobs/run.py", "--version")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
