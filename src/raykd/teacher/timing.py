"""Spent: how long sets of completions took, all the attempts at them together."""

import time
from collections.abc import Iterable
from pathlib import Path

from raykd.storage import files
from raykd.storage.paths import STAGE_TIME_FILE

WRITE_INTERVAL_S = 30


class StageTimer:
    """The seconds that sets of completions took, each an equal share of every attempt's.

    They are noted on the way, beside the rows, so that an attempt that is killed counts.

    Args:
        folders: of the sets that are worked on together, from now on.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._started = self._noted = time.monotonic()
        self._before: dict[Path, float] = {}
        for folder in folders:
            file = folder / STAGE_TIME_FILE
            self._before[folder] = float(files.read_json(file)["seconds"]) if file.exists() else 0.0

    def note(self) -> None:
        """Writes them down, now and then."""
        if time.monotonic() < self._noted + WRITE_INTERVAL_S:
            return
        self._noted = time.monotonic()
        for folder in self._before:
            files.write_json(folder / STAGE_TIME_FILE, {"seconds": self.of(folder)})

    def of(self, folder: Path) -> float:
        """Those of a set, up to now."""
        return round(self._before[folder] + (time.monotonic() - self._started) / len(self._before), 1)
