"""Lock: one process at a time works on an experiment, or on a set of completions."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from raykd.display import summary
from raykd.errors import UserError
from raykd.storage import filesystem, lease
from raykd.storage.paths import LOCK_FILE

RENAME_HINT = ", or set another name for this experiment (name=...)"
# Errors of file systems without locks; no lock is held on these.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def folder_lock(
    folder: Path, command: str, otherwise: str = RENAME_HINT, show: Callable[[str], None] = lease.print_line
) -> Iterator[None]:
    """Hold the lock of a folder during a `with` block.

    The operating system releases the lock when the process ends, even if it is killed. On a shared file system the lock
    is as reliable as that file system's locks. In a bucket the lock is a `lease`.

    Args:
        folder: an experiment's folder, or the folder of a set of completions, which experiments share.
        command: the command that was typed; other processes see it in their error message.
        otherwise: the end of the error message: an alternative to waiting for the other process or stopping it.
        show: shows a line to the user when the lease of a bucket is lost.

    Raises:
        UserError: if another process holds the lock, with its description.
    """
    if filesystem.is_remote(folder):
        try:
            with lease.hold_lease(folder / LOCK_FILE, _describe_process(command), show):
                yield
        except lease.LeaseHeldError as other:
            raise UserError(f"{folder} is locked by {other}. Wait for that process, stop it{otherwise}") from None
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
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
            # A refused command leaves no empty folders behind. `created` begins with the innermost folder.
            with suppress(OSError):
                for path in created:
                    path.rmdir()


def _locked(folder: Path, otherwise: str) -> TextIO:
    """Return a folder's lock file, open and locked.

    Raises:
        UserError: if another process holds the lock.
    """
    while True:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = summary(file.read()) or "another process"
            raise UserError(f"{folder} is locked by {owner}. Wait for that process, stop it{otherwise}") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise
        # The previous owner may have removed the file after it was opened here. The lock then holds for a deleted file,
        # while other processes lock a new file of the same name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK_FILE).stat()):
                return file
        file.close()


def _describe_process(command: str) -> str:
    """Return this process in words, for other processes' error messages."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command}"
