"""A whole run on a bucket, killed during generation and training, gives the same results as in a folder."""

from pathlib import Path

import pytest
import yaml

import s3_server
from raykd.storage import filesystem, row_store, schemas
from runs import FinishedRun, finish, kill_when, plan_of, wait_for_end

# Runs an experiment twice. In `make test`, test_stages_on_bucket.py covers the files of each stage, without engines.
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
def folder_run(experiment_of_two_arms: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("folder")
    return finish(["run", str(experiment_of_two_arms), f"storage={root}"], root)


@pytest.fixture(scope="module")
def bucket_run(bucket: str, experiment_of_two_arms: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Kill the run twice; the next command starts at once, while processes of the killed one may still be running."""
    folder = tmp_path_factory.mktemp("work")
    arguments = ["run", str(experiment_of_two_arms), f"storage={bucket}/a run"]
    plan = plan_of(arguments)
    completions = plan.required_sets[0].folder

    family = kill_when(lambda: len(row_store.list_parts(completions)) >= 3, arguments, folder)
    kept = filesystem.file_states(completions)
    assert row_store.read_manifest(completions) is None, "killed too late"

    first = plan.trials[0]
    checkpoints = plan.root / "experiments/bucket/checkpoints" / first.trial_id
    saved = lambda: any(file.name.endswith(".pt") for file in filesystem.list_files(checkpoints))  # noqa: E731
    family += kill_when(saved, arguments, folder)
    parts = [name for name in kept if name.startswith("part-")]
    assert {name: filesystem.file_states(completions)[name] for name in parts} == {name: kept[name] for name in parts}
    assert not (first.folder / "trial.json").exists(), "killed too late"

    done = finish(arguments, folder)
    wait_for_end(family)
    assert not (folder / "s3:").exists(), "the URI was used as a local path"
    return done


def ids(folder: Path, schema: object, column: str) -> list[str]:
    return sorted(row_store.read_rows(folder, schema, [column])[column].to_pylist())  # type: ignore[arg-type]


def test_bucket_has_each_row_once(folder_run: FinishedRun, bucket_run: FinishedRun):
    for one, other in zip(folder_run.plan.required_sets, bucket_run.plan.required_sets, strict=True):
        found = ids(other.folder, schemas.COMPLETION, "completion_id")
        assert found == ids(one.folder, schemas.COMPLETION, "completion_id")
        assert len(found) == len(set(found)) == NUM_TRAIN
    found = ids(bucket_run.plan.predictions, schemas.PREDICTION, "prediction_id")
    assert found == ids(folder_run.plan.predictions, schemas.PREDICTION, "prediction_id")
    assert len(found) == len(set(found)) == 3 * NUM_TEST
    assert bucket_run.plan.attention and folder_run.plan.attention
    found = ids(bucket_run.plan.attention, schemas.ATTENTION, "attention_id")
    assert found == ids(folder_run.plan.attention, schemas.ATTENTION, "attention_id")


def test_predictions_equal_those_of_folder(folder_run: FinishedRun, bucket_run: FinishedRun):
    """A student without its adapter would answer like the base student."""

    def answers(ran: FinishedRun) -> dict[str, str]:
        rows = row_store.read_rows(ran.plan.predictions, schemas.PREDICTION).to_pylist()
        assert not any(row["error"] for row in rows)
        return {row["prediction_id"]: row["completion"] for row in rows}

    assert answers(bucket_run) == answers(folder_run)


def test_bucket_and_folder_have_same_files(folder_run: FinishedRun, bucket_run: FinishedRun):
    def file_names(ran: FinishedRun) -> set[str]:
        names = [str(file.relative_to(ran.plan.folder)) for file in filesystem.list_files(ran.plan.folder)]
        # The names of parts depend on their content, those of Ray Tune's and Train's files on the time.
        return {
            name for name in names if "part-" not in name and not name.startswith(("tune/", "checkpoints/", "driver"))
        }

    assert file_names(bucket_run) - {"run.lock"} == file_names(folder_run) - {"run.lock"}
    assert (bucket_run.plan.folder / "report.html").is_file()
    assert f"report: {bucket_run.plan.folder}/report.html" in bucket_run.stdout
    assert not [file for file in filesystem.list_files(bucket_run.plan.root) if file.name.startswith("run.lock")]


def test_repeated_command_starts_no_cluster(bucket_run: FinishedRun, experiment_of_two_arms: Path, tmp_path: Path):
    before = filesystem.file_states(bucket_run.plan.predictions)
    root = str(bucket_run.plan.root)
    done = finish(["run", str(experiment_of_two_arms), f"storage={root}"], tmp_path)
    assert "dashboard" not in done.stderr, "a cluster was started"
    assert filesystem.file_states(bucket_run.plan.predictions) == before


def test_credentials_are_not_written(bucket_run: FinishedRun):
    secret = s3_server.KEYS["AWS_SECRET_ACCESS_KEY"].encode()
    assert [file for file in filesystem.list_files(bucket_run.plan.root) if secret in filesystem.read_bytes(file)] == []
