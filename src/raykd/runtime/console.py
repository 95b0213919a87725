"""Progress: what the user sees of a run, and the line that tells how far a stage is."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Self, TextIO

from raykd.storage import filesystem

# In an experiment's folder: what libraries have to say, and what faults were. In a bucket the name also tells whose.
_stream: TextIO | None = None


def print_status(message: str) -> None:
    """Shows a line to the user."""
    print(message, file=output_stream(), flush=True)


def output_stream() -> TextIO:
    """Where the user looks."""
    return _stream or sys.stderr


@contextmanager
def redirect_library_output(log: Path) -> Iterator[Path]:
    """Sends standard output and error to a file for a `with` block, but for what this module shows.

    Loggers take hold of `sys.stderr` whenever they are made, native code writes to the descriptor behind it, and Ray
    prints what a node has to say to `sys.stdout`: this quiets all of them alike, and loses nothing.

    Args:
        log: the file; in a bucket one of this process' own beside it, which is written on this machine, and copied at
            the end.

    Yields:
        the file that is written.
    """
    global _stream
    log, written = _log_paths(log)
    written.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    with (
        os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace") as shown,
        written.open("ab") as file,
    ):
        os.dup2(file.fileno(), 2)
        _stream = shown
        try:
            with redirect_stdout(sys.stderr):
                yield written
        finally:
            _stream = None
            sys.stderr.flush()
            os.dup2(shown.fileno(), 2)
            _copy_log(written, log)


def append_to_log(log: Path, text: str) -> Path:
    """Adds to a log what is known after libraries wrote to it.

    Args:
        log: as that of `libraries_write_to`.
        text: whole lines.

    Returns:
        the file that holds it; one of this machine where a bucket cannot be written.
    """
    log, written = _log_paths(log)
    with suppress(OSError):
        written.parent.mkdir(parents=True, exist_ok=True)
        with written.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    return _copy_log(written, log)


def _log_paths(log: Path) -> tuple[Path, Path]:
    """Where a log of this process is kept, and where it is written: nothing can be added to a file in a bucket."""
    if not filesystem.is_remote(log):
        return log, log
    own = log.with_name(f"{log.stem}-{socket.gethostname()}-{os.getpid()}{log.suffix}")
    return own, filesystem.scratch(log.parent) / own.name


def _copy_log(written: Path, log: Path) -> Path:
    """Copies what was written to where it is kept, and returns where it is."""
    if not filesystem.is_remote(log):
        return log
    # It is there in any case. Which errors a library has for wrong keys, names or networks is its own affair.
    with suppress(Exception):
        filesystem.put(log, written.read_bytes())
        return log
    return written


class ProgressBar:
    """Shows how far a stage is.

    On a terminal one line is written over and over; in a log a line is added now and then, so that a job's
    log stays short. The clock goes on while nothing happens, as when an engine loads.

    Args:
        label: what the stage does.
        total: how much there is to do, in `unit`s; None where that shows later (set `total` then).
        done: how much is there from an earlier run; it does not count into the rate.
        unit: what is counted.
        stream: where to write.
        log_every_s: seconds between lines where `stream` is no terminal.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "rows",
        stream: TextIO | None = None,
        log_every_s: float = 10,
    ):
        self._label, self.total, self._unit = label, total, unit
        self._done = done
        self._tokens = 0
        self._stream = stream or output_stream()
        self._terminal = self._stream.isatty()
        self._every_s = 0.2 if self._terminal else log_every_s
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._shown = float("-inf")
        self._last = ""
        self._over = threading.Event()
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        self._show()
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._show(last=True)

    def _tick(self) -> None:
        every_s = 1.0 if self._terminal else 6 * self._every_s
        while not self._over.wait(every_s):
            if time.monotonic() - self._shown >= every_s:
                self._show()

    def add(self, count: int, tokens: int = 0) -> None:
        """Counts what was just done: `count` units, and the tokens in them."""
        self._done += count
        if self._first is None:
            # Start-up is over: what is left goes at the rate from here on.
            self._first = (time.monotonic(), self._done)
        self._tokens += tokens
        if time.monotonic() - self._shown >= self._every_s:
            self._show()

    def note(self, line: str) -> None:
        """Shows a line of its own above."""
        with self._writing:
            self._stream.write(("\r\x1b[2K" if self._terminal else "") + line + "\n")
            self._stream.flush()

    def text(self) -> str:
        """The line as it stands now."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        if self.total is None:
            return f"{self._label}: starting  {_format_elapsed(seconds)} so far"
        parts = [f"{self._label}: {self._done:,}/{self.total:,} {self._unit}"]
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        if self._done >= self.total:
            parts.append(f"done in {_format_elapsed(seconds)}")
        elif self._first and self._done > self._first[1]:
            since, before = self._first
            rate = (self._done - before) / max(time.monotonic() - since, 1e-3)
            parts.append(f"{_format_elapsed((self.total - self._done) / rate)} left")
        else:
            parts.append(f"{_format_elapsed(seconds)} so far")
        return "  ".join(parts)

    def _show(self, last: bool = False) -> None:
        with self._writing:
            if self._over.is_set() and not last:
                return
            self._shown = time.monotonic()
            line = self.text()
            if self._terminal:
                self._stream.write("\r\x1b[2K" + line + ("\n" if last else ""))
            elif line != self._last:
                self._stream.write(line + "\n")
            self._last = line
            self._stream.flush()


def _format_elapsed(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
