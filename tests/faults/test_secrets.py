"""Secrets: no file of a run holds a token, and a client without the token cannot connect to its Ray."""

import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runs import parts, started

ROOT = Path(__file__).parents[2]
PLANTED = {
    "HF_TOKEN": "hf_planted0aG9yc2ViYXR0ZXJ5c3RhcGxl",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted4bW9yZSBvZiB0aGUgc2FtZQ",
    "WANDB_API_KEY": "planted1c29tZXRoaW5nIGVsc2U0MGNoYXJhY3RlcnM",
    "AWS_SECRET_ACCESS_KEY": "planted2d2hhdGV2ZXIgaXQgdGFrZXM",
    "AWS_SESSION_TOKEN": "planted5YW5kIGFub3RoZXIgb25l",
    "OPENAI_API_KEY": "sk-planted3bm90aGluZyB0byBzZWU",
}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def session() -> Iterator[Path]:
    """Ray's temporary folder; its path is short, because it holds sockets."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def is_refused(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


# Runs the quickstart. In `make test`, test_job.py covers the run's files and a wrong token; nothing covers Ray's logs.
@pytest.mark.slow
def test_run_leaks_no_secret_and_requires_token(tmp_path: Path, session: Path):
    arguments = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path / 'storage'}"]
    arguments += ["dataset.num_train=200", "dataset.num_test=20", "train.epochs=1", "arms={one: {}}"]
    environment = {**os.environ, **PLANTED, "RAY_TMPDIR": str(session)}
    log = tmp_path / "started.log"
    with started(lambda: len(parts(tmp_path)) >= 1, arguments, tmp_path, environment) as run:
        found = re.search(r"dashboard: (http://\S+)", log.read_text())
        assert found
        for path in ("/api/jobs/", "/api/v0/actors", "/api/serve/applications/"):
            assert is_refused(found[1] + path), path
        descendants = psutil.Process(run.pid).children(recursive=True)
        names = [" ".join(each.cmdline()) for each in descendants]
        assert any("ServeReplica" in name for name in names), "the teacher is not up"
        assert not any("Proxy" in name for name in names), "the teacher is served on a port"
        assert run.wait(400) == 0, log.read_text()
    searched = 0
    for file in [log, *tmp_path.rglob("*"), *session.rglob("*")]:
        if not file.is_file():
            continue
        content = file.read_bytes()
        searched += 1
        for name, secret in PLANTED.items():
            assert secret.encode() not in content, f"{name} is in {file}"
    assert any("python-core" in file.name for file in session.rglob("*")), "Ray's logs were not searched"
    assert searched > 100
