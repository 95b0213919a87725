"""A run that is interrupted several times gives the results of an uninterrupted one."""

import signal
from pathlib import Path

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import yaml
from test_run import predictions

from raykd.storage import files, row_store, schemas
from raykd.training.trial import TrialSpec
from reference_run import ARMS, NUM_TEST, NUM_TRAIN, Reference
from runs import FinishedRun, finish, interrupt_when, kill_when, plan_of, wait_for_end

# Runs four commands with two engines. In `make test`, test_sweeps.py interrupts generation and training with a scripted
# teacher, and test_train.py compares resumed with uninterrupted training; nothing there interrupts an evaluation.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ARM_NAMES = ("greedy", "soft")


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("part-*.parquet")}


def answered_parts(folder: Path) -> dict[str, int]:
    """Return the parts without a failed row. Failed rows are retried, and their parts are rewritten."""
    errors = {path.name: pyarrow.parquet.read_table(path, columns=["error"]) for path in folder.glob("part-*.parquet")}
    return {name: time for name, time in parts(folder).items() if not any(errors[name]["error"].to_pylist())}


@pytest.fixture(scope="module")
def resumed_run(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two arms of the reference run in another storage folder, interrupted by SIGTERM during generation, and by SIGKILL
    during training and during evaluation.

    The next command starts at once, while processes of the killed one may still be running.
    """
    root = tmp_path_factory.mktemp("resumed")
    arms = yaml.safe_dump({name: ARMS[name] for name in ARM_NAMES}, default_flow_style=True, width=10_000).strip()
    arguments = ["run", str(experiment_file), f"storage={root}", f"arms={arms}"]
    plan = plan_of(arguments)
    completions = plan.completion_sets["soft"]
    assert completions

    interrupt_when(signal.SIGTERM, lambda: len(parts(completions.folder)) >= 3, arguments, root)
    kept = answered_parts(completions.folder)
    assert kept
    assert row_store.read_manifest(completions.folder) is None, "interrupted too late"

    first = plan.trials[0]
    checkpoints = plan.folder / "checkpoints" / first.trial_id
    family = kill_when(lambda: any(checkpoints.glob("checkpoint_*/checkpoint/*.pt")), arguments, root)
    assert {name: time for name, time in parts(completions.folder).items() if name in kept} == kept, (
        "answered parts were rewritten"
    )
    assert row_store.read_manifest(completions.folder)["rows"] == 2 * NUM_TRAIN  # type: ignore[index]
    assert not (first.folder / "trial.json").exists(), "killed too late"

    family += kill_when(lambda: len(parts(plan.predictions)) >= 1, arguments, root)
    assert row_store.read_manifest(plan.predictions) is None, "killed too late"
    done = finish(arguments, root)
    wait_for_end(family)
    return done


def uninterrupted(reference: Reference, trial: TrialSpec) -> TrialSpec:
    """Return the same trial of the reference run."""
    return next(each for each in reference.plan.trials if each.arm_name == trial.arm_name)


def test_completions_equal_those_of_uninterrupted_run(reference: Reference, resumed_run: FinishedRun):
    whole, completions = (plan.completion_sets["soft"] for plan in (reference.plan, resumed_run.plan))
    assert whole and completions and whole.folder.name == completions.folder.name
    columns = ["completion_id", "prompt_token_ids", "completion_token_ids", "error"]
    tables = [
        row_store.read_rows(each.folder, schemas.COMPLETION, columns).sort_by("completion_id")
        for each in (whole, completions)
    ]
    assert tables[0].equals(tables[1])


def test_resumed_training_gives_same_adapter(reference: Reference, resumed_run: FinishedRun):
    assert [trial.arm_name for trial in resumed_run.plan.trials] == list(ARM_NAMES)
    for resumed in resumed_run.plan.trials:
        whole = uninterrupted(reference, resumed)
        assert whole.trial_id == resumed.trial_id
        curves = [(trial.folder / "metrics.jsonl").read_text().splitlines() for trial in (whole, resumed)]
        assert len(curves[0]) == len(curves[1]) == files.read_json(whole.folder / "trial.json")["steps"]
        weights = [
            safetensors.torch.load_file(trial.folder / "adapter" / "adapter_model.safetensors")
            for trial in (whole, resumed)
        ]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor, weights[1][name], atol=1e-5), name


def test_predictions_equal_those_of_uninterrupted_run(reference: Reference, resumed_run: FinishedRun):
    whole, resumed = (
        {(row["trial_id"], row["problem_id"]): row["completion"] for row in predictions(plan)}
        for plan in (reference.plan, resumed_run.plan)
    )
    assert len(resumed) == len(predictions(resumed_run.plan)) == (1 + len(ARM_NAMES)) * NUM_TEST
    assert resumed == {key: text for key, text in whole.items() if key in resumed}
