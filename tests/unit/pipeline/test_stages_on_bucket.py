"""Stages on a bucket read and write the same files as in a folder; without a cluster."""

import json
import os
import pickle
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from raykd import cli
from raykd.config.experiment import Experiment
from raykd.config.training import Lora, Student
from raykd.evaluation import evaluate, lm_eval_task, student_batch
from raykd.models import adapters, loading
from raykd.pipeline import run
from raykd.pipeline.plan import Plan
from raykd.report import compare_runs
from raykd.report.build import write_report
from raykd.runtime import console
from raykd.storage import files, filesystem, row_store, schemas
from raykd.training import examples, student
from runs import started_plan
from synthetic import drawn, full_experiment

ROOT = Path(__file__).parents[3]
SMALL = {
    "name": "small",
    "dataset": {"source": "demo", "num_train": 20, "num_test": 3},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {"primed": {"prompt.strategy": "teacher"}, "reference": {"targets.source": "reference"}},
}


def plan_in(root: Path) -> Plan:
    return started_plan(Experiment.model_validate({**SMALL, "storage": str(root)}))


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in filesystem.list_files(folder)}


def copy_files(folder: Path, target: Path) -> None:
    with filesystem.atomic_write_dir(target) as local:
        for file in filesystem.list_files(folder):
            (local / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (local / file.relative_to(folder)).write_bytes(file.read_bytes())


def test_bucket_and_folder_have_the_same_keys_and_files(bucket: str, tmp_path: Path):
    remote, local = plan_in(filesystem.resolve(f"{bucket}/keys")), plan_in(tmp_path)
    assert [each.folder.name for each in remote.required_sets] == [each.folder.name for each in local.required_sets]
    assert [trial.trial_id for trial in remote.trials] == [trial.trial_id for trial in local.trials]
    assert names(remote.root) == names(local.root) != set()
    for split in ("train", "validation", "test"):
        tables = [files.read_table(each.problems / f"{split}.parquet") for each in (remote, local)]
        assert tables[0].equals(tables[1])
    # Existing problems are reused.
    before = filesystem.file_states(remote.problems)
    again = plan_in(filesystem.resolve(f"{bucket}/keys"))
    assert filesystem.file_states(again.problems) == before and again.trials == remote.trials
    assert pickle.loads(pickle.dumps(remote.trials)) == remote.trials
    assert not remote.is_complete() and str(remote.folder) == f"{bucket}/keys/experiments/small"


def test_bucket_and_folder_have_the_same_training_examples(bucket: str, tmp_path: Path):
    from raykd.models import loading

    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    plans = (plan_in(filesystem.resolve(f"{bucket}/rows")), plan_in(tmp_path))
    trials_of_plans = [next(trial for trial in plan.trials if trial.arm_name == "reference") for plan in plans]
    rows = [examples.build_examples(trial.arm, trial.problems, None, tokenizer, True)[0] for trial in trials_of_plans]
    assert [row.prompt_token_ids for row in rows[0]] == [row.prompt_token_ids for row in rows[1]] != []


def test_bucket_and_folder_have_the_same_report(bucket: str, tmp_path: Path):
    local, remote = (
        full_experiment(tmp_path / "mine").write(),
        filesystem.resolve(f"{bucket}/reported/experiments/mine"),
    )
    copy_files(local, remote)
    write_report(local)
    write_report(remote)
    assert names(remote) == names(local)
    for name in ("results.csv", "report.md"):
        assert (remote / name).read_text() == (local / name).read_text()
    assert (remote / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_compare_reads_a_bucket(bucket: str, tmp_path: Path):
    local, remote = full_experiment(tmp_path / "mine").write(), filesystem.resolve(f"{bucket}/compared/mine")
    copy_files(local, remote)
    arms = list(dict.fromkeys(trial["arm"] for trial in trials(local)))[:2]
    texts = [compare_runs.compare(*(f"{folder}:{arm}" for arm in arms)) for folder in (local, remote)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="write FOLDER, FOLDER:ARM"):
        compare_runs.compare(f"{remote}:a:b:c", f"{remote}:a")


def trials(folder: Path) -> list[dict]:
    return [files.read_json(file) for file in filesystem.find_in_subdirs(folder / "trials", "trial.json")]


@pytest.fixture
def adapter(bucket: str) -> Path:
    """Save a student's adapter into a bucket."""
    section = Student(model="raykd/demo-student", lora=Lora(r=4))
    model = student.add_lora(loading.load_base_model(section, torch.float32), section, seed=0)
    path = filesystem.resolve(f"{bucket}/saved/trial/adapter")
    student.save_adapter(model, path, section, write=True, is_trained=False)
    return path


def test_adapter_and_null_adapter_are_saved(adapter: Path, bucket: str):
    adapters.check_adapter(adapter, 4)
    adapted = student_batch.StudentModel("trial", "arm", 0, adapter, 4)
    folder = filesystem.resolve(f"{bucket}/saved/predictions/null_adapter")
    null, same = student_batch.with_null_adapter([student_batch.BASE_STUDENT, adapted], folder)
    assert same is adapted and null.adapter == folder
    adapters.check_adapter(folder, 4)


def test_lm_eval_command_copies_its_inputs(adapter: Path, bucket: str, tmp_path: Path):
    experiment = Experiment.model_validate(SMALL)
    plan, folder = plan_in(filesystem.resolve(f"{bucket}/exported")), filesystem.resolve(f"{bucket}/exported/lm_eval")
    lm_eval_task.write_task(experiment, plan.problems, folder)
    *copies, command = lm_eval_task.lm_eval_command(experiment, folder, str(adapter)).split(" && ")
    for copy in copies:
        words = shlex.split(copy)
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    assert names(tmp_path / "lm_eval") == {"zero_shot_chat.jsonl", "raykd_small.yaml"}
    assert names(tmp_path / "adapter") == {adapters.CONFIG_FILE, adapters.WEIGHTS_FILE}
    words = shlex.split(command)
    assert words[words.index("--include_path") + 1] == "lm_eval"
    assert json.loads(words[words.index("--model_args") + 1])["peft"] == "adapter"


def test_each_process_copies_its_own_log(bucket: str, monkeypatch: pytest.MonkeyPatch):
    log = filesystem.resolve(f"{bucket}/logged/experiments/mine") / "driver.log"
    for host in ("one", "another"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with console.redirect_library_output(log) as written:
            os.write(2, f"output of {host}".encode())
            assert written.is_file() and not (log.parent / written.name).exists()
    for host in ("one", "another"):
        assert f"output of {host}" in (log.parent / f"driver-{host}-{os.getpid()}.log").read_text()


def test_traceback_is_in_the_named_log(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    storage_of_run = f"{bucket}/faulty"

    def fail(*_: object) -> None:
        log = filesystem.resolve(storage_of_run) / "experiments" / "quickstart" / "driver.log"
        with console.redirect_library_output(log):
            os.write(2, b"output of a library")
        raise RuntimeError("3 of 4 rows failed")

    monkeypatch.setattr(run, "run_experiment", fail)
    command = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={storage_of_run}"]
    assert cli.main(command) == 1
    log_name = capsys.readouterr().err.partition("Log: ")[2].strip()
    assert log_name.startswith(f"{storage_of_run}/experiments/quickstart/driver-")
    log = filesystem.resolve(log_name).read_text()
    assert "output of a library" in log and "Traceback" in log and "3 of 4 rows failed" in log


def test_log_stays_local_if_the_bucket_refuses_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(filesystem, "put", refuse)
    # The log does not exist yet.
    log = filesystem.resolve(f"{bucket}/refused/{os.getpid()}/experiments/mine") / "driver.log"
    file = console.append_to_log(log, "Traceback\n")
    assert not filesystem.is_remote(file) and file.read_text().endswith("Traceback\n")


def test_predictions_are_collected_into_one_file(storage: Path):
    rows = pa.Table.from_pylist(drawn("none", 0, 0.5, 0.5), schema=schemas.PREDICTION)
    for name in ("zero_shot_chat-1", "zero_shot_raw-2"):
        row_store.write_part(storage / "predictions" / name, rows)
        row_store.finalize(storage / "predictions" / name, schemas.PREDICTION, "prediction_id", {})
    for _ in range(2):
        evaluate.collect_predictions(storage / "predictions", storage / "predictions.parquet")
        found = files.read_table(storage / "predictions.parquet", ["evaluation"])["evaluation"].to_pylist()
        assert found == ["zero_shot_chat-1"] * len(rows) + ["zero_shot_raw-2"] * len(rows)
