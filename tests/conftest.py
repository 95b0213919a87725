"""Fixtures of all tests: an environment without network access, and an empty folder or bucket."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# Libraries read these on import, also in the processes that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
# Without compiled modules, each process of a run takes a second longer to load raykd.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Ray's workers run at a low priority by default; on a busy machine an engine then takes minutes to load.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# Identifies the processes of these tests, including those whose parent has ended.
os.environ["RAYKD_TESTS"] = uuid.uuid4().hex

import s3_server
from raykd.storage import filesystem
from runs import wait_for_end

pytest_plugins = ["reference_run"]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Fail if a file's tests leave processes behind, and end these processes."""
    before = set(started_here())
    yield
    wait_for_end([each for each in started_here() if each not in before])


def started_here() -> list[psutil.Process]:
    """Return the processes that these tests started, including those whose parent has ended."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("RAYKD_TESTS") == os.environ["RAYKD_TESTS"] and process.pid != os.getpid()
            # multiprocessing's resource tracker lives as long as this process.
            if is_ours and "multiprocessing." not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URI of a bucket on a local S3-compatible server."""
    with s3_server.s3() as uri:
        yield uri


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder; in a second test, an empty prefix of a bucket."""
    if request.param == "folder":
        (tmp_path / "storage").mkdir()
        return filesystem.resolve(str(tmp_path / "storage"))
    return filesystem.resolve(f"{request.getfixturevalue('bucket')}/with space/{uuid.uuid4().hex}")
