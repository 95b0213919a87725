"""The stages on a bucket, as far as they need no cluster: what they write and read is what a folder would hold."""

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
from raykd.config.sections import Lora, Student
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


def copied(folder: Path, target: Path) -> None:
    with filesystem.atomic_write_dir(target) as local:
        for file in filesystem.list_files(folder):
            (local / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (local / file.relative_to(folder)).write_bytes(file.read_bytes())


def test_an_experiment_has_the_same_keys_and_files_wherever_it_lies(bucket: str, tmp_path: Path):
    remote, local = plan_in(filesystem.resolve(f"{bucket}/keys")), plan_in(tmp_path)
    assert [each.folder.name for each in remote.requests] == [each.folder.name for each in local.requests]
    assert [job.trial_id for job in remote.jobs] == [job.trial_id for job in local.jobs]
    assert names(remote.root) == names(local.root) != set()
    for split in ("train", "validation", "test"):
        tables = [files.read_table(each.problems / f"{split}.parquet") for each in (remote, local)]
        assert tables[0].equals(tables[1])
    # What is there is found, and not made anew.
    before = filesystem.file_states(remote.problems)
    again = plan_in(filesystem.resolve(f"{bucket}/keys"))
    assert filesystem.file_states(again.problems) == before and again.jobs == remote.jobs
    assert pickle.loads(pickle.dumps(remote.jobs)) == remote.jobs
    assert not remote.is_complete() and str(remote.folder) == f"{bucket}/keys/experiments/small"


def test_rows_to_train_on_are_the_same(bucket: str, tmp_path: Path):
    from raykd.models import loading

    tokenizer = loading.load_tokenizer(Student(model="raykd/demo-student"))
    plans = (plan_in(filesystem.resolve(f"{bucket}/rows")), plan_in(tmp_path))
    jobs = [next(job for job in plan.jobs if job.arm_name == "reference") for plan in plans]
    rows = [examples.build_examples(job.arm, job.problems, None, tokenizer, True)[0] for job in jobs]
    assert [row.prompt_token_ids for row in rows[0]] == [row.prompt_token_ids for row in rows[1]] != []


def test_a_report_in_a_bucket_is_that_of_a_folder(bucket: str, tmp_path: Path):
    local, remote = (
        full_experiment(tmp_path / "mine").write(),
        filesystem.resolve(f"{bucket}/reported/experiments/mine"),
    )
    copied(local, remote)
    write_report(local)
    write_report(remote)
    assert names(remote) == names(local)
    for name in ("results.csv", "report.md"):
        assert (remote / name).read_text() == (local / name).read_text()
    assert (remote / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_two_students_of_a_bucket_are_compared(bucket: str, tmp_path: Path):
    local, remote = full_experiment(tmp_path / "mine").write(), filesystem.resolve(f"{bucket}/compared/mine")
    copied(local, remote)
    arms = list(dict.fromkeys(trial["arm"] for trial in trials(local)))[:2]
    texts = [compare_runs.compare(*(f"{folder}:{arm}" for arm in arms)) for folder in (local, remote)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="write FOLDER, FOLDER:ARM"):
        compare_runs.compare(f"{remote}:a:b:c", f"{remote}:a")


def trials(folder: Path) -> list[dict]:
    return [files.read_json(file) for file in filesystem.find_in_subdirs(folder / "trials", "trial.json")]


@pytest.fixture
def adapter(bucket: str) -> Path:
    """A student's adapter, saved into a bucket."""
    named = Student(model="raykd/demo-student", lora=Lora(r=4))
    model = student.add_lora(loading.load_base_model(named, torch.float32), named, seed=0)
    made = filesystem.resolve(f"{bucket}/saved/trial/adapter")
    student.save_adapter(model, made, named, write=True, is_trained=False)
    return made


def test_an_adapter_is_saved_and_the_one_that_adds_nothing_is_made_of_it(adapter: Path, bucket: str):
    adapters.check_adapter(adapter, 4)
    adapted = student_batch.StudentModel("trial", "arm", 0, adapter, 4)
    folder = filesystem.resolve(f"{bucket}/saved/predictions/null_adapter")
    null, same = student_batch.with_null_adapter([student_batch.BASE_STUDENT, adapted], folder)
    assert same is adapted and null.adapter == folder
    adapters.check_adapter(folder, 4)


def test_the_harness_command_copies_what_it_reads(adapter: Path, bucket: str, tmp_path: Path):
    experiment = Experiment.model_validate(SMALL)
    plan, folder = plan_in(filesystem.resolve(f"{bucket}/asked")), filesystem.resolve(f"{bucket}/asked/lm_eval")
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


def test_what_libraries_say_is_copied_at_the_end_and_nobody_elses_is_replaced(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    log = filesystem.resolve(f"{bucket}/logged/experiments/mine") / "driver.log"
    for host in ("one", "another"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with console.redirect_library_output(log) as written:
            os.write(2, f"said by {host}".encode())
            assert written.is_file() and not (log.parent / written.name).exists()
    for host in ("one", "another"):
        assert f"said by {host}" in (log.parent / f"driver-{host}-{os.getpid()}.log").read_text()


def test_a_fault_of_a_run_is_in_the_log_that_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    storage_of_run = f"{bucket}/faulty"

    def fail(*_: object) -> None:
        log = filesystem.resolve(storage_of_run) / "experiments" / "quickstart" / "driver.log"
        with console.redirect_library_output(log):
            os.write(2, b"said by a library")
        raise RuntimeError("3 of 4 rows failed")

    monkeypatch.setattr(run, "run_experiment", fail)
    command = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={storage_of_run}"]
    assert cli.main(command) == 1
    named = capsys.readouterr().err.partition("Log: ")[2].strip()
    assert named.startswith(f"{storage_of_run}/experiments/quickstart/driver-")
    log = filesystem.resolve(named).read_text()
    assert "said by a library" in log and "Traceback" in log and "3 of 4 rows failed" in log


def test_a_log_that_the_bucket_does_not_take_is_named_where_it_is(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(filesystem, "put", refuse)
    # Nothing was written to it before.
    log = filesystem.resolve(f"{bucket}/refused/{os.getpid()}/experiments/mine") / "driver.log"
    told = console.append_to_log(log, "Traceback\n")
    assert not filesystem.is_remote(told) and told.read_text().endswith("Traceback\n")


def test_all_answers_are_collected_into_one_file(place: Path):
    rows = pa.Table.from_pylist(drawn("none", 0, 0.5, 0.5), schema=schemas.PREDICTION)
    for way in ("zero_shot_chat-1", "zero_shot_raw-2"):
        row_store.write_part(place / "predictions" / way, rows)
        row_store.finalize(place / "predictions" / way, schemas.PREDICTION, "prediction_id", {})
    for _ in range(2):
        evaluate.collect_predictions(place / "predictions", place / "predictions.parquet")
        found = files.read_table(place / "predictions.parquet", ["evaluation"])["evaluation"].to_pylist()
        assert found == ["zero_shot_chat-1"] * len(rows) + ["zero_shot_raw-2"] * len(rows)
