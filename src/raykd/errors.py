"""Errors: the two exception classes that the user sees as one line, and the causes of errors from the cluster.

`UserError` and `StageError` are meant for the user. Every other exception is a bug or an error of a library.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from raykd.display import summary

# Errors of a storage that is full, over its quota, read-only, not permitted or not a folder.
OS_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
)
_OS_ERROR = re.compile(rf"\[Errno (?:{'|'.join(map(str, OS_ERRORS))})\] [^\n]+")


class UserError(ValueError):
    """A mistake in the configuration or the environment: one line with the place and the remedy, exit status 2.

    It is a ValueError, because pydantic turns only these into validation errors.
    """


class StageError(RuntimeError):
    """A failed stage: one line with the reason, exit status 1. Completed work is kept."""


# Ray Data's UserCodeException and the ActorDiedError of an actor's constructor (Ray 2.60) hold the exception of the
# other process as the text of its traceback alone.
_IN_A_TRACEBACK = re.compile(r"^(?:[\w.]+\.)?(UserError|StageError): ([^\n]+)", re.MULTILINE)
_RAY_ERROR = re.compile(r"^ray\.[\w.]+: ", re.MULTILINE)
_CHAINED = re.compile(
    r"^(?:The above exception was the direct cause|During handling of the above exception).*$", re.MULTILINE
)


def reported_error(error: BaseException) -> UserError | StageError | None:
    """Return the UserError or StageError of an exception, also if Ray raised it in another process.

    Args:
        error: the exception in this process.

    Returns:
        The error as it was raised; None for any other exception: a bug, or an error of a library.
    """
    if not is_cluster_error(error):
        return error if isinstance(error, UserError | StageError) else None
    # Follow the causes only, because `__context__` may be an error that was handled.
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, UserError | StageError) and not is_cluster_error(cause):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error_in_traceback(str(error))


def error_in_traceback(text: str) -> UserError | StageError | None:
    """Return the UserError or StageError at the end of a traceback's text; None for another exception."""
    for traceback in reversed(_CHAINED.split(text)):
        if matches := _IN_A_TRACEBACK.findall(traceback):
            kind, message = matches[-1]
            return UserError(message.strip()) if kind == UserError.__name__ else StageError(message.strip())
        if not _RAY_ERROR.search(traceback):
            # The process ended with another exception.
            break
    return None


@contextmanager
def as_user_error(place: str, *kinds: type[Exception]) -> Iterator[None]:
    """Convert a library's exception about the user's input into a UserError for a `with` block.

    Args:
        place: the configuration's path, or the file, that the message begins with.
        kinds: the exceptions to convert.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{place}: {summary(error)}") from error


def os_error_message(error: BaseException | str) -> str:
    """Return the operating system's message about a file or a storage; empty for any other error.

    Args:
        error: the exception, or its text: errors of processes on other machines arrive as the text of a traceback.
    """
    if isinstance(error, str):
        match = _OS_ERROR.search(error)
        return match[0].strip() if match else ""
    for linked in _chain(error):
        if isinstance(linked, OSError) and linked.errno in OS_ERRORS:
            return str(linked)
        if message := os_error_message(str(linked)):
            return message
    return ""


def root_cause(error: BaseException) -> str:
    """Return the last line of an error from the cluster that names an exception; else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b", line)]
    return (exceptions or lines or [type(error).__name__])[-1]


def is_cluster_error(error: BaseException) -> bool:
    """Return whether Ray raised an exception for an error in another process."""
    return any(parent.__module__.startswith("ray.") for parent in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause or context, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
