"""Faults: what went wrong outside of what a user typed, in a sentence, from wherever on the cluster it happened."""

import errno
import re
from collections.abc import Iterator

# What a storage answers that is full, over its quota, read-only, not allowed, or no folder.
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
)
_REFUSAL = re.compile(rf"\[Errno (?:{'|'.join(map(str, REFUSALS))})\] [^\n]+")


def refusal(error: BaseException | str) -> str:
    """What the operating system said when a file was refused; empty where something else went wrong.

    Args:
        error: what was raised, or its text: an error of a process on another machine is told by its traceback.
    """
    if isinstance(error, str):
        found = _REFUSAL.search(error)
        return found[0].strip() if found else ""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in REFUSALS:
            return str(each)
        if found := refusal(str(each)):
            return found
    return ""


def cause(error: BaseException) -> str:
    """The last line of what a process on the cluster said, which names what it died of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1]


def is_of_the_cluster(error: BaseException) -> bool:
    """Whether an error is one that Ray brought from another process, whose traceback is of no use to the user."""
    return any(each.__module__.startswith("ray.") for each in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
