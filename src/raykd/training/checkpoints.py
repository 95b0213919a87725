"""Checksums of a trial's checkpoints, and the repair of Ray Train's list of them.

Ray Train copies a checkpoint file by file, and writes its list of checkpoints (`checkpoint_manager_snapshot.json`) in
place. A full disk or a killed process leaves either incomplete, and Ray Train fails on a list that it cannot read.
Each worker therefore writes checksums of its files beside them.
"""

from pathlib import Path

from raykd import compat
from raykd.storage import filesystem, hashing
from raykd.storage.files import read_json, write_json


def write_checksums(folder: Path, worker: int, num_workers: int) -> None:
    """Write the checksums of a worker's part of a checkpoint beside its files.

    Args:
        folder: the worker's part.
        worker: its rank.
        num_workers: number of workers.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    checksums = {str(file.relative_to(folder)): hashing.file_digest(file) for file in files}
    write_json(folder / _checksum_file(worker), {"num_workers": num_workers, "files": checksums})


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint has the parts of all workers, unchanged."""
    try:
        num_workers = read_json(folder / _checksum_file(0))["num_workers"]
        for worker in range(num_workers):
            checksums = read_json(folder / _checksum_file(worker))["files"]
            if any(hashing.file_digest(folder / name) != checksum for name, checksum in checksums.items()):
                return False
        return True
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def repair(run: Path) -> Path | None:
    """Remove Ray Train's list of checkpoints if it is damaged or names an incomplete one, and find one to resume from.

    Without a list, incomplete checkpoints and all but the newest complete one are removed.

    Args:
        run: the folder in which Ray Train keeps a trial's checkpoints.

    Returns:
        The newest complete checkpoint, if any; None if the list is valid, in which case Ray Train resumes from it.
    """
    file = run / compat.CHECKPOINT_LIST
    if file.exists():
        if _is_valid(file):
            return None
        file.unlink()
    # Sorted by name, which has the time of the checkpoint.
    folders = [each for each in reversed(filesystem.list_dirs(run)) if each.name.startswith(compat.CHECKPOINT_PREFIX)]
    newest = next((folder for folder in folders if is_complete(folder)), None)
    for folder in folders:
        if folder != newest:
            filesystem.remove(folder)
    return newest


def _is_valid(file: Path) -> bool:
    try:
        names = compat.checkpoint_names(read_json(file))
    except (ValueError, KeyError, TypeError):
        return False
    return all(is_complete(file.parent / name) for name in names)


def _checksum_file(worker: int) -> str:
    return f"worker-{worker}.json"
