"""Lease: who works on a folder of a bucket, which knows no locks: a file that its owner renews while it is there.

The file is created only where there is none, by the store itself (S3's `If-None-Match: *`, and its like elsewhere). An
owner that was killed leaves it behind: on its own machine it is seen to be gone at once, on others once the file was
not renewed for `LASTS_S`. Whoever then takes it over first creates a second file, named after what it found: of
several only one can. An owner that slept, finds another's name and ends; one whose file was deleted makes it again.
The clocks of machines count for when a second is turned away, never for when one takes over: for that it looks twice.
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

from raykd.errors import UserError
from raykd.storage import filesystem

LEASE_DURATION_S = 60.0
RENEWAL_INTERVAL_S = 15.0


class LeaseHeldError(Exception):
    """Another holds it; the text says who."""


def print_line(message: str) -> None:
    """Writes a line to standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def hold_lease(file: Path, who: str, show: Callable[[str], None] = print_line) -> Iterator[None]:
    """Holds a file of a bucket for a `with` block, renewing it meanwhile.

    Args:
        file: the file.
        who: this process in words, for whoever comes second.
        show: shows a line to the user, where the lease is lost.

    Raises:
        Held: where another has it.
        UserError: where the bucket cannot be reached or written.
    """
    mine = {"who": who, "token": uuid.uuid4().hex, **_process_identity()}
    _acquire(file, mine)
    over = threading.Event()
    renewing = threading.Thread(target=_renew_until, args=(file, mine, over, show), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        # Where it cannot be removed it runs out.
        with suppress(OSError):
            if _is_of(mine, _read(file)):
                file.unlink()


def _acquire(file: Path, mine: dict[str, Any]) -> None:
    while True:
        try:
            is_new = filesystem.create(file, _encode(mine))
        except Exception as error:
            # The first request of a run. What a library raises for wrong keys, names or networks is its own affair.
            raise UserError(
                f"{file} cannot be written ({' '.join(str(error).split())[:300]}): see that the bucket is there, and "
                "that its keys, and its address where it is not the cloud's, are in the environment of every node"
            ) from error
        # A request whose answer was lost is made again, and refused for what the first one wrote.
        if is_new or _is_of(mine, found := _read(file)):
            return
        # What is not there any more was given back in this moment.
        with suppress(FileNotFoundError):
            if found is not None:
                _take_over(file, mine, found)
                return


def _take_over(file: Path, mine: dict[str, Any], found: dict[str, Any]) -> None:
    """Takes it from one that is gone.

    Raises:
        FileNotFoundError: where it is given back meanwhile.
        Held: where its owner is there, or another is quicker.
    """
    if not _is_gone(found):
        if time.time() - file.stat().st_mtime < LEASE_DURATION_S:
            raise LeaseHeldError(_owner(found))
        # This machine's clock may be wrong.
        seen = filesystem.file_state(file)
        time.sleep(2 * RENEWAL_INTERVAL_S)
        if filesystem.file_state(file) != seen:
            raise LeaseHeldError(_owner(found))
    claim = file.with_name(f"{file.name}.after-{_token(found)}")
    if not filesystem.create(claim, _encode(mine)) and not _is_of(mine, other := _read(claim)):
        raise LeaseHeldError(
            f"{_owner(other)}, which takes it over from one that is gone; should it be gone too, delete {claim}"
        )
    try:
        seen = filesystem.file_state(file)
        if _token(_read(file)) == _token(found) and filesystem.replace(file, _encode(mine), seen):
            return
    finally:
        claim.unlink(missing_ok=True)
    if (other := _read(file)) is None:
        raise FileNotFoundError(str(file))
    # The answer to this may have been lost as well.
    if not _is_of(mine, other):
        raise LeaseHeldError(_owner(other))


def _renew_until(file: Path, mine: dict[str, Any], over: threading.Event, show: Callable[[str], None]) -> None:
    other = None
    while other is None and not over.wait(RENEWAL_INTERVAL_S):
        # A store that does not answer now may do so the next time.
        with suppress(Exception):
            other = _renew_once(file, mine)
    if other is not None:
        with suppress(Exception):
            show(f"raykd: {file} was taken over by {_owner(other)}: this run ends")
        interrupt_main()


def _renew_once(file: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Renews a lease, and makes it again where somebody deleted it; returns what is there where that is another's."""
    with suppress(FileNotFoundError):
        seen = filesystem.file_state(file)
        if _is_of(mine, _read(file)) and filesystem.replace(file, _encode(mine), seen):
            return None
    found = _read(file)
    if found is None:
        if filesystem.create(file, _encode(mine)):
            return None
        found = _read(file)
    return None if _is_of(mine, found) else found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(filesystem.read_bytes(file))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _encode(mine: dict[str, Any]) -> bytes:
    # Other content each time, so that its state tells that it was renewed.
    return json.dumps({**mine, "renewed": datetime.now(UTC).isoformat()}).encode()


def _token(found: dict[str, Any] | None) -> str:
    return str((found or {}).get("token", ""))


def _is_of(mine: dict[str, Any], found: dict[str, Any] | None) -> bool:
    return _token(found) == mine["token"]


def _owner(found: dict[str, Any] | None) -> str:
    return " ".join(str((found or {}).get("who", "")).split()) or "another process"


def _process_identity() -> dict[str, Any]:
    """What tells this process from all others: its number, and whose numbers those are."""
    return {"process": os.getpid(), "started": _start_ticks(os.getpid()), "machine": _machine()}


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    # Containers of a machine each count their own processes.
    numbers = Path("/proc/self/ns/pid")
    told = [boot.read_text().strip() if boot.exists() else "", str(numbers.stat().st_ino if numbers.exists() else "")]
    return "/".join([socket.gethostname(), *told])


def _start_ticks(process: int) -> str:
    """When a process was started, in ticks since the machine was; empty where there is none."""
    try:
        # Behind its name, which may hold blanks, the state is the third field and the start the 22nd.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine that is no more."""
    is_mine = found.get("machine") == _machine() and isinstance(found.get("process"), int)
    return is_mine and _start_ticks(found["process"]) != found.get("started")
