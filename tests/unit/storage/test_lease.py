"""Locks in a folder and in a bucket: one works, the second is told who does, and a dead one keeps nobody out."""

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
ELSEWHERE = {"who": "process 7 on elsewhere", "token": "theirs", "process": 7, "started": "1", "machine": "elsewhere"}


def test_the_second_is_told_who_the_first_is_until_it_is_free(place: Path):
    with lock.folder_lock(place, "first"):
        told = rf"is locked by process {os.getpid()} on .*: first\. Wait for that process, stop it \(it asks the same\)"
        with pytest.raises(ValueError, match=told), lock.folder_lock(place, "second", " (it asks the same)"):
            raise AssertionError("both hold it")
        assert not row_store.list_parts(place)
    with pytest.raises(RuntimeError), lock.folder_lock(place, "second"):
        raise RuntimeError
    with lock.folder_lock(place, "third"):
        pass


def test_a_killed_one_of_this_machine_keeps_nobody_out(place: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        told = rf"process {process.pid} on .*raykd run mine\.yaml"
        with pytest.raises(ValueError, match=told), lock.folder_lock(place, "second"):
            raise AssertionError("both hold it")
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    with lock.folder_lock(place, "again"):
        assert time.monotonic() - started < lease.RENEWAL_INTERVAL_S, "nothing was waited for"


@pytest.fixture
def file(bucket: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A lock of another machine."""
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL_S", 0.2)
    # A bracket is a pattern's to fsspec.
    found = filesystem.resolve(f"{bucket}/lease/{re.sub(r'[^a-z_0-9]', '-', request.node.name)}/run.lock")
    files.write_json(found, ELSEWHERE)
    return found


def test_another_machines_is_respected_while_it_is_young(file: Path):
    with pytest.raises(lease.LeaseHeldError, match="process 7 on elsewhere"), lease.hold_lease(file, "me"):
        raise AssertionError("both hold it")
    assert files.read_json(file)["token"] == "theirs"


def test_one_that_is_not_renewed_any_more_is_taken_over(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


def test_what_looks_old_by_a_wrong_clock_but_is_renewed_is_left(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    monkeypatch.setattr(lease.time, "sleep", lambda _: files.write_json(file, ELSEWHERE | {"renewed": "now"}))
    with pytest.raises(lease.LeaseHeldError, match="elsewhere"), lease.hold_lease(file, "me"):
        raise AssertionError("both hold it")


def test_of_two_that_take_over_one_does(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    claim = file.with_name("run.lock.after-theirs")
    assert filesystem.create(claim, b'{"who": "the other"}')
    with (
        pytest.raises(lease.LeaseHeldError, match=rf"the other, which is taking over an expired lease.*delete {claim}"),
        lease.hold_lease(file, "me"),
    ):
        raise AssertionError("both hold it")
    assert files.read_json(file)["token"] == "theirs"


@pytest.mark.parametrize(
    ("module", "name", "call"),
    # What was found is read, it is looked at twice, and the file is created that says who takes over.
    [(filesystem, "read", 1), (time, "sleep", 1), (filesystem, "create", 2)],
)
def test_one_that_is_given_back_while_it_is_looked_at_is_taken(
    file: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int
):
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    original, calls = getattr(module, name), itertools.count(1)

    def then_gone(*told: Any) -> Any:
        found = original(*told)
        if next(calls) == call:
            file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(module, name, then_gone)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


@pytest.mark.parametrize("is_there", [False, True])
def test_what_was_written_though_no_answer_came_is_ones_own(
    file: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
):
    """A client makes a request again whose answer was lost, and is refused for what the first one wrote."""
    monkeypatch.setattr(lease, "LEASE_DURATION_S", -1.0)
    if not is_there:
        file.unlink()
    for name in ("create", "replace"):
        original = getattr(filesystem, name)
        monkeypatch.setattr(filesystem, name, lambda *told, write=original: write(*told) and False)
    with lease.hold_lease(file, "me"):
        assert files.read_json(file)["who"] == "me"
    assert filesystem.list_files(file.parent) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a run; what is started in the background of a script begins with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_owner_that_was_taken_for_gone_ends_and_leaves_the_others(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.unlink()
    # While libraries write to a log, standard error is that log.
    shown = io.StringIO()
    monkeypatch.setattr(console, "_stream", shown)
    with pytest.raises(KeyboardInterrupt), lease.hold_lease(file, "me", console.print_status):
        files.write_json(file, ELSEWHERE)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            # What interrupts the main thread is not seen while it sleeps.
            time.sleep(0.1)
    assert files.read_json(file)["token"] == "theirs"
    assert f"{file} was taken over by process 7 on elsewhere" in shown.getvalue()


def test_one_whose_file_was_deleted_is_made_again(file: Path):
    file.unlink()
    with lease.hold_lease(file, "me"):
        file.unlink()
        until = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < until, "the run goes on without a lease"
            time.sleep(0.1)
        assert files.read_json(file)["who"] == "me"
    assert not file.exists()


def test_it_is_renewed(file: Path):
    file.unlink()
    with lease.hold_lease(file, "me"):
        before, until = filesystem.file_state(file), time.monotonic() + 20
        while filesystem.file_state(file) == before:
            assert time.monotonic() < until, "it was never renewed"
            time.sleep(0.1)


def test_a_bucket_that_is_not_there_is_told_with_what_to_look_at(bucket: str):
    told = r"s3://no-such-bucket/x/run\.lock cannot be written .*environment"
    with pytest.raises(ValueError, match=told), lock.folder_lock(filesystem.resolve("s3://no-such-bucket/x"), "me"):
        raise AssertionError("nothing is held")
