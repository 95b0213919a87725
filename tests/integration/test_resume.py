"""A run that is killed again and again ends where an undisturbed one ends."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_run import predictions

from raykd import records, storage
from runs import Ran, finish, kill_when, plan_of, wait_for_end

pytestmark = pytest.mark.timeout(3000)


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("part-*.parquet")}


@pytest.fixture(scope="module")
def killed(ran: Ran, experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The same experiment in another storage, killed while it generates, trains and evaluates.

    The next command is typed at once, while processes of the killed one may still be ending.
    """
    root = tmp_path_factory.mktemp("killed")
    arguments = ["run", str(experiment_file), f"storage={root}"]
    plan = plan_of(arguments)
    answered = root / "completions"

    family = kill_when(lambda: len(parts(answered)) >= 3, arguments, root)
    kept = parts(answered)
    assert not any((answered / request.folder.name / storage.MANIFEST).exists() for request in plan.requests), (
        "killed too late to test anything"
    )

    first = plan.jobs[0]
    checkpoints = plan.folder / "checkpoints" / first.trial_id
    family += kill_when(lambda: any(checkpoints.glob("checkpoint_*/checkpoint/*.pt")), arguments, root)
    assert {name: time for name, time in parts(answered).items() if name in kept} == kept, "nothing is asked twice"
    assert sum(storage.read_manifest(request.folder)["rows"] for request in plan.requests) == 200  # type: ignore[index]
    assert not (first.folder / "trial.json").exists(), "killed too late to test anything"

    family += kill_when(lambda: len(parts(plan.predictions)) >= 1, arguments, root)
    assert storage.read_manifest(plan.predictions) is None, "killed too late to test anything"
    done = finish(arguments, root)
    wait_for_end(family)
    return done


def test_completions_are_those_of_an_undisturbed_run(ran: Ran, killed: Ran):
    for whole, resumed in zip(ran.plan.requests, killed.plan.requests, strict=True):
        assert whole.folder.name == resumed.folder.name
        columns = ["completion_id", "prompt_token_ids", "completion_token_ids", "error"]
        tables = [
            storage.read_rows(request.folder, records.COMPLETION, columns).sort_by("completion_id")
            for request in (whole, resumed)
        ]
        assert tables[0].equals(tables[1])


def test_training_went_on_from_its_checkpoint_to_the_same_adapter(ran: Ran, killed: Ran):
    for whole, resumed in zip(ran.plan.jobs, killed.plan.jobs, strict=True):
        curves = [(job.folder / "metrics.jsonl").read_text().splitlines() for job in (whole, resumed)]
        assert len(curves[0]) == len(curves[1]) == storage.read_json(whole.folder / "trial.json")["steps"]
        weights = [
            safetensors.torch.load_file(job.folder / "adapter" / "adapter_model.safetensors")
            for job in (whole, resumed)
        ]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor, weights[1][name], atol=1e-5), name


def test_predictions_are_those_of_an_undisturbed_run(ran: Ran, killed: Ran):
    def answers(run: Ran) -> dict[tuple[str, str], str]:
        return {(row["trial_id"], row["problem_id"]): row["completion"] for row in predictions(run)}

    assert answers(ran) == answers(killed)
