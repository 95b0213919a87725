"""Lock: one process at a time works on an experiment, or on completions; whoever comes second is told who does."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from raykd import lease, location

FILE = "run.lock"
OTHER_NAME = ", or give this experiment a name of its own (name=...)"
# File systems without locks; there it is left to the user.
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def held(
    folder: Path, command: str, otherwise: str = OTHER_NAME, show: Callable[[str], None] = lease.print_line
) -> Iterator[None]:
    """Holds a folder for a `with` block.

    The lock is the operating system's, and goes with the process that has it, however that ends: what is left of a run
    that was killed keeps nobody out. On a shared file system it is as good as that file system's. In a bucket it is a
    `lease`.

    Args:
        folder: the experiment's, or that of completions that experiments share.
        command: what was typed, for whoever comes second.
        otherwise: what else than wait for the first, or end it, the second can do.
        show: shows a line to the user, where a bucket's lease is lost.

    Raises:
        ValueError: where another process holds it, with who that is.
    """
    if location.is_remote(folder):
        try:
            with lease.held(folder / FILE, _who(command), show):
                yield
        except lease.Held as other:
            raise ValueError(f"{folder} is being worked on by {other}. Wait for it, end it{otherwise}") from None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = " ".join(file.read().split()) or "another process"
            raise ValueError(f"{folder} is being worked on by {who}. Wait for it, end it{otherwise}") from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        file.truncate(0)
        file.write(f"{_who(command)}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _who(command: str) -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"
