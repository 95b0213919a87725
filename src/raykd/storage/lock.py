"""Lock: one process at a time works on an experiment, or on completions; whoever comes second is told who does."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from raykd.errors import UserError
from raykd.storage import filesystem, lease
from raykd.storage.paths import LOCK_FILE

RENAME_HINT = ", or give this experiment a name of its own (name=...)"
# File systems without locks; there it is left to the user.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def folder_lock(
    folder: Path, command: str, otherwise: str = RENAME_HINT, show: Callable[[str], None] = lease.print_line
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
        UserError: where another process holds it, with who that is.
    """
    if filesystem.is_remote(folder):
        try:
            with lease.hold_lease(folder / LOCK_FILE, _describe_process(command), show):
                yield
        except lease.LeaseHeldError as other:
            raise UserError(f"{folder} is being worked on by {other}. Wait for it, end it{otherwise}") from None
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder}: {error.filename} is a file, not a folder; set another `storage`") from None
    is_new = not (folder / LOCK_FILE).exists()
    with _locked(folder, otherwise) as file:
        file.truncate(0)
        file.write(f"{_describe_process(command)}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if is_new:
                (folder / LOCK_FILE).unlink(missing_ok=True)
            # A command that was refused leaves nothing: folders that are empty go, from the innermost on.
            with suppress(OSError):
                for each in made:
                    each.rmdir()


def _locked(folder: Path, otherwise: str) -> TextIO:
    """Open a folder's lock file, and lock it."""
    while True:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                who = " ".join(file.read().split()) or "another process"
            raise UserError(f"{folder} is being worked on by {who}. Wait for it, end it{otherwise}") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise
        # Whoever held it may have removed it after it was opened here: then others lock another file of the same name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK_FILE).stat()):
                return file
        file.close()


def _describe_process(command: str) -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"
