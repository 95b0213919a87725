"""Peer: offline vLLM in a process of its own, loaded once and asked as often as is wanted."""

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
    """Starts it under an engine's arguments and environment; it ends with the block."""
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


def ask(process: Process, **job: Any) -> dict[str, float]:
    """Has it do a job (see `offline_vllm.py`), and waits for what it took."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise RuntimeError(f"offline vLLM ended with {process.wait()}")
    return json.loads(line)
