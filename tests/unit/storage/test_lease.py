"""Locks of local folders and buckets: exclusive, with the owner in the message, and free after a kill."""

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raykd.runtime import console
from raykd.storage import files, filesystem, lease, lock, row_store

HOLD = """
import sys, time
from raykd.storage import filesystem, lock
with lock.folder_lock(filesystem.resolve(sys.argv[1]), "raykd run mine.yaml"):
    print("held", flush=True)
    time.sleep(300)
"""
OTHER_LEASE = {
    "who": "process 7 on other-host",
    "token": "other",
    "process": 7,
    "started": "1",
    "machine": "other-host",
}


def test_second_process_sees_the_owner_until_release(storage: Path):
    with lock.folder_lock(storage, "first"):
        message = (
            rf"is locked by process {os.getpid()} on .*: first\. Wait for that process, stop it \(same completions\)"
        )
        with (
            pytest.raises(ValueError, match=message),
            lock.folder_lock(storage, "second", " (same completions)"),
        ):
            raise AssertionError("two owners")
        assert not row_store.list_parts(storage)
    with pytest.raises(RuntimeError), lock.folder_lock(storage, "second"):
        raise RuntimeError
    with lock.folder_lock(storage, "third"):
        pass


def test_lock_of_killed_local_process_is_free(storage: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(storage)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        message = rf"process {process.pid} on .*raykd run mine\.yaml"
        with pytest.raises(ValueError, match=message), lock.folder_lock(storage, "second"):
            raise AssertionError("two owners")
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    with lock.folder_lock(storage, "again"):
        assert time.monotonic() - started < lease.RENEWAL_INTERVAL_S, "the lock of a killed process was not free"


@pytest.fixture
def file(bucket: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Write the lease of another machine."""
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL_S", 0.2)
    # fsspec treats brackets as a pattern.
    found = filesystem.resolve(f"{bucket}/lease/{re.sub(r'[^a-z_0-9]', '-', request.node.name)}/run.lock")
    files.write_json(found, OTHER_LEASE)
    return found


def test_recent_lease_of_another_machine_is_respected(file: Path):
    with pytest.raises(lease.LeaseHeldError, match="process 7 on other-host"), lease.hold_lease(file, "me"):
        raise AssertionError("two owners")
    assert files.read_json(file)["token"] == "other"


def test_expired_lease_is_taken_over(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


def test_renewed_lease_with_an_old_timestamp_is_respected(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    monkeypatch.setattr(lease.time, "sleep", lambda _: files.write_json(file, OTHER_LEASE | {"renewed": "now"}))
    with pytest.raises(lease.LeaseHeldError, match="other-host"), lease.hold_lease(file, "me"):
        raise AssertionError("two owners")


def test_only_one_process_takes_over(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    claim = file.with_name("run.lock.after-other")
    assert filesystem.create(claim, b'{"who": "the other"}')
    with (
        pytest.raises(lease.LeaseHeldError, match=rf"the other, which is taking over an expired lease.*delete {claim}"),
        lease.hold_lease(file, "me"),
    ):
        raise AssertionError("two owners")
    assert files.read_json(file)["token"] == "other"


@pytest.mark.parametrize(
    ("module", "name", "call"),
    # The lease is released after it was read, between two reads of its state, or after the claim was created.
    [(filesystem, "read_bytes", 1), (time, "sleep", 1), (filesystem, "create", 2)],
)
def test_lease_released_during_takeover_is_acquired(
    file: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int
):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    original, calls = getattr(module, name), itertools.count(1)

    def call_and_release(*arguments: Any) -> Any:
        found = original(*arguments)
        if next(calls) == call:
            file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(module, name, call_and_release)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


@pytest.mark.parametrize("exists", [False, True])
def test_write_with_lost_response_counts_as_own(file: Path, monkeypatch: pytest.MonkeyPatch, exists: bool):
    """A client repeats a request whose response was lost, and the server refuses it because the first one succeeded."""
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    if not exists:
        file.unlink()
    for name in ("create", "replace"):
        original = getattr(filesystem, name)
        monkeypatch.setattr(filesystem, name, lambda *arguments, write=original: write(*arguments) and False)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle SIGINT as in a run; background processes of a script ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_expired_lease_owner_stops(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.unlink()
    # While libraries write to a log, standard error is that log.
    shown = io.StringIO()
    monkeypatch.setattr(console, "_stream", shown)
    with pytest.raises(KeyboardInterrupt), lease.hold_lease(file, "me", console.print_status):
        files.write_json(file, OTHER_LEASE)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            # A long sleep would delay the interrupt of the main thread.
            time.sleep(0.1)
    assert files.read_json(file)["token"] == "other"
    assert f"{file} was taken over by process 7 on other-host" in shown.getvalue()


def test_deleted_lease_is_created_again(file: Path):
    file.unlink()
    with lease.hold_lease(file, "me"):
        file.unlink()
        until = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < until, "the lease was not created again"
            time.sleep(0.1)
        assert files.read_json(file)["who"] == "me"
    assert not file.exists()


def test_lease_is_renewed(file: Path):
    file.unlink()
    with lease.hold_lease(file, "me"):
        before, until = filesystem.file_state(file), time.monotonic() + 20
        while filesystem.file_state(file) == before:
            assert time.monotonic() < until, "the lease was not renewed"
            time.sleep(0.1)


def test_missing_bucket_error_names_the_remedy(bucket: str):
    message = r"s3://no-such-bucket/x/run\.lock cannot be written .*environment"
    with pytest.raises(ValueError, match=message), lock.folder_lock(filesystem.resolve("s3://no-such-bucket/x"), "me"):
        raise AssertionError("the lock was acquired")
