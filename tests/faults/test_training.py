"""Loss of a worker or a node during training: the trial resumes from its last checkpoint, with the same adapter."""

import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from clusters import cluster, cluster_env
from raykd.storage import files
from raykd.storage.paths import ExperimentPaths
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
            "arms={one: {targets.source: reference}}",
        ],
        *["dataset.num_train=96", "train.batch_size=8", "train.micro_batch_size=4", "train.epochs=4"],
        *["train.num_workers=2", "train.zero_stage=0", f"train.checkpoint_every_steps={EVERY}", *more],
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrialSpec:
    root = tmp_path_factory.mktemp("uninterrupted")
    return finish(command(root), root).plan.trials[0]


def curve(trial: TrialSpec) -> list[dict]:
    file = trial.folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_past_second_checkpoint(trial: TrialSpec) -> bool:
    """Return whether a trial has passed its second checkpoint and is not near its end."""
    points = curve(trial)
    return bool(points) and 2 * EVERY < points[-1]["step"] < STEPS - EVERY


def check_resumption(trial: TrialSpec, run: subprocess.Popen[str], inject_fault: Callable[[], None]) -> None:
    """Inject a fault into a run; it must succeed without repeating the first steps."""
    inject_fault()
    least = len(curve(trial))
    deadline = time.monotonic() + 400
    while run.poll() is None:
        assert time.monotonic() < deadline, "the training did not finish"
        least = min(least, len(curve(trial)))
        time.sleep(0.1)
    assert run.returncode == 0
    assert least >= EVERY, "the training started from its first step"


def check_equal(trial: TrialSpec, uninterrupted: TrialSpec) -> None:
    resumed, expected = curve(trial), curve(uninterrupted)
    assert [point["step"] for point in resumed] == [point["step"] for point in expected] == list(range(1, STEPS + 1))
    assert [point["loss"] for point in resumed] == pytest.approx([point["loss"] for point in expected], rel=1e-3)
    weights = [
        safetensors.torch.load_file(each.folder / "adapter" / "adapter_model.safetensors")
        for each in (trial, uninterrupted)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-3), name


# Trains twice. In `make test`, test_sweeps.py kills the workers of a trial.
@pytest.mark.slow
def test_killed_worker_resumes_from_checkpoint(uninterrupted: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path)
    (trial,) = plan_of(arguments).trials
    with started(lambda: is_past_second_checkpoint(trial), arguments, tmp_path) as run:

        def kill() -> None:
            descendants = psutil.Process(run.pid).children(recursive=True)
            workers = [each for each in descendants if "RayTrainWorker" in " ".join(each.cmdline())]
            assert len(workers) == 2
            workers[0].kill()

        check_resumption(trial, run, kill)
    check_equal(trial, uninterrupted)


# Trains for a minute. Nothing in `make test` removes a node during training.
@pytest.mark.slow
def test_node_loss_resumes_training_on_replacement_node(uninterrupted: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path)
    (trial,) = plan_of(arguments).trials
    with (
        cluster(1) as nodes,
        started(lambda: is_past_second_checkpoint(trial), arguments, tmp_path, cluster_env(nodes)) as run,
    ):

        def replace_node() -> None:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            time.sleep(40)
            assert run.poll() is None, "the run does not wait"
            assert len(curve(trial)) < STEPS
            nodes.add_node(num_cpus=1)

        check_resumption(trial, run, replace_node)
    check_equal(trial, uninterrupted)


# Trains for a minute. In `make test`, test_train.py resumes with fewer workers; nothing there removes a node.
@pytest.mark.slow
def test_node_loss_resumes_elastic_training_with_fewer_workers(uninterrupted: TrialSpec, tmp_path: Path):
    arguments = command(tmp_path, "train.min_workers=1")
    (trial,) = plan_of(arguments).trials
    with (
        cluster(1) as nodes,
        started(lambda: is_past_second_checkpoint(trial), arguments, tmp_path, cluster_env(nodes)) as run,
    ):
        check_resumption(trial, run, lambda: nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False))
    check_equal(trial, uninterrupted)


# Trains three trials. In `make test`, test_trials.py covers failed trials; nothing there fails a training.
@pytest.mark.slow
def test_failed_trial_does_not_stop_other_trials(tmp_path: Path):
    # Every row exceeds max_length=2.
    arms = "arms={valid: {targets.source: reference}, empty: {targets.source: reference, train.max_length: 2}}"
    sweep = "sweep={space: {train.learning_rate: {grid: [0.005, 0.002]}}, metric: loss, num_validations: 2}"
    arguments = [
        *["sweep", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", arms, sweep, "attention=null"],
        *["dataset.num_train=48", "dataset.num_validation=8", "dataset.num_test=8"],
    ]
    done = subprocess.run([RAYKD, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr
    assert "every example was filtered out (" in done.stdout
    for trial in plan_of(arguments).trials:
        record = files.read_json(trial.folder / "trial.json")
        if trial.arm_name == "empty":
            assert record["status"] == FAILED and "every example was filtered out (" in record["error"]
        else:
            assert record["status"] in (COMPLETE, STOPPED)


# Starts training workers. Nothing in `make test` makes a training diverge.
@pytest.mark.slow
def test_diverging_trial_fails_at_once_with_the_last_finite_loss(tmp_path: Path):
    arms = "arms={sound: {targets.source: reference}, wild: {targets.source: reference, train.learning_rate: 1.0e+30}}"
    arguments = [*command(tmp_path), arms, "train.num_workers=1", "dataset.num_train=32", "train.epochs=2"]
    done = subprocess.run([RAYKD, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stderr
    trials = {trial.arm_name: trial for trial in plan_of(arguments).trials}
    record = files.read_json(trials["wild"].folder / "trial.json")
    assert record["status"] == FAILED
    assert re.fullmatch(
        r"training diverged: the loss is (nan|inf) at step \d of 8; the loss was [\d.e+]+ at step \d\. Lower "
        r"train\.learning_rate, or raise train\.warmup_fraction",
        record["error"],
    )
    assert math.isfinite(record["loss_last"])
    assert f"trial {trials['wild'].trial_id} failed: training diverged" in done.stderr
    assert "train: done, but 1 trials failed" in done.stderr
    assert files.read_json(trials["sound"].folder / "trial.json")["status"] == COMPLETE
    # It would diverge again: Ray Train does not start its workers again.
    log = ExperimentPaths(plan_of(arguments).folder).log.read_text()
    assert "[FailurePolicy]" not in log
