"""Loss of a worker or a node during training: the trial resumes from its last checkpoint, with the same adapter."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from clusters import cluster, joining
from raykd.storage import files
from raykd.storage.schemas import COMPLETE, FAILED, STOPPED
from raykd.training.trial import TrialSpec
from runs import RAYKD, finish, plan_of, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)
STEPS, EVERY = 48, 5


def command(root: Path, *more: str) -> list[str]:
    return [
        *[
            "train",
            str(ROOT / "configs/quickstart.yaml"),
            f"storage={root}",
            "arms={own: {targets.source: reference}}",
        ],
        *["dataset.num_train=96", "train.batch_size=8", "train.micro_batch_size=4", "train.epochs=4"],
        *["train.num_workers=2", "train.zero_stage=0", f"train.checkpoint_every_steps={EVERY}", *more],
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrialSpec:
    root = tmp_path_factory.mktemp("undisturbed")
    return finish(command(root), root).plan.trials[0]


def curve(trial: TrialSpec) -> list[dict]:
    file = trial.folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def has_come_far(trial: TrialSpec) -> bool:
    """Return whether a trial has passed its second checkpoint and is not near its end."""
    points = curve(trial)
    return bool(points) and 2 * EVERY < points[-1]["step"] < STEPS - EVERY


def goes_on(trial: TrialSpec, run: subprocess.Popen[str], disturb: Callable[[], None]) -> None:
    """Disturb a run; it must succeed without starting again from the first step."""
    disturb()
    least = len(curve(trial))
    deadline = time.monotonic() + 400
    while run.poll() is None:
        assert time.monotonic() < deadline, "it did not go on"
        least = min(least, len(curve(trial)))
        time.sleep(0.1)
    assert run.returncode == 0
    assert least >= EVERY, "it started again"


def check_the_same(trial: TrialSpec, undisturbed: TrialSpec) -> None:
    ours, theirs = curve(trial), curve(undisturbed)
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == list(range(1, STEPS + 1))
    assert [point["loss"] for point in ours] == pytest.approx([point["loss"] for point in theirs], rel=1e-3)
    weights = [
        safetensors.torch.load_file(each.folder / "adapter" / "adapter_model.safetensors")
        for each in (trial, undisturbed)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-3), name


# In `make test`, test_sweeps.py kills a worker.
@pytest.mark.slow
def test_killed_worker_resumes_from_checkpoint(undisturbed: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path)
    (trial,) = plan_of(arguments).trials
    with started(lambda: has_come_far(trial), arguments, tmp_path) as run:

        def kill() -> None:
            below = psutil.Process(run.pid).children(recursive=True)
            workers = [each for each in below if "RayTrainWorker" in " ".join(each.cmdline())]
            assert len(workers) == 2
            workers[0].kill()

        goes_on(trial, run, kill)
    check_the_same(trial, undisturbed)


@pytest.mark.slow
def test_node_loss_resumes_training_on_replacement_node(undisturbed: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path)
    (trial,) = plan_of(arguments).trials
    with cluster(1) as nodes, started(lambda: has_come_far(trial), arguments, tmp_path, joining(nodes)) as run:

        def lose() -> None:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            time.sleep(40)
            assert run.poll() is None, "it waits"
            assert len(curve(trial)) < STEPS
            nodes.add_node(num_cpus=1)

        goes_on(trial, run, lose)
    check_the_same(trial, undisturbed)


@pytest.mark.slow
def test_node_loss_resumes_elastic_training_with_fewer_workers(undisturbed: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path, "train.min_workers=1")
    (trial,) = plan_of(arguments).trials
    with cluster(1) as nodes, started(lambda: has_come_far(trial), arguments, tmp_path, joining(nodes)) as run:
        goes_on(trial, run, lambda: nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False))
    check_the_same(trial, undisturbed)


@pytest.mark.slow
def test_failed_trial_does_not_stop_other_trials(tmp_path: Path):
    # Every row is longer.
    arms = "arms={own: {targets.source: reference}, nothing: {targets.source: reference, train.max_length: 2}}"
    sweep = "sweep={space: {train.learning_rate: {grid: [0.005, 0.002]}}, metric: loss, num_validations: 2}"
    arguments = [
        *["sweep", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", arms, sweep, "attention=null"],
        *["dataset.num_train=48", "dataset.num_validation=8", "dataset.num_test=8", "train.max_failures=0"],
    ]
    done = subprocess.run([RAYKD, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr
    assert "every example was filtered out (" in done.stdout
    for trial in plan_of(arguments).trials:
        record = files.read_json(trial.folder / "trial.json")
        if trial.arm_name == "nothing":
            assert record["status"] == FAILED and "every example was filtered out (" in record["error"]
        else:
            assert record["status"] in (COMPLETE, STOPPED)
