"""Signals: Ctrl-C and SIGTERM end a run in good order, and in bounded time."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raykd.runtime.console import print_status

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Whoever sends SIGTERM often sends SIGKILL half a minute later.
GRACE_S = 25.0


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Has the first signal unwind a `with` block; a second one, or `GRACE_S` later, ends the process where it is.

    Ray sets a handler for SIGTERM of its own whenever a library of its calls `ray.init`. So what is bounded is told of
    a signal by the descriptor that Python writes it to, whoever's handler is called.

    Raises:
        Ended: where a signal came.
    """
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    came: list[int] = []

    def listen() -> None:
        while True:
            is_there, _, _ = select.select([ear], [], [], GRACE_S if came else None)
            heard = os.read(ear, 1) if is_there else bytes(came)
            if not heard:
                os.close(ear)
                return
            if heard[0] not in SIGNALS:
                continue
            if came:
                os._exit(128 + came[0])
            came.append(heard[0])
            print_status("ending: engines and workers are taken down")

    def end(signum: int, _: Any) -> None:
        raise Interrupted(signum)

    before = {each: signal.signal(each, end) for each in SIGNALS}
    fd = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        # Of another handler, or of a library that took ours for Ctrl-C.
        raise Interrupted(came[0] if came else signal.SIGINT) from None
    except SystemExit as error:
        signum = next((each for each in SIGNALS if each == error.code), None)
        if signum is None:
            raise
        raise Interrupted(signum) from None
    finally:
        signal.set_wakeup_fd(fd)
        os.close(mouth)
        for each, handler in before.items():
            signal.signal(each, handler)
