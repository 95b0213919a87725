"""Stage timer: the seconds that completion sets took, over all attempts."""

import time
from collections.abc import Iterable
from pathlib import Path

from raykd.storage import files
from raykd.storage.paths import STAGE_TIME_FILE

WRITE_INTERVAL_S = 30


class StageTimer:
    """The seconds that completion sets took; sets that are generated together share them equally.

    The seconds are saved beside the rows while the stage runs, so that an attempt that is killed counts.

    Args:
        folders: of the completion sets that are generated together, from now on.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._started = self._last_save = time.monotonic()
        self._earlier_seconds: dict[Path, float] = {}
        for folder in folders:
            file = folder / STAGE_TIME_FILE
            self._earlier_seconds[folder] = float(files.read_json(file)["seconds"]) if file.exists() else 0.0

    def save(self) -> None:
        """Write the seconds of each set, at most every `WRITE_INTERVAL_S`."""
        if time.monotonic() < self._last_save + WRITE_INTERVAL_S:
            return
        self._last_save = time.monotonic()
        for folder in self._earlier_seconds:
            files.write_json(folder / STAGE_TIME_FILE, {"seconds": self.seconds(folder)})

    def seconds(self, folder: Path) -> float:
        """Return the seconds of a set up to now, rounded to tenths."""
        share = (time.monotonic() - self._started) / len(self._earlier_seconds)
        return round(self._earlier_seconds[folder] + share, 1)
