"""Checksums of a trial's checkpoints, and the repair of Ray Train's list of them.

Ray Train copies a checkpoint file by file, and writes its list of checkpoints (`checkpoint_manager_snapshot.json`) in
place. A full disk or a killed process leaves either incomplete, and Ray Train fails on a list that it cannot read.
Each worker therefore writes checksums of its files beside them.
"""

from pathlib import Path

from raykd import compat
from raykd.config.training import Train
from raykd.errors import UserError
from raykd.storage import filesystem, hashing
from raykd.storage.files import read_json, write_json


def write_checksums(folder: Path, worker: int, num_workers: int, zero_stage: int) -> None:
    """Write the checksums of a worker's part of a checkpoint beside its files.

    Args:
        folder: the worker's part.
        worker: its rank.
        num_workers: number of workers.
        zero_stage: the ZeRO stage, which determines the format.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    checksums = {str(file.relative_to(folder)): hashing.file_digest(file) for file in files}
    layout = {"num_workers": num_workers, "zero_stage": zero_stage}
    write_json(folder / _checksum_file(worker), {**layout, "files": checksums})


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
    folders = _folders(run)
    newest = next((folder for folder in folders if is_complete(folder)), None)
    for folder in folders:
        if folder != newest:
            filesystem.remove(folder)
    return newest


def check_layout(run: Path, train: Train) -> None:
    """Check that a trial can be resumed from its newest checkpoint by the configured workers.

    DeepSpeed shards a checkpoint of ZeRO stage 1, 2 or 3 over the workers that write it.

    Args:
        run: the folder in which Ray Train keeps the trial's checkpoints; it need not exist.
        train: the trial's section `train`.

    Raises:
        UserError: if the ZeRO stage, or with shards the number of workers, is another one.
    """
    layout = next((layout for folder in _folders(run) if (layout := _layout(folder))), None)
    if layout is None:
        return
    num_workers, zero_stage = layout
    if zero_stage != train.zero_stage or (zero_stage and num_workers != train.num_workers):
        raise UserError(
            f"trial {run.name} was interrupted with train.num_workers={num_workers} train.zero_stage={zero_stage}, and "
            f"its checkpoint cannot be read with train.num_workers={train.num_workers} "
            f"train.zero_stage={train.zero_stage}: resume with the former values, or delete {run} to train it from the "
            "start"
        )


def _layout(folder: Path) -> tuple[int, int] | None:
    """Return a checkpoint's number of workers and its ZeRO stage; None if it is incomplete."""
    try:
        written = read_json(folder / _checksum_file(0))
        return written["num_workers"], written["zero_stage"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None


def _folders(run: Path) -> list[Path]:
    """Return the checkpoints of a trial, the newest first. Their names have the time."""
    folders = filesystem.list_dirs(run)
    return [folder for folder in reversed(folders) if folder.name.startswith(compat.CHECKPOINT_PREFIX)]


def _is_valid(file: Path) -> bool:
    try:
        names = compat.checkpoint_names(read_json(file))
    except (ValueError, KeyError, TypeError):
        return False
    return all(is_complete(file.parent / name) for name in names)


def _checksum_file(worker: int) -> str:
    return f"worker-{worker}.json"
