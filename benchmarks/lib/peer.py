"""Peer: offline vLLM in a separate process that loads its engine once and generates any number of times."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Process = subprocess.Popen[str]


@contextmanager
def running(kwargs: Mapping[str, Any], env: Mapping[str, str]) -> Iterator[Process]:
    """Start the process with an engine's arguments and environment, and stop it at the end of the block."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "offline_vllm.py"), json.dumps(dict(kwargs))],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(60)


def generate(process: Process, **task: Any) -> dict[str, float]:
    """Run a task (see `offline_vllm.py`) and return its tokens and seconds."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise RuntimeError(f"offline vLLM exited with status {process.wait()}")
    return json.loads(line)
