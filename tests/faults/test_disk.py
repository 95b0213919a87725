"""A full disk: a clear error, no truncated file is read, and the same command resumes after space is freed."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from raykd.storage import files, filesystem, row_store, schemas
from runs import finish, parts, plan_of, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a separate file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a separate file system needs the right to mount one: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        # Lazily, because a killed process may still have a file open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Fill the disk during the block."""
    filler = disk / "filler"
    file = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    os.write(file, b"x" * size)
            except OSError:
                continue
        yield
    finally:
        os.close(file)
        filler.unlink()


ROWS = pa.table({"row_id": ["a", "b"], "error": ["", ""]})


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: files.write_json(folder / "run.json", {"new": "x" * 10_000}),
        lambda folder: files.write_table(folder / "all.parquet", ROWS),
        lambda folder: row_store.write_part(folder, ROWS),
        lambda folder: filesystem.put(folder / "picture.png", b"x" * 10_000),
    ],
)
def test_failed_write_on_a_full_disk_keeps_the_old_file(disk: Path, write: Callable[[Path], object]):
    files.write_json(disk / "run.json", {"old": True})
    before = {path.name for path in disk.iterdir()}
    with filled(disk), pytest.raises(OSError, match=rf"No space left on device: '{disk}/"):
        write(disk)
    assert {path.name for path in disk.iterdir()} == before
    assert files.read_json(disk / "run.json") == {"old": True}
    write(disk)


def command(root: Path) -> list[str]:
    return [
        *["run", str(ROOT / "configs/quickstart.yaml"), f"storage={root}", "dataset.num_train=200"],
        *["dataset.num_test=60", "train.checkpoint_every_steps=5", "train.epochs=6", "attention=null"],
        "arms={one: {prompt.strategy: ground_truth}}",
    ]


def check_disk_error(condition: Callable[[], bool], arguments: list[str], cwd: Path, disk: Path) -> None:
    with started(condition, arguments, cwd) as run, filled(disk):
        assert run.wait(300) == 1
    output = (cwd / "started.log").read_text()
    last = output.splitlines()[-1]
    assert "raykd: a file cannot be read or written: [Errno 28] No space left on device" in last
    assert "free disk space" in last
    assert "Traceback" not in output


# Runs the quickstart twice. In `make test`, the test above covers writes to a full disk, test_errors.py the message.
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_resumes_after_space_is_freed(disk: Path, tmp_path: Path):
    arguments = command(disk / "storage")
    plan = plan_of(arguments)
    checkpoints = plan.folder / "checkpoints"
    check_disk_error(lambda: len(parts(disk)) >= 1, arguments, tmp_path, disk)
    check_disk_error(lambda: any(checkpoints.rglob("*.pt")), arguments, tmp_path, disk)
    check_disk_error(lambda: len(parts(plan.predictions)) >= 1, arguments, tmp_path, disk)
    done = finish(arguments, tmp_path).plan
    (completions,), (trial,) = done.required_sets, done.trials
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION)
    assert len(set(rows["problem_id"].to_pylist())) == len(rows) == 200
    answers = row_store.read_rows(done.predictions, schemas.PREDICTION)
    assert len(set(answers["prediction_id"].to_pylist())) == len(answers) == 120
    steps = [point["step"] for point in files.read_json_lines(trial.folder / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == files.read_json(trial.folder / "trial.json")["steps"]
    # The reference: the same run on a disk with free space.
    reference = finish(command(tmp_path / "reference"), tmp_path).plan
    expected = row_store.read_rows(reference.predictions, schemas.PREDICTION)
    columns = ["prediction_id", "completion"]
    assert answers.select(columns).sort_by(columns[0]).equals(expected.select(columns).sort_by(columns[0]))
