"""A whole run on a bucket, killed during generation and training, gives the same results as in a folder."""

from pathlib import Path

import pytest
import yaml

import s3_server
from raykd.storage import filesystem, row_store, schemas
from runs import FinishedRun, finish, kill_when, plan_of, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
NUM_TRAIN, NUM_TEST = 40, 10
ENGINE = {"engine_kwargs": {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32}}
EXPERIMENT = {
    "name": "bucket",
    "dataset": {"source": "demo", "num_train": NUM_TRAIN, "num_test": NUM_TEST},
    "teacher": {
        "model": "raykd/demo-teacher",
        "engine": ENGINE,
        "sampling": {"max_tokens": 48},
        "batch_size": 4,
        "concurrency": 2,
    },
    "student": {"model": "raykd/demo-student"},
    "train": {
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 5e-3,
        "num_workers": 2,
        "dtype": "float32",
        "checkpoint_every_steps": 3,
    },
    "evaluate": {"engine": ENGINE, "sampling": {"max_tokens": 48}, "batch_size": 8},
    "attention": {"num_problems": 3},
    "arms": {"primed": {"prompt.strategy": "ground_truth"}, "reference": {"targets.source": "reference"}},
}


@pytest.fixture(scope="module")
def experiment_of_two_arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bucket") / "bucket.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT))
    return file


@pytest.fixture(scope="module")
def in_a_folder(experiment_of_two_arms: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("folder")
    return finish(["run", str(experiment_of_two_arms), f"storage={root}"], root)


@pytest.fixture(scope="module")
def in_a_bucket(bucket: str, experiment_of_two_arms: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Kill the run twice; the next command starts at once, while processes of the killed one may still be ending."""
    here = tmp_path_factory.mktemp("elsewhere")
    arguments = ["run", str(experiment_of_two_arms), f"storage={bucket}/whole run"]
    plan = plan_of(arguments)
    answers = plan.required_sets[0].folder

    family = kill_when(lambda: len(row_store.list_parts(answers)) >= 3, arguments, here)
    kept = filesystem.file_states(answers)
    assert row_store.read_manifest(answers) is None, "killed too late to test anything"

    first = plan.trials[0]
    checkpoints = plan.root / "experiments/bucket/checkpoints" / first.trial_id
    saved = lambda: any(file.name.endswith(".pt") for file in filesystem.list_files(checkpoints))  # noqa: E731
    family += kill_when(saved, arguments, here)
    parts = [name for name in kept if name.startswith("part-")]
    assert {name: filesystem.file_states(answers)[name] for name in parts} == {name: kept[name] for name in parts}
    assert not (first.folder / "trial.json").exists(), "killed too late to test anything"

    done = finish(arguments, here)
    wait_for_end(family)
    assert not (here / "s3:").exists(), "nothing took the URI for a folder"
    return done


def ids(folder: Path, schema: object, column: str) -> list[str]:
    return sorted(row_store.read_rows(folder, schema, [column])[column].to_pylist())  # type: ignore[arg-type]


def test_bucket_has_each_row_once(in_a_folder: FinishedRun, in_a_bucket: FinishedRun):
    for one, other in zip(in_a_folder.plan.required_sets, in_a_bucket.plan.required_sets, strict=True):
        found = ids(other.folder, schemas.COMPLETION, "completion_id")
        assert found == ids(one.folder, schemas.COMPLETION, "completion_id")
        assert len(found) == len(set(found)) == NUM_TRAIN
    found = ids(in_a_bucket.plan.predictions, schemas.PREDICTION, "prediction_id")
    assert found == ids(in_a_folder.plan.predictions, schemas.PREDICTION, "prediction_id")
    assert len(found) == len(set(found)) == 3 * NUM_TEST
    assert in_a_bucket.plan.attention and in_a_folder.plan.attention
    found = ids(in_a_bucket.plan.attention, schemas.ATTENTION, "attention_id")
    assert found == ids(in_a_folder.plan.attention, schemas.ATTENTION, "attention_id")


def test_predictions_equal_those_of_folder(in_a_folder: FinishedRun, in_a_bucket: FinishedRun):
    """A student without its adapter would answer as the base student."""

    def answers(ran: FinishedRun) -> dict[str, str]:
        rows = row_store.read_rows(ran.plan.predictions, schemas.PREDICTION).to_pylist()
        assert not any(row["error"] for row in rows)
        return {row["prediction_id"]: row["completion"] for row in rows}

    assert answers(in_a_bucket) == answers(in_a_folder)


def test_bucket_and_folder_have_same_files(in_a_folder: FinishedRun, in_a_bucket: FinishedRun):
    def kinds(ran: FinishedRun) -> set[str]:
        names = [str(file.relative_to(ran.plan.folder)) for file in filesystem.list_files(ran.plan.folder)]
        # Parts are named by their content; files of Ray Tune and Train by the time.
        return {
            name for name in names if "part-" not in name and not name.startswith(("tune/", "checkpoints/", "driver"))
        }

    assert kinds(in_a_bucket) - {"run.lock"} == kinds(in_a_folder) - {"run.lock"}
    assert (in_a_bucket.plan.folder / "report.html").is_file()
    assert f"report: {in_a_bucket.plan.folder}/report.html" in in_a_bucket.stdout
    assert not [file for file in filesystem.list_files(in_a_bucket.plan.root) if file.name.startswith("run.lock")]


def test_repeated_command_starts_no_cluster(in_a_bucket: FinishedRun, experiment_of_two_arms: Path, tmp_path: Path):
    before = filesystem.file_states(in_a_bucket.plan.predictions)
    root = str(in_a_bucket.plan.root)
    done = finish(["run", str(experiment_of_two_arms), f"storage={root}"], tmp_path)
    assert "dashboard" not in done.stderr, "no cluster was started"
    assert filesystem.file_states(in_a_bucket.plan.predictions) == before


def test_credentials_are_not_written(in_a_bucket: FinishedRun):
    secret = s3_server.KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    assert [
        file for file in filesystem.list_files(in_a_bucket.plan.root) if secret in filesystem.read_bytes(file)
    ] == []
