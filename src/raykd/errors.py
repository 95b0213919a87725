"""Faults: the two kinds of errors that are told in one line, and what else went wrong, from wherever on the cluster.

`UserError` and `StageError` are for the user; every other exception is a bug, or a fault of a library.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

# What a storage answers that is full, over its quota, read-only, not allowed, or no folder.
OS_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
)
_OS_ERROR = re.compile(rf"\[Errno (?:{'|'.join(map(str, OS_ERRORS))})\] [^\n]+")


class UserError(ValueError):
    """A configuration or an environment that the user can mend: one line with the place and the remedy, status 2.

    It is a ValueError, so that pydantic's validators may raise it.
    """


class StageError(RuntimeError):
    """A stage that failed, one line with the reason: what is complete is kept, status 1."""


# Ray Data's UserCodeException and the ActorDiedError of an actor's constructor (Ray 2.60) hold the exception of the
# other process as the text of its traceback alone.
_IN_A_TRACEBACK = re.compile(r"^(?:[\w.]+\.)?(UserError|StageError): ([^\n]+)", re.MULTILINE)
_OF_RAY = re.compile(r"^ray\.[\w.]+: ", re.MULTILINE)
_LED_TO = re.compile(
    r"^(?:The above exception was the direct cause|During handling of the above exception).*$", re.MULTILINE
)


def reported_error(error: BaseException) -> UserError | StageError | None:
    """Return the UserError or StageError that an exception is, or that Ray brought from another process.

    Args:
        error: what was raised in this process.

    Returns:
        The error as it was raised; None where the exception is another one: a bug, or a fault of a library.
    """
    if not is_cluster_error(error):
        return error if isinstance(error, UserError | StageError) else None
    # Only what Ray says that it was caused by: an error that was handled on the way is none.
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, UserError | StageError) and not is_cluster_error(cause):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return stated_in(str(error))


def stated_in(text: str) -> UserError | StageError | None:
    """Return the UserError or StageError that the text of a traceback ends by; None where it is another exception."""
    for traceback in reversed(_LED_TO.split(text)):
        if found := _IN_A_TRACEBACK.findall(traceback):
            kind, message = found[-1]
            return UserError(message.strip()) if kind == UserError.__name__ else StageError(message.strip())
        if not _OF_RAY.search(traceback):
            # The process ended by another exception.
            break
    return None


@contextmanager
def as_user_error(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's error about the user's input, raised in a `with` block, into a UserError.

    Args:
        where: the path in the configuration, or the file, that the library was given.
        kinds: the exceptions that the library raises for it.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{where}: {said}") from error


def os_error_message(error: BaseException | str) -> str:
    """What the operating system said when a file was refused; empty where something else went wrong.

    Args:
        error: what was raised, or its text: an error of a process on another machine is told by its traceback.
    """
    if isinstance(error, str):
        found = _OS_ERROR.search(error)
        return found[0].strip() if found else ""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in OS_ERRORS:
            return str(each)
        if found := os_error_message(str(each)):
            return found
    return ""


def root_cause(error: BaseException) -> str:
    """The last line of what a process on the cluster said, which names what it died of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1]


def is_cluster_error(error: BaseException) -> bool:
    """Whether an error is one that Ray brought from another process, whose traceback is of no use to the user."""
    return any(each.__module__.startswith("ray.") for each in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
