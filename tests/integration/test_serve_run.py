"""The teacher alone: served by `serve run`, with OpenAI's API."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runs import free_port, head_ports, wait_for_end

ROOT = Path(__file__).parents[2]
RAY, SERVE = (str(Path(sys.executable).parent / name) for name in ("ray", "serve"))
# The default port of `serve run`.
PORT = 8000

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of the quickstart's teacher, and the process that serves it."""
    port = free_port()
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
    environment["RAY_AUTH_TOKEN"] = "a-token-for-this-test-alone-0123456789abcdef"
    head = [RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={port}", f"--dashboard-port={free_port()}"]
    head += head_ports()
    command = [SERVE, "run", "raykd.teacher.serve_app:app", "experiment=configs/quickstart.yaml"]
    started: list[subprocess.Popen[bytes]] = []
    with (tmp_path / "log").open("wb") as log:
        try:
            for each in (head, [*command, "overrides=[teacher.engine.accelerator=cpu]"]):
                started.append(subprocess.Popen(each, env=environment, cwd=ROOT, stdout=log, stderr=log))
                time.sleep(10)
            yield f"http://127.0.0.1:{PORT}", started[-1]
        finally:
            for process in reversed(started):
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                process.wait(timeout=180)
                wait_for_end(family)


def request_json(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


# Starts an engine. In `make test`, test_serve_app.py covers arguments and deployment; nothing there sends a request.
@pytest.mark.slow
def test_served_teacher_answers_openai_requests(served: tuple[str, subprocess.Popen[bytes]], tmp_path: Path):
    url, command = served
    deadline = time.monotonic() + 600
    while True:
        try:
            models = request_json(f"{url}/v1/models")
            break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline and command.poll() is None, (tmp_path / "log").read_text()
            time.sleep(2)
    assert [model["id"] for model in models["data"]] == ["teacher"]
    messages = [{"role": "user", "content": "Tom has 3 apples and buys 4. How many has he?"}]
    answer = request_json(f"{url}/v1/chat/completions", {"model": "teacher", "messages": messages, "max_tokens": 40})
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip()
