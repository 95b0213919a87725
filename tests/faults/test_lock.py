"""Two runs of one experiment at once: the second one names the first, and a killed run releases its lock."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raykd import cli
from raykd.errors import UserError
from raykd.storage import lock
from runs import RAYKD, plan_of

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from raykd.storage import lock
with lock.folder_lock(Path(sys.argv[1]), "raykd run mine.yaml"):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds a folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def holder(tmp_path: Path):
    """Start a process that holds an experiment's lock."""
    folder = tmp_path / "experiments" / "quickstart"
    with holding(folder) as process:
        yield process, folder


@pytest.mark.parametrize("stage", ["run", "train", "report"])
def test_second_run_names_the_first(holder, tmp_path: Path, capsys, stage: str):
    process, folder = holder
    assert cli.main([stage, str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert f"{folder} is locked by process {process.pid} on " in message
    assert "raykd run mine.yaml" in message and "name=..." in message
    # Nothing was written.
    assert [path.name for path in folder.iterdir()] == [lock.LOCK_FILE]


# Starts a command. In `make test`, test_lease.py covers the message.
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shared_completions_name_the_experiment_that_generates_them(tmp_path: Path):
    arguments = ["generate", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", "arms={one: {}}"]
    (completions,) = plan_of(arguments).required_sets
    with holding(completions.folder) as process:
        done = subprocess.run([RAYKD, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2, done.stderr
    assert f"{completions.folder} is locked by process {process.pid} on " in done.stderr
    assert "(same completions)" in done.stderr
    assert [path.name for path in completions.folder.iterdir()] == [lock.LOCK_FILE], "completions were generated"


def test_lock_of_killed_run_is_free(holder):
    process, folder = holder
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert str(process.pid) in (folder / lock.LOCK_FILE).read_text(), "the lock file still names the killed process"
    with lock.folder_lock(folder, "again"):
        assert "again" in (folder / lock.LOCK_FILE).read_text()
    assert (folder / lock.LOCK_FILE).read_text() == ""


def test_lock_is_released_after_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError), lock.folder_lock(tmp_path, "first"):
        raise RuntimeError
    with lock.folder_lock(tmp_path, "second"):
        pass


def test_lock_leaves_no_empty_folders(tmp_path: Path):
    folder = tmp_path / "storage" / "experiments" / "mine"
    with pytest.raises(KeyError), lock.folder_lock(folder, "refused"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock.folder_lock(folder, "works"):
        (folder / "run.json").write_text("{}")
    assert [file.name for file in folder.iterdir()] == ["run.json"]


def test_removed_lock_file_is_not_locked(tmp_path: Path, monkeypatch):
    """Two processes open the same file; the first removes it, and the second must not lock the removed file."""
    first = lock.folder_lock(tmp_path, "first")
    first.__enter__()
    flock = lock.fcntl.flock

    def release_first(file, operation: int) -> None:
        # The first process releases the lock between the second one's open and flock.
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", release_first)
    with (
        lock.folder_lock(tmp_path, "second"),
        pytest.raises(UserError, match=r"by process .*: second"),
        lock.folder_lock(tmp_path, "third"),
    ):
        raise AssertionError("two owners")


def test_storage_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "storage").write_text("")
    with (
        pytest.raises(UserError, match="storage is a file, not a folder"),
        lock.folder_lock(tmp_path / "storage", "first"),
    ):
        raise AssertionError("a file was locked as a folder")
