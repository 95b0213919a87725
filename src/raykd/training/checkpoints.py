"""Checkpoints: which of a trial's is whole, whatever was going on when it was written.

Ray Train copies a checkpoint file by file, and writes its list of checkpoints (`checkpoint_manager_snapshot.json`) in
place. A full disk, or a process that is killed at that moment, leaves half of either; a list that cannot be read ends
the trial for good. So each worker notes beside its files what they hold.
"""

from pathlib import Path

from raykd import compat
from raykd.storage import filesystem, hashing
from raykd.storage.files import read_json, write_json


def write_checksums(folder: Path, worker: int, num_workers: int) -> None:
    """Notes what a worker's files hold, beside them.

    Args:
        folder: the files of the worker's part.
        worker: its rank.
        num_workers: how many there are.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    held = {str(file.relative_to(folder)): hashing.file_digest(file) for file in files}
    write_json(folder / _checksum_file(worker), {"num_workers": num_workers, "files": held})


def is_whole(folder: Path) -> bool:
    """Whether all workers' parts are there, as they were written."""
    try:
        num_workers = read_json(folder / _checksum_file(0))["num_workers"]
        held = [read_json(folder / _checksum_file(worker))["files"] for worker in range(num_workers)]
        return all(hashing.file_digest(folder / name) == each[name] for each in held for name in each)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def repair(run: Path) -> Path | None:
    """Takes Ray Train's list of checkpoints away where it cannot be read or names one that is not whole.

    Args:
        run: the folder in which Ray Train keeps a trial's checkpoints.

    Returns:
        The checkpoint to go on from where there is no list: the newest that is whole, if any. None where there is a
        list: Ray Train finds it there.
    """
    file = run / compat.CHECKPOINT_LIST
    if file.exists():
        if _is_good(file):
            return None
        file.unlink()
    # Their names hold the time.
    there = [each for each in reversed(filesystem.list_dirs(run)) if each.name.startswith(compat.CHECKPOINT_PREFIX)]
    whole = next((folder for folder in there if is_whole(folder)), None)
    for folder in there:
        if folder != whole:
            filesystem.remove(folder)
    return whole


def _is_good(file: Path) -> bool:
    try:
        named = compat.checkpoint_names(read_json(file))
    except (ValueError, KeyError, TypeError):
        return False
    return all(is_whole(file.parent / name) for name in named)


def _checksum_file(worker: int) -> str:
    return f"worker-{worker}.json"
