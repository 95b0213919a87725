"""SIGTERM and Ctrl-C in every stage: all ends within half a minute, and the same command goes on."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from raykd import records, storage
from runs import finish, parts, plan_of, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def command(stage: str, root: Path) -> list[str]:
    return [
        *[stage, str(ROOT / "configs/quickstart.yaml"), f"storage={root}", "problems.num_train=200"],
        *["problems.num_test=100", "train.checkpoint_every_steps=5", "arms={one: {prompt.strategy: ground_truth}}"],
    ]


def end(condition, arguments: list[str], cwd: Path, signum: int) -> None:
    """Sends a signal when a condition holds; the driver and all that it started must be gone within 30 s."""
    with started(condition, arguments, cwd) as run:
        family = psutil.Process(run.pid).children(recursive=True)
        since = time.monotonic()
        run.send_signal(signum)
        assert run.wait(30) == 128 + signum
        _, alive = psutil.wait_procs(family, timeout=max(0, since + 30 - time.monotonic()))
        for process in alive:
            process.kill()
        assert not alive
    said = (cwd / "started.log").read_text()
    assert "the same command goes on from here: raykd" in said
    assert "Traceback" not in said


def test_while_it_generates(tmp_path: Path):
    arguments = command("generate", tmp_path)
    end(lambda: len(parts(tmp_path)) >= 1, arguments, tmp_path, signal.SIGTERM)
    kept = {path.name for path in parts(tmp_path)}
    finish(arguments, tmp_path)
    (request,) = plan_of(arguments).requests
    rows = storage.read_rows(request.folder, records.COMPLETION)
    assert len(set(rows["problem_id"].to_pylist())) == len(rows) == 200
    assert kept <= {path.name for path in parts(tmp_path)}


@pytest.mark.slow
def test_in_every_later_stage(tmp_path: Path):
    arguments = command("run", tmp_path)
    plan = plan_of(arguments)
    checkpoints = plan.folder / "checkpoints"
    attention = plan.attention
    assert attention
    end(lambda: any(checkpoints.rglob("*.pt")), arguments, tmp_path, signal.SIGINT)
    end(lambda: len(parts(plan.predictions)) >= 1, arguments, tmp_path, signal.SIGTERM)
    end(lambda: attention.exists(), arguments, tmp_path, signal.SIGINT)
    finish(arguments, tmp_path)
    assert plan_of(arguments).is_complete()
    # The untouched student's and the arm's.
    for folder, schema, name in (
        (plan.predictions, records.PREDICTION, "prediction_id"),
        (attention, records.ATTENTION, "attention_id"),
    ):
        ids = storage.read_rows(folder, schema)[name].to_pylist()
        assert len(ids) == len(set(ids)) == 200
