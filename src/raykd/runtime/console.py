"""Console: status lines, the progress bar, and the log file that takes the output of libraries."""

import io
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from raykd.display import display
from raykd.storage import filesystem

# The user's terminal while standard error is redirected to the log.
_stream: TextIO | None = None


class Output:
    """A text stream for the user whose writes never fail.

    The reader of a pipe may be gone (`raykd run FILE 2>&1 | head`), and the disk of a log may be full. Neither is a
    reason to lose a run: after the first failure the output is discarded.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return its number of characters."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            discard_output(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _SafeRecord(logging.LogRecord):
    """A log record whose message cannot control the terminal: libraries log names and texts from models and data."""

    def getMessage(self) -> str:
        return display(super().getMessage(), multiline=True)


def make_output_safe() -> None:
    """Make the output of this process safe for any terminal, also that of libraries that log or warn."""
    for stream in (sys.stdout, sys.stderr):
        # The tables have characters that a terminal's encoding may lack.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_SafeRecord)
    format_warning = warnings.formatwarning

    def safe_format(*arguments: Any, **options: Any) -> str:
        return display(format_warning(*arguments, **options), multiline=True)

    if format_warning.__name__ != safe_format.__name__:
        warnings.formatwarning = safe_format


def discard_output(stream: TextIO) -> None:
    """Redirect a stream to the null device, also what its buffer still holds."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def print_status(message: str) -> None:
    """Print a line for the user, on standard error."""
    stream = output_stream()
    stream.write(display(message, multiline=True) + "\n")
    stream.flush()


def print_result(text: str) -> None:
    """Print what a command was asked for, on standard output."""
    stream = Output(sys.stdout)
    stream.write(display(text, multiline=True) + "\n")
    stream.flush()


def output_stream() -> Output:
    """Return the stream for the user's output: standard error, or the terminal while it is redirected."""
    return Output(_stream or sys.stderr)


@contextmanager
def redirect_library_output(log: Path) -> Iterator[Path]:
    """Redirect standard output and error to a log file for a `with` block, except for this module's output.

    Loggers keep a reference to `sys.stderr`, native code writes to its file descriptor, and Ray prints the output of
    nodes to `sys.stdout`. The redirection covers all three.

    Args:
        log: the log file. For a bucket, a local file is written and copied at the end, next to `log` and with the
            host's name and the process id in its name.

    Yields:
        The local file.
    """
    global _stream
    log, written = _log_paths(log)
    written.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    with (
        os.fdopen(
            os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding or "utf-8", errors="backslashreplace"
        ) as terminal,
        written.open("ab") as file,
    ):
        os.dup2(file.fileno(), 2)
        _stream = terminal
        try:
            with redirect_stdout(sys.stderr):
                yield written
        finally:
            _stream = None
            sys.stderr.flush()
            os.dup2(terminal.fileno(), 2)
            Output(terminal).flush()
            _copy_log(written, log)


def append_to_log(log: Path, text: str) -> Path | None:
    """Append text to a log file.

    Args:
        log: the log file, as for `redirect_library_output`.
        text: complete lines.

    Returns:
        The file that holds the text; a local file if the bucket cannot be written; None if nothing was written.
    """
    log, written = _log_paths(log)
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        with written.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return _copy_log(written, log)


def _log_paths(log: Path) -> tuple[Path, Path]:
    """Return the final place of this process' log, and the local file to write: files in a bucket cannot grow."""
    if not filesystem.is_remote(log):
        return log, log
    process_log = log.with_name(f"{log.stem}-{socket.gethostname()}-{os.getpid()}{log.suffix}")
    return process_log, filesystem.scratch(log.parent) / process_log.name


def _copy_log(written: Path, log: Path) -> Path:
    """Copy the local file of a log to its final place; return that place, or the local file if copying failed."""
    if not filesystem.is_remote(log):
        return log
    # Each bucket library raises its own exceptions for wrong credentials, names and networks.
    with suppress(Exception):
        filesystem.put(log, written.read_bytes())
        return log
    return written


class ProgressBar:
    """The progress of a stage: count, rate and remaining time.

    On a terminal one line is rewritten. In a log a line is added every `log_every_s`, so that the log of a job stays
    short. The elapsed time is also updated while nothing is counted, as when an engine loads.

    Args:
        label: name of the stage.
        total: number of units of the whole stage; None if it is not known yet (set the attribute `total` later).
        done: number of units from earlier runs; they do not count for the rate.
        unit: plural name of a unit.
        stream: the stream to write to; `output_stream()` by default.
        log_every_s: seconds between lines if `stream` is not a terminal.
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
        self._stream = Output(stream) if stream else output_stream()
        self._is_terminal = self._stream.isatty()
        self._interval_s = 0.2 if self._is_terminal else log_every_s
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._shown_at = float("-inf")
        self._last = ""
        self._is_over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._show()
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._show(last=True)

    def _tick(self) -> None:
        interval_s = 1.0 if self._is_terminal else 6 * self._interval_s
        while not self._is_over.wait(interval_s):
            if time.monotonic() - self._shown_at >= interval_s:
                self._show()

    def add(self, count: int, tokens: int = 0) -> None:
        """Add completed work.

        Args:
            count: number of completed units.
            tokens: number of tokens in them.
        """
        self._done += count
        if self._first is None:
            # The rate is measured from here on, without the time for start-up.
            self._first = (time.monotonic(), self._done)
        self._tokens += tokens
        if time.monotonic() - self._shown_at >= self._interval_s:
            self._show()

    def note(self, line: str) -> None:
        """Print a separate line above the progress line."""
        with self._lock:
            self._stream.write(("\r\x1b[2K" if self._is_terminal else "") + display(line, multiline=True) + "\n")
            self._stream.flush()

    def text(self) -> str:
        """Return the current progress line."""
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
        with self._lock:
            if self._is_over.is_set() and not last:
                return
            self._shown_at = time.monotonic()
            line = self.text()
            if self._is_terminal:
                self._stream.write("\r\x1b[2K" + line + ("\n" if last else ""))
            elif line != self._last:
                self._stream.write(line + "\n")
            self._last = line
            self._stream.flush()


def _format_elapsed(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
