"""Faults: told in a sentence, from wherever on the cluster they came."""

import errno
import os
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from raykd import cli, faults, pipeline, storage

ROOT = Path(__file__).parents[2]


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/part-1.parquet")


def test_a_refusal_is_found_behind_what_it_led_to():
    try:
        try:
            raise no_space()
        except OSError:
            raise KeyError("x") from None
    except KeyError as error:
        assert "No space left on device: '/data/part-1.parquet'" in faults.refusal(error)
    far = RayTaskError("f", f"Traceback ...\nOSError: {no_space()}\n\nThe above exception ...", ValueError())
    assert faults.refusal(far) == "[Errno 28] No space left on device: '/data/part-1.parquet'"
    assert faults.refusal(FileNotFoundError(errno.ENOENT, "no such file")) == ""
    assert faults.refusal("ValueError: 28 problems") == ""


def test_the_cause_is_what_a_process_died_of():
    text = "ray::f() (pid=1)\n  File x\nTimeoutError: the teacher was not up after 3 s\n"
    assert faults.cause(RayTaskError("f", text, ValueError())) == "TimeoutError: the teacher was not up after 3 s"
    assert faults.is_of_the_cluster(RayTaskError("f", text, ValueError()).as_instanceof_cause())
    assert not faults.is_of_the_cluster(ValueError())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (no_space(), "a file cannot be read or written: [Errno 28] No space left on device: '/data/part-1.parquet'"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            "[Errno 13] Permission denied: '/data/x'; make",
        ),
        (RuntimeError("students: 3 of 4 rows failed"), "raykd: students: 3 of 4 rows failed."),
        (RayTaskError("f", "ray::f()\nvllm.Error: no such layer\n", ValueError()), "raykd: vllm.Error: no such layer."),
        (RayTaskError("f", "ray::f()\nValueError: 7\n", ValueError(7)).as_instanceof_cause(), "raykd: ValueError: 7."),
    ],
)
def test_a_fault_is_told_in_a_line_and_kept_in_the_log(tmp_path: Path, monkeypatch, capsys, fault, told: str):
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(pipeline, "run", fail)
    assert cli.main(["run", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}"]) == 1
    said = capsys.readouterr().err
    log = tmp_path / "experiments" / "quickstart" / "driver.log"
    assert told in said and str(log) in said and "the same command goes on" in said
    assert said.count("\n") == 1
    assert "Traceback" in log.read_text() or "ray::f" in log.read_text()


def test_a_mistake_of_raykds_own_keeps_its_traceback(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}"])


def test_a_write_that_is_refused_names_the_file(tmp_path: Path):
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError, match=r"folder/file\.json"):
        storage.write_json(tmp_path / "folder" / "file.json", {})
