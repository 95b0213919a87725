"""Lease: the lock of a folder in a bucket, which has no locks: a file that its owner renews.

The store itself creates the file only if there is none (S3's `If-None-Match: *`, and equivalents elsewhere). A killed
owner leaves the file behind. Processes on the same machine detect that at once; others wait until the lease was not
renewed for `LEASE_DURATION_S`. A process that takes an expired lease over first creates a second file, named after the
lease that it found, so that only one process can. An owner that was suspended and finds another owner's lease stops.
An owner whose file was deleted creates it again.

Clocks that differ between machines can only delay a takeover: it requires two looks at the file without a renewal
between them.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raykd.display import display, summary
from raykd.errors import UserError
from raykd.storage import filesystem

LEASE_DURATION_S = 60.0
RENEWAL_INTERVAL_S = 15.0


class LeaseHeldError(Exception):
    """Another process holds the lease; the text describes it."""


def print_line(message: str) -> None:
    """Print a line to standard error."""
    print(display(message), file=sys.stderr, flush=True)


@contextmanager
def hold_lease(file: Path, owner: str, show: Callable[[str], None] = print_line) -> Iterator[None]:
    """Hold a lease during a `with` block; a thread renews it.

    If another process takes the lease over, the thread interrupts the main thread as Ctrl-C does.

    Args:
        file: the lease's file in a bucket.
        owner: this process in words; other processes see it in their error message.
        show: shows a line to the user when the lease is lost.

    Raises:
        LeaseHeldError: if another process holds the lease.
        UserError: if the bucket cannot be reached or written.
    """
    own = {"who": owner, "token": uuid.uuid4().hex, **_process_identity()}
    _acquire(file, own)
    is_over = threading.Event()
    renewal = threading.Thread(target=_renew_until, args=(file, own, is_over, show), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        is_over.set()
        renewal.join()
        # A lease that cannot be removed expires.
        with suppress(OSError):
            if _has_same_token(own, _read(file)):
                file.unlink()


def _acquire(file: Path, own: dict[str, Any]) -> None:
    """Create the lease, or take it over from an owner that is gone.

    Raises:
        LeaseHeldError: if another process holds it.
        UserError: if the bucket cannot be reached or written.
    """
    while True:
        try:
            is_new = filesystem.create(file, _encode(own))
        except Exception as error:
            # This is the first request of a run, and each bucket library raises its own exceptions for wrong
            # credentials, names and networks.
            raise UserError(
                f"{file} cannot be written ({summary(error)}): check that the bucket exists, and "
                "set its credentials (and the address of an S3-compatible server) in the environment of every node"
            ) from error
        # The library retries a request whose response was lost; the retry is refused because of its own first attempt.
        if is_new or _has_same_token(own, current := _read(file)):
            return
        # If the lease was released in the meantime, try again.
        with suppress(FileNotFoundError):
            if current is not None:
                _take_over(file, own, current)
                return


def _take_over(file: Path, own: dict[str, Any], previous: dict[str, Any]) -> None:
    """Take the lease over from an owner that is gone.

    Args:
        file: the lease's file.
        own: this process' lease.
        previous: the lease as it was read.

    Raises:
        FileNotFoundError: if the lease was released in the meantime.
        LeaseHeldError: if its owner still runs, or another process took it over first.
    """
    if not _is_gone(previous):
        if time.time() - file.stat().st_mtime < LEASE_DURATION_S:
            raise LeaseHeldError(_describe_owner(previous))
        # The clock of this machine may be wrong, so the age alone does not decide.
        state = filesystem.file_state(file)
        time.sleep(2 * RENEWAL_INTERVAL_S)
        if filesystem.file_state(file) != state:
            raise LeaseHeldError(_describe_owner(previous))
    claim = file.with_name(f"{file.name}.after-{_token(previous)}")
    if not filesystem.create(claim, _encode(own)) and not _has_same_token(own, claimant := _read(claim)):
        raise LeaseHeldError(
            f"{_describe_owner(claimant)}, which is taking over an expired lease; if that process has ended, delete "
            f"{claim}"
        )
    try:
        state = filesystem.file_state(file)
        if _token(_read(file)) == _token(previous) and filesystem.replace(file, _encode(own), state):
            return
    finally:
        claim.unlink(missing_ok=True)
    if (current := _read(file)) is None:
        raise FileNotFoundError(str(file))
    # The response to a successful replacement may have been lost.
    if not _has_same_token(own, current):
        raise LeaseHeldError(_describe_owner(current))


def _renew_until(file: Path, own: dict[str, Any], is_over: threading.Event, show: Callable[[str], None]) -> None:
    """Renew the lease until `is_over` is set; interrupt the main thread if another process has it."""
    new_owner = None
    while new_owner is None and not is_over.wait(RENEWAL_INTERVAL_S):
        # A failed request is repeated at the next renewal.
        with suppress(Exception):
            new_owner = _renew_once(file, own)
    if new_owner is not None:
        with suppress(Exception):
            show(f"raykd: {file} was taken over by {_describe_owner(new_owner)}: this run stops")
        interrupt_main()


def _renew_once(file: Path, own: dict[str, Any]) -> dict[str, Any] | None:
    """Renew the lease, or create it again if it was deleted.

    Returns:
        None, or the lease of another process that took it over.
    """
    with suppress(FileNotFoundError):
        state = filesystem.file_state(file)
        if _has_same_token(own, _read(file)) and filesystem.replace(file, _encode(own), state):
            return None
    current = _read(file)
    if current is None:
        if filesystem.create(file, _encode(own)):
            return None
        current = _read(file)
    return None if _has_same_token(own, current) else current


def _read(file: Path) -> dict[str, Any] | None:
    """Return the lease in a file; None if there is no file, empty if the file is damaged."""
    try:
        content = json.loads(filesystem.read_bytes(file))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _encode(own: dict[str, Any]) -> bytes:
    # The content differs each time, so that a renewal changes the file's state.
    return json.dumps({**own, "renewed": datetime.now(UTC).isoformat()}).encode()


def _token(content: dict[str, Any] | None) -> str:
    return str((content or {}).get("token", ""))


def _has_same_token(own: dict[str, Any], content: dict[str, Any] | None) -> bool:
    return _token(content) == own["token"]


def _describe_owner(content: dict[str, Any] | None) -> str:
    return summary(str((content or {}).get("who", ""))) or "another process"


def _process_identity() -> dict[str, Any]:
    """Return what distinguishes this process from all others: id, start time and machine."""
    return {"process": os.getpid(), "started": _start_ticks(os.getpid()), "machine": _machine()}


def _machine() -> str:
    """Return an id of the machine, its boot and the PID namespace: each container counts its own processes."""
    boot_file = Path("/proc/sys/kernel/random/boot_id")
    namespace_file = Path("/proc/self/ns/pid")
    boot = boot_file.read_text().strip() if boot_file.exists() else ""
    namespace = str(namespace_file.stat().st_ino) if namespace_file.exists() else ""
    return "/".join([socket.gethostname(), boot, namespace])


def _start_ticks(process: int) -> str:
    """Return the start time of a process, in clock ticks since boot; empty if there is no such process."""
    try:
        # See proc(5). The name in parentheses may hold blanks; after it comes field 3, and the start time is field 22.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(content: dict[str, Any]) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    is_local = content.get("machine") == _machine() and isinstance(content.get("process"), int)
    return is_local and _start_ticks(content["process"]) != content.get("started")
