"""`ray job submit` to a head with token authentication."""

import re
from pathlib import Path

import pytest

from reference_run import PLANTED, STUDENTS, Reference

pytestmark = pytest.mark.timeout(2400)


def test_job_runs_whole_experiment(reference: Reference):
    assert "succeeded" in reference.output
    report = re.search(r"report: (\S+)", reference.output)
    assert report
    assert Path(report[1]) == reference.plan.folder / "report.html"
    assert Path(report[1]).exists()
    assert (reference.plan.folder / "results.csv").read_text().count("\n") == 1 + len(STUDENTS)


def test_token_is_not_in_files_output_or_job_records(reference: Reference):
    assert "rayjobs/run.py" in reference.job_list
    assert PLANTED not in reference.output + reference.job_list
    files = [file for file in reference.plan.root.rglob("*") if file.is_file()]
    assert len(files) > 50
    assert not [file for file in files if PLANTED.encode() in file.read_bytes()]


def test_job_with_invalid_config_fails_with_message(reference: Reference):
    assert reference.invalid_job.returncode != 0
    assert "did you mean 'epochs'" in reference.invalid_job.stdout + reference.invalid_job.stderr


def test_submission_with_wrong_token_is_refused(reference: Reference):
    assert reference.unauthorized_job.returncode != 0
    assert "token" in (reference.unauthorized_job.stdout + reference.unauthorized_job.stderr).lower()
