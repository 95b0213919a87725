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
from synthetic import drawn, full_experiment

from raykd import (
    adapters,
    cli,
    disagreements,
    evaluate,
    harness,
    location,
    pipeline,
    progress,
    records,
    storage,
    student,
)
from raykd.config import Experiment
from raykd.report import write_report
from raykd.sections import Lora, Student
from runs import started_plan

ROOT = Path(__file__).parents[2]
SMALL = {
    "name": "small",
    "problems": {"source": "demo", "num_train": 20, "num_test": 3},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {"primed": {"prompt.strategy": "teacher"}, "reference": {"targets.sequence": "reference"}},
}


def plan_in(root: Path) -> pipeline.Plan:
    return started_plan(Experiment.model_validate({**SMALL, "storage": str(root)}))


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in location.files(folder)}


def copied(folder: Path, target: Path) -> None:
    with location.written_folder(target) as local:
        for file in location.files(folder):
            (local / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (local / file.relative_to(folder)).write_bytes(file.read_bytes())


def test_an_experiment_has_the_same_keys_and_files_wherever_it_lies(bucket: str, tmp_path: Path):
    remote, local = plan_in(location.at(f"{bucket}/keys")), plan_in(tmp_path)
    assert [each.folder.name for each in remote.requests] == [each.folder.name for each in local.requests]
    assert [job.trial_id for job in remote.jobs] == [job.trial_id for job in local.jobs]
    assert names(remote.root) == names(local.root) != set()
    for split in ("train", "validation", "test"):
        tables = [storage.read_table(each.problems / f"{split}.parquet") for each in (remote, local)]
        assert tables[0].equals(tables[1])
    # What is there is found, and not made anew.
    before = location.states(remote.problems)
    again = plan_in(location.at(f"{bucket}/keys"))
    assert location.states(again.problems) == before and again.jobs == remote.jobs
    assert pickle.loads(pickle.dumps(remote.jobs)) == remote.jobs
    assert not remote.is_complete() and str(remote.folder) == f"{bucket}/keys/experiments/small"


def test_rows_to_train_on_are_the_same(bucket: str, tmp_path: Path):
    from raykd import models

    tokenizer = models.load_tokenizer(Student(model="raykd/demo-student"))
    plans = (plan_in(location.at(f"{bucket}/rows")), plan_in(tmp_path))
    jobs = [next(job for job in plan.jobs if job.arm_name == "reference") for plan in plans]
    rows = [student.training_rows(job.arm, job.problems, None, tokenizer, True)[0] for job in jobs]
    assert [row.prompt_token_ids for row in rows[0]] == [row.prompt_token_ids for row in rows[1]] != []


def test_a_report_in_a_bucket_is_that_of_a_folder(bucket: str, tmp_path: Path):
    local, remote = full_experiment(tmp_path / "mine").write(), location.at(f"{bucket}/reported/experiments/mine")
    copied(local, remote)
    write_report(local)
    write_report(remote)
    assert names(remote) == names(local)
    for name in ("results.csv", "report.md"):
        assert (remote / name).read_text() == (local / name).read_text()
    assert (remote / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_two_students_of_a_bucket_are_compared(bucket: str, tmp_path: Path):
    local, remote = full_experiment(tmp_path / "mine").write(), location.at(f"{bucket}/compared/mine")
    copied(local, remote)
    arms = list(dict.fromkeys(trial["arm"] for trial in trials(local)))[:2]
    texts = [disagreements.compare(*(f"{folder}:{arm}" for arm in arms)) for folder in (local, remote)]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="write FOLDER, FOLDER:ARM"):
        disagreements.compare(f"{remote}:a:b:c", f"{remote}:a")


def trials(folder: Path) -> list[dict]:
    return [storage.read_json(file) for file in location.in_each(folder / "trials", "trial.json")]


@pytest.fixture
def adapter(bucket: str) -> Path:
    """A student's adapter, saved into a bucket."""
    named = Student(model="raykd/demo-student", lora=Lora(rank=4))
    model = student.add_lora(student.load_base(named, torch.float32), named, seed=0)
    made = location.at(f"{bucket}/saved/trial/adapter")
    student.save_adapter(model, made, named, write=True, moved=False)
    return made


def test_an_adapter_is_saved_and_the_one_that_adds_nothing_is_made_of_it(adapter: Path, bucket: str):
    adapters.check(adapter, 4)
    adapted = evaluate.Contestant("trial", "arm", 0, adapter, 4)
    folder = location.at(f"{bucket}/saved/predictions/null_adapter")
    null, same = evaluate._with_null_adapter([evaluate.UNTOUCHED_STUDENT, adapted], folder)
    assert same is adapted and null.adapter == folder
    adapters.check(folder, 4)


def test_the_harness_command_copies_what_it_reads(adapter: Path, bucket: str, tmp_path: Path):
    experiment = Experiment.model_validate(SMALL)
    plan, folder = plan_in(location.at(f"{bucket}/asked")), location.at(f"{bucket}/asked/lm_eval")
    harness.write_task(experiment, plan.problems, folder)
    *copies, command = harness.command(experiment, folder, str(adapter)).split(" && ")
    for copy in copies:
        words = shlex.split(copy)
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    assert names(tmp_path / "lm_eval") == {"zero_shot_chat.jsonl", "raykd_small.yaml"}
    assert names(tmp_path / "adapter") == {adapters.CONFIG, adapters.WEIGHTS}
    words = shlex.split(command)
    assert words[words.index("--include_path") + 1] == "lm_eval"
    assert json.loads(words[words.index("--model_args") + 1])["peft"] == "adapter"


def test_what_libraries_say_is_copied_at_the_end_and_nobody_elses_is_replaced(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    log = location.at(f"{bucket}/logged/experiments/mine") / progress.LOG
    for host in ("one", "another"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with progress.libraries_write_to(log) as written:
            os.write(2, f"said by {host}".encode())
            assert written.is_file() and not (log.parent / written.name).exists()
    for host in ("one", "another"):
        assert f"said by {host}" in (log.parent / f"driver-{host}-{os.getpid()}.log").read_text()


def test_a_fault_of_a_run_is_in_the_log_that_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    storage_of_run = f"{bucket}/faulty"

    def fail(*_: object) -> None:
        log = location.at(storage_of_run) / "experiments" / "quickstart" / progress.LOG
        with progress.libraries_write_to(log):
            os.write(2, b"said by a library")
        raise RuntimeError("3 of 4 rows failed")

    monkeypatch.setattr(pipeline, "run", fail)
    command = ["run", str(ROOT / "configs/quickstart.yaml"), f"storage={storage_of_run}"]
    assert cli.main(command) == 1
    named = capsys.readouterr().err.partition("Log: ")[2].strip()
    assert named.startswith(f"{storage_of_run}/experiments/quickstart/driver-")
    log = location.at(named).read_text()
    assert "said by a library" in log and "Traceback" in log and "3 of 4 rows failed" in log


def test_a_log_that_the_bucket_does_not_take_is_named_where_it_is(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(location, "put", refuse)
    # Nothing was written to it before.
    log = location.at(f"{bucket}/refused/{os.getpid()}/experiments/mine") / progress.LOG
    told = progress.note(log, "Traceback\n")
    assert not location.is_remote(told) and told.read_text().endswith("Traceback\n")


def test_all_answers_are_collected_into_one_file(place: Path):
    rows = pa.Table.from_pylist(drawn("none", 0, 0.5, 0.5), schema=records.PREDICTION)
    for way in ("zero_shot_chat-1", "zero_shot_raw-2"):
        storage.write_part(place / "predictions" / way, rows)
        storage.seal(place / "predictions" / way, records.PREDICTION, "prediction_id", {})
    for _ in range(2):
        evaluate.collect(place / "predictions", place / "predictions.parquet")
        found = storage.read_table(place / "predictions.parquet", ["evaluation"])["evaluation"].to_pylist()
        assert found == ["zero_shot_chat-1"] * len(rows) + ["zero_shot_raw-2"] * len(rows)
