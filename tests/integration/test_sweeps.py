"""Sweeps with Ray Tune: early stopping, selection and test of trials, and resumption in every stage."""

import contextlib
import csv
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import fake_openai_server
from raykd.pipeline.plan import Plan
from raykd.storage import files, row_store, schemas
from raykd.storage.schemas import COMPLETE, STOPPED
from raykd.training.trial import TrialSpec, trial_status
from runs import FinishedRun, finish, interrupt_when, parts, plan_of, started, wait_for_end

pytestmark = pytest.mark.timeout(1800)
GOOD, POOR = 5e-3, 1e-7
NUM_TRAIN, BATCH_SIZE, CONCURRENCY = 96, 8, 2


@pytest.fixture(scope="module")
def scripted() -> Iterator[fake_openai_server.FakeServer]:
    """A scripted teacher that is slow enough to be interrupted; no test depends on its answers."""

    def respond_slowly(request: fake_openai_server.ReceivedRequest, number: int) -> fake_openai_server.Answer:
        time.sleep(0.3)
        return fake_openai_server.scores(request, number)

    with fake_openai_server.serving(respond_slowly) as server:
        yield server


@pytest.fixture(scope="module")
def sweep_file(scripted: fake_openai_server.FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one arm with two learning rates, one of which is too low to learn."""
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32}}
    tree = {
        "name": "swept",
        "dataset": {"source": "demo", "num_train": NUM_TRAIN, "num_validation": 12, "num_test": 10},
        "teacher": {
            "model": "raykd/demo-teacher",
            "endpoint": {"url": scripted.url},
            "engine": engine,
            "batch_size": BATCH_SIZE,
            "concurrency": CONCURRENCY,
        },
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 8,
            "zero_stage": 0,
            "dtype": "float32",
            "checkpoint_every_steps": 4,
        },
        "evaluate": {"engine": engine, "sampling": {"max_tokens": 32}},
        "attention": None,
        # One trial at a time, so that the scheduler can compare the second with the first.
        "max_concurrent_trials": 1,
        "arms": {
            "scored": {
                "prompt.strategy": "ground_truth",
                "targets": {"source": "reference", "kind": "top_k", "top_k": 4},
                "loss.cross_entropy_weight": 0.9,
            },
        },
        "sweep": {
            "space": {"train.learning_rate": {"grid": [GOOD, POOR]}},
            "metric": "loss",
            "num_validations": 3,
            "test_top_n": 1,
        },
    }
    file = tmp_path_factory.mktemp("sweep") / "swept.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@dataclass
class Swept:
    """A sweep that was interrupted by SIGTERM during scoring, lost its workers and its driver during training, and was
    resumed until all students were trained."""

    plan: Plan
    stderr: str
    """The standard error of the last command."""
    kept: dict[str, int]
    """The parts at the interruption of scoring, and their modification times in nanoseconds."""
    good: TrialSpec
    """The trial that lost its workers, and was complete when the driver was killed."""
    good_written: int
    """The modification time of its adapter, in nanoseconds."""


@pytest.fixture(scope="module")
def swept(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("storage")
    arguments = [str(sweep_file), f"storage={folder}"]
    plan = plan_of(["sweep", *arguments])
    (completions,) = plan.required_sets
    interrupt_when(signal.SIGTERM, lambda: len(parts(completions.folder)) >= 3, ["sweep", *arguments], folder)
    kept = modification_times(parts(completions.folder))
    assert row_store.read_manifest(completions.folder) is None, "interrupted too late"
    test, hidden = plan.problems / "test.parquet", plan.problems / "test.hidden"

    def has_checkpoint() -> bool:
        # Hide the test problems during training, so that a command that reads them fails. It may check them before.
        if test.exists() and "training" in (folder / "started.log").read_text():
            test.rename(hidden)
        return any((plan.folder / "checkpoints" / good.trial_id).glob("checkpoint_*"))

    good = trials_by_rate(plan)[GOOD]
    with started(has_checkpoint, ["sweep", *arguments], folder) as driver:
        kill_workers(psutil.Process(driver.pid).children(recursive=True))
        deadline = time.monotonic() + 600
        while trial_status(good) != COMPLETE:
            assert driver.poll() is None and time.monotonic() < deadline, (folder / "started.log").read_text()
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
    hidden.rename(test)
    good_written = adapter(good).stat().st_mtime_ns
    done = finish(["train", *arguments], folder)
    wait_for_end(family)
    return Swept(done.plan, done.stderr, kept, good, good_written)


@pytest.fixture(scope="module")
def evaluated(swept: Swept, sweep_file: Path) -> FinishedRun:
    """The same sweep, evaluated."""
    return finish(["sweep", str(sweep_file), f"storage={swept.plan.root}"], swept.plan.root)


def kill_workers(family: list[psutil.Process]) -> None:
    """Kill the training workers."""
    killed = 0
    for process in family:
        with contextlib.suppress(psutil.Error):
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed += 1
    assert killed, "no worker was running"


def modification_times(paths: list[Path]) -> dict[str, int]:
    """Return the modification times of files."""
    return {path.name: path.stat().st_mtime_ns for path in paths}


def adapter(trial: TrialSpec) -> Path:
    return trial.folder / "adapter" / "adapter_model.safetensors"


def trials_by_rate(plan: Plan) -> dict[float, TrialSpec]:
    """Return the trials by learning rate."""
    return {trial.hparams["train.learning_rate"]: trial for trial in plan.trials}


def trial_record(trial: TrialSpec) -> dict[str, Any]:
    return files.read_json(trial.folder / "trial.json")


def test_teacher_scores_each_problem_once_for_all_trials(swept: Swept, scripted: fake_openai_server.FakeServer):
    (completions,) = swept.plan.required_sets
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION, ["problem_id"])
    assert len(rows) == len(set(rows["problem_id"].to_pylist())) == NUM_TRAIN
    assert {trial.completions for trial in swept.plan.trials} == {completions.folder}
    assert swept.kept.items() <= modification_times(parts(completions.folder)).items()
    # The check of the endpoint sends two tokens. Requests in flight at the interruption are repeated.
    sent = Counter(tuple(each.body["prompt"]) for each in scripted.requests if len(each.body["prompt"]) > 2)
    assert len(sent) == NUM_TRAIN
    assert sent.total() <= NUM_TRAIN + CONCURRENCY * BATCH_SIZE
    assert "using the teacher" not in swept.stderr


def test_trial_with_worse_validation_loss_is_stopped(swept: Swept):
    trials = trials_by_rate(swept.plan)
    good, poor = trial_record(trials[GOOD]), trial_record(trials[POOR])
    assert (good["status"], good["steps"], good["validation"]["number"]) == (COMPLETE, 24, 3)
    assert poor["status"] == STOPPED
    assert poor["validation"]["number"] < 3
    assert poor["steps"] < 24
    first = json.loads((trials[GOOD].folder / "metrics.jsonl").read_text().splitlines()[7])
    assert poor["validation"]["loss"] > first["validation"]["loss"] > good["validation"]["loss"]
    assert poor["adapter"] is None and not adapter(trials[POOR]).exists()


def test_trial_completed_before_kill_is_not_retrained(swept: Swept):
    assert adapter(swept.good).stat().st_mtime_ns == swept.good_written


def test_killed_workers_leave_no_gap_in_steps(swept: Swept):
    steps = [json.loads(line)["step"] for line in (swept.good.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


def test_base_student_and_best_trial_are_selected(swept: Swept):
    assert [each.trial_id for each in swept.plan.eval_models()] == ["base", swept.good.trial_id]


def test_tensorboard_files_exist(swept: Swept):
    for trial in swept.plan.trials:
        if trial_status(trial) == COMPLETE:
            assert any((swept.plan.folder / "tune" / trial.trial_id).glob("events.out.tfevents.*"))


# Starts an engine. In `make test`, the test of the selection and test_run.py cover it.
@pytest.mark.slow
def test_base_student_and_best_trial_are_evaluated(swept: Swept, evaluated: FinishedRun):
    rows = row_store.read_rows(evaluated.plan.predictions, schemas.PREDICTION).to_pylist()
    assert {row["trial_id"] for row in rows} == {swept.good.trial_id, "base"}
    assert len(rows) == 20


# Needs the evaluation above. In `make test`, test_report_sweep.py covers the table.
@pytest.mark.slow
def test_results_have_every_trial(evaluated: FinishedRun):
    with (evaluated.plan.folder / "results.csv").open() as file:
        rows = {row["trial_id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {trial.trial_id for trial in evaluated.plan.trials} | {"base"}
    for trial in evaluated.plan.trials:
        row, record = rows[trial.trial_id], trial_record(trial)
        assert float(row["train.learning_rate"]) == trial.hparams["train.learning_rate"]
        assert row["status"] == record["status"]
        assert float(row["validation_loss"]) == record["validation"]["loss"]
        assert (row["validation_n"], int(row["validation_number"])) == ("12", record["validation"]["number"])
        assert row["adapter"] == (str(trial.folder / "adapter") if record["status"] == COMPLETE else "")
    for word in ("All trials", "Best point of each arm", "stopped", "base"):
        assert word in evaluated.stdout


# Needs the evaluation above. In `make test`, test_run.py repeats the command of a completed run.
@pytest.mark.slow
def test_repeated_command_does_no_work(evaluated: FinishedRun, sweep_file: Path):
    repeated = finish(["sweep", str(sweep_file), f"storage={evaluated.plan.root}"], evaluated.plan.root)
    assert repeated.stdout == evaluated.stdout
    assert "Ray" not in repeated.stderr
