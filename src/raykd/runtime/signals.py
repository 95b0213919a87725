"""Signals: Ctrl-C and SIGTERM shut a run down gracefully and in bounded time."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raykd.runtime.console import print_status

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Process managers (Kubernetes, by default) send SIGKILL 30 s after SIGTERM.
GRACE_S = 25.0


class Interrupted(KeyboardInterrupt):
    """A signal interrupted the run. `status` is the exit status, 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Unwind a `with` block at the first signal; exit at once at the second signal or after `GRACE_S`.

    `ray.init` installs its own handler for SIGTERM, and Ray's libraries call it. So a thread watches the descriptor of
    `signal.set_wakeup_fd`, which Python writes each signal to, whichever handler is installed.

    Raises:
        Interrupted: if a signal arrived.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    received: list[int] = []

    def listen() -> None:
        while True:
            is_readable, _, _ = select.select([read_end], [], [], GRACE_S if received else None)
            # At the end of GRACE_S the first signal counts as repeated.
            data = os.read(read_end, 1) if is_readable else bytes(received)
            if not data:
                os.close(read_end)
                return
            if data[0] not in SIGNALS:
                continue
            if received:
                os._exit(128 + received[0])
            received.append(data[0])
            print_status("stopping: shutting down engines and workers")

    def interrupt(signum: int, _: Any) -> None:
        raise Interrupted(signum)

    previous_handlers = {signum: signal.signal(signum, interrupt) for signum in SIGNALS}
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        # Raised by another handler, or by a library that converted Interrupted.
        raise Interrupted(received[0] if received else signal.SIGINT) from None
    except SystemExit as error:
        signum = next((known for known in SIGNALS if known == error.code), None)
        if signum is None:
            raise
        raise Interrupted(signum) from None
    finally:
        signal.set_wakeup_fd(previous_fd)
        os.close(write_end)
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
