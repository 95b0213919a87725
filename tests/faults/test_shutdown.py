"""SIGTERM and Ctrl-C in every stage: all processes end within 30 s, and the same command resumes."""

import signal
from pathlib import Path

import pytest

from raykd.storage import row_store, schemas
from runs import finish, interrupt_when, parts, plan_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def command(stage: str, root: Path) -> list[str]:
    return [
        *[stage, str(ROOT / "configs/quickstart.yaml"), f"storage={root}", "dataset.num_train=200"],
        *["dataset.num_test=100", "train.checkpoint_every_steps=5", "arms={one: {prompt.strategy: ground_truth}}"],
    ]


# Starts two engines. In `make test`, test_sweeps.py sends SIGTERM while a scripted teacher scores.
@pytest.mark.slow
def test_interrupted_generation_resumes(tmp_path: Path):
    arguments = command("generate", tmp_path)
    interrupt_when(signal.SIGTERM, lambda: len(parts(tmp_path)) >= 1, arguments, tmp_path)
    kept = {path.name for path in parts(tmp_path)}
    finish(arguments, tmp_path)
    (completions,) = plan_of(arguments).required_sets
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION)
    assert len(set(rows["problem_id"].to_pylist())) == len(rows) == 200
    assert kept <= {path.name for path in parts(tmp_path)}


# Runs the quickstart. In `make test`, test_signals.py covers the signal handlers; nothing signals these stages.
@pytest.mark.slow
def test_interrupted_later_stages_resume(tmp_path: Path):
    arguments = command("run", tmp_path)
    plan = plan_of(arguments)
    checkpoints = plan.folder / "checkpoints"
    attention = plan.attention
    assert attention
    interrupt_when(signal.SIGINT, lambda: any(checkpoints.rglob("*.pt")), arguments, tmp_path)
    interrupt_when(signal.SIGTERM, lambda: len(parts(plan.predictions)) >= 1, arguments, tmp_path)
    interrupt_when(signal.SIGINT, lambda: attention.exists(), arguments, tmp_path)
    finish(arguments, tmp_path)
    assert plan_of(arguments).is_complete()
    # The base student and the student of the arm.
    for folder, schema, name in (
        (plan.predictions, schemas.PREDICTION, "prediction_id"),
        (attention, schemas.ATTENTION, "attention_id"),
    ):
        ids = row_store.read_rows(folder, schema)[name].to_pylist()
        assert len(ids) == len(set(ids)) == 200
