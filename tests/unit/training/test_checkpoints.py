"""Checkpoints: training never resumes from an incomplete one, and a damaged list does not fail a trial."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from raykd import compat
from raykd.config.training import Train
from raykd.errors import UserError
from raykd.storage import filesystem
from raykd.training import checkpoints


def checkpoint(run: Path, name: str, workers: int = 2, zero_stage: int = 2) -> Path:
    folder = run / name
    with tempfile.TemporaryDirectory() as temporary:
        for worker in range(workers):
            # Each worker writes its part to a separate folder before Ray Train copies it.
            part = Path(temporary) / f"part-{name}-{worker}"
            (part / "checkpoint").mkdir(parents=True)
            (part / "checkpoint" / f"rank_{worker}.pt").write_bytes(bytes([worker]) * 100)
            checkpoints.write_checksums(part, worker, workers, zero_stage)
            for file in part.rglob("*"):
                if file.is_file():
                    copy = folder / file.relative_to(part)
                    filesystem.put(copy, file.read_bytes())
    return folder


def write_list(run: Path, *names: str) -> Path:
    file = run / compat.CHECKPOINT_LIST
    file.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}))
    return file


@pytest.fixture
def run(storage: Path) -> Path:
    return storage / "trial"


def test_valid_list_is_kept(run: Path):
    folder, file = checkpoint(run, "checkpoint_2"), write_list(run, "checkpoint_2")
    assert checkpoints.repair(run) is None
    assert file.exists() and folder.exists()


def test_trial_without_checkpoints_has_nothing_to_resume_from(run: Path):
    assert checkpoints.repair(run) is None
    assert checkpoints.repair(run / "missing") is None


@pytest.mark.parametrize("content", ["", '{"checkpoint_results": [{"check', "[]", '{"checkpoint_results": 3}'])
def test_damaged_list_is_replaced_by_newest_complete_checkpoint(run: Path, content: str):
    complete, damaged = checkpoint(run, "checkpoint_1"), checkpoint(run, "checkpoint_2")
    (damaged / "checkpoint" / "rank_1.pt").write_bytes(b"\x01" * 50)
    file = write_list(run)
    file.write_text(content)
    assert checkpoints.repair(run) == complete
    assert not file.exists() and not damaged.exists()
    # A second interruption before the next checkpoint.
    assert checkpoints.repair(run) == complete


@pytest.mark.parametrize("missing", ["checkpoint/rank_1.pt", "worker-1.json"])
def test_checkpoint_without_part_of_a_worker_is_incomplete(run: Path, missing: str):
    folder = checkpoint(run, "checkpoint_1")
    assert checkpoints.is_complete(folder)
    (folder / missing).unlink()
    write_list(run, "checkpoint_1")
    assert not checkpoints.is_complete(folder)
    assert checkpoints.repair(run) is None
    assert not folder.exists()


def test_storage_error_removes_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch):
    folder, file = checkpoint(run, "checkpoint_1"), write_list(run, "checkpoint_1")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.hashing, "file_digest", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(OSError, match="I/O"):
            checkpoints.repair(run)
    assert folder.exists() and file.exists()


def test_changed_checkpoint_is_incomplete(run: Path):
    folder = checkpoint(run, "checkpoint_1")
    file = folder / "checkpoint" / "rank_0.pt"
    file.write_bytes(b"\x02" * 100)
    assert not checkpoints.is_complete(folder)


@pytest.mark.parametrize(
    "workers, zero_stage, train",
    [
        (2, 2, {"num_workers": 4}),
        (2, 2, {"num_workers": 2, "zero_stage": 1}),
        (2, 3, {"num_workers": 2, "zero_stage": 0, "dtype": "float32"}),
        (1, 0, {"zero_stage": 2}),
    ],
)
def test_checkpoint_of_another_layout_is_refused(run: Path, workers: int, zero_stage: int, train: dict[str, Any]):
    checkpoint(run, "checkpoint_1", workers, zero_stage)
    with pytest.raises(UserError) as refused:
        checkpoints.check_layout(run, Train(batch_size=8, **train))
    assert f"train.num_workers={workers} train.zero_stage={zero_stage}" in str(refused.value)
    assert str(run) in str(refused.value)


@pytest.mark.parametrize(
    "workers, zero_stage, train",
    [
        (2, 2, {"num_workers": 2}),
        # Any number of workers can read a checkpoint without shards.
        (2, 0, {"num_workers": 4, "zero_stage": 0, "dtype": "float32"}),
    ],
)
def test_checkpoint_of_same_layout_is_accepted(run: Path, workers: int, zero_stage: int, train: dict[str, Any]):
    checkpoints.check_layout(run, Train(batch_size=8, **train))
    checkpoint(run, "checkpoint_1", workers, zero_stage)
    # The copy of the newest checkpoint was interrupted.
    filesystem.put(run / "checkpoint_2" / "checkpoint" / "rank_0.pt", b"")
    checkpoints.check_layout(run, Train(batch_size=8, **train))
