"""Checkpoints: half of one, or half of Ray Train's list of them, is never gone on from, and ends no trial."""

import json
import tempfile
from pathlib import Path

import pytest

from raykd import compat
from raykd.storage import filesystem
from raykd.training import checkpoints


def checkpoint(run: Path, name: str, workers: int = 2) -> Path:
    folder = run / name
    with tempfile.TemporaryDirectory() as made:
        for worker in range(workers):
            # Each worker's part is a folder of its own before Ray Train copies it.
            part = Path(made) / f"part-{name}-{worker}"
            (part / "checkpoint").mkdir(parents=True)
            (part / "checkpoint" / f"rank_{worker}.pt").write_bytes(bytes([worker]) * 100)
            checkpoints.write_checksums(part, worker, workers)
            for file in part.rglob("*"):
                if file.is_file():
                    copy = folder / file.relative_to(part)
                    filesystem.make_folder(copy.parent)
                    copy.write_bytes(file.read_bytes())
    return folder


def listed(run: Path, *names: str) -> Path:
    file = run / compat.CHECKPOINT_LIST
    file.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}))
    return file


@pytest.fixture
def run(place: Path) -> Path:
    folder = place / "trial"
    filesystem.make_folder(folder)
    return folder


def test_a_good_list_is_left_to_ray(run: Path):
    folder, file = checkpoint(run, "checkpoint_2"), listed(run, "checkpoint_2")
    assert checkpoints.repair(run) is None
    assert file.exists() and folder.exists()


def test_nothing_there_is_nothing_to_go_on_from(run: Path):
    assert checkpoints.repair(run) is None
    assert checkpoints.repair(run / "not there") is None


@pytest.mark.parametrize("left", ["", '{"checkpoint_results": [{"check', "[]", '{"checkpoint_results": 3}'])
def test_half_a_list_gives_way_to_the_newest_whole_checkpoint(run: Path, left: str):
    whole, half = checkpoint(run, "checkpoint_1"), checkpoint(run, "checkpoint_2")
    (half / "checkpoint" / "rank_1.pt").write_bytes(b"\x01" * 50)
    file = listed(run)
    file.write_text(left)
    assert checkpoints.repair(run) == whole
    assert not file.exists() and not half.exists()
    # Broken off again before there is a new one.
    assert checkpoints.repair(run) == whole


@pytest.mark.parametrize("lost", ["checkpoint/rank_1.pt", "worker-1.json"])
def test_a_checkpoint_without_one_workers_part_is_not_whole(run: Path, lost: str):
    folder = checkpoint(run, "checkpoint_1")
    assert checkpoints.is_complete(folder)
    (folder / lost).unlink()
    listed(run, "checkpoint_1")
    assert not checkpoints.is_complete(folder)
    assert checkpoints.repair(run) is None
    assert not folder.exists()


def test_a_storage_that_hiccups_costs_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch):
    folder, file = checkpoint(run, "checkpoint_1"), listed(run, "checkpoint_1")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.storage, "file_digest", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(OSError, match="I/O"):
            checkpoints.repair(run)
    assert folder.exists() and file.exists()


def test_one_that_was_altered_is_not_whole(run: Path):
    folder = checkpoint(run, "checkpoint_1")
    file = folder / "checkpoint" / "rank_0.pt"
    file.write_bytes(b"\x02" * 100)
    assert not checkpoints.is_complete(folder)
