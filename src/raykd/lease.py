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

from raykd import location
from raykd.faults import UserError

LASTS_S = 60.0
RENEWED_EVERY_S = 15.0


class Held(Exception):
    """Another holds it; the text says who."""


def print_line(message: str) -> None:
    """Writes a line to standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def held(file: Path, who: str, show: Callable[[str], None] = print_line) -> Iterator[None]:
    """Holds a file of a bucket for a `with` block, renewing it meanwhile.

    Args:
        file: the file.
        who: this process in words, for whoever comes second.
        show: shows a line to the user, where the lease is lost.

    Raises:
        Held: where another has it.
        UserError: where the bucket cannot be reached or written.
    """
    mine = {"who": who, "token": uuid.uuid4().hex, **_process()}
    _take(file, mine)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, mine, over, show), daemon=True)
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


def _take(file: Path, mine: dict[str, Any]) -> None:
    while True:
        try:
            is_new = location.create(file, _written(mine))
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
        if time.time() - file.stat().st_mtime < LASTS_S:
            raise Held(_who(found))
        # This machine's clock may be wrong.
        seen = location.state(file)
        time.sleep(2 * RENEWED_EVERY_S)
        if location.state(file) != seen:
            raise Held(_who(found))
    claim = file.with_name(f"{file.name}.after-{_token(found)}")
    if not location.create(claim, _written(mine)) and not _is_of(mine, other := _read(claim)):
        raise Held(f"{_who(other)}, which takes it over from one that is gone; should it be gone too, delete {claim}")
    try:
        seen = location.state(file)
        if _token(_read(file)) == _token(found) and location.replace(file, _written(mine), seen):
            return
    finally:
        claim.unlink(missing_ok=True)
    if (other := _read(file)) is None:
        raise FileNotFoundError(str(file))
    # The answer to this may have been lost as well.
    if not _is_of(mine, other):
        raise Held(_who(other))


def _renew(file: Path, mine: dict[str, Any], over: threading.Event, show: Callable[[str], None]) -> None:
    other = None
    while other is None and not over.wait(RENEWED_EVERY_S):
        # A store that does not answer now may do so the next time.
        with suppress(Exception):
            other = _renewed(file, mine)
    if other is not None:
        with suppress(Exception):
            show(f"raykd: {file} was taken over by {_who(other)}: this run ends")
        interrupt_main()


def _renewed(file: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Renews a lease, and makes it again where somebody deleted it; returns what is there where that is another's."""
    with suppress(FileNotFoundError):
        seen = location.state(file)
        if _is_of(mine, _read(file)) and location.replace(file, _written(mine), seen):
            return None
    found = _read(file)
    if found is None:
        if location.create(file, _written(mine)):
            return None
        found = _read(file)
    return None if _is_of(mine, found) else found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(location.read(file))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _written(mine: dict[str, Any]) -> bytes:
    # Other content each time, so that its state tells that it was renewed.
    return json.dumps({**mine, "renewed": datetime.now(UTC).isoformat()}).encode()


def _token(found: dict[str, Any] | None) -> str:
    return str((found or {}).get("token", ""))


def _is_of(mine: dict[str, Any], found: dict[str, Any] | None) -> bool:
    return _token(found) == mine["token"]


def _who(found: dict[str, Any] | None) -> str:
    return " ".join(str((found or {}).get("who", "")).split()) or "another process"


def _process() -> dict[str, Any]:
    """What tells this process from all others: its number, and whose numbers those are."""
    return {"process": os.getpid(), "started": _started(os.getpid()), "machine": _machine()}


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    # Containers of a machine each count their own processes.
    numbers = Path("/proc/self/ns/pid")
    told = [boot.read_text().strip() if boot.exists() else "", str(numbers.stat().st_ino if numbers.exists() else "")]
    return "/".join([socket.gethostname(), *told])


def _started(process: int) -> str:
    """When a process was started, in ticks since the machine was; empty where there is none."""
    try:
        # Behind its name, which may hold blanks, the state is the third field and the start the 22nd.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine that is no more."""
    is_mine = found.get("machine") == _machine() and isinstance(found.get("process"), int)
    return is_mine and _started(found["process"]) != found.get("started")
