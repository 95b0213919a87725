"""Errors: one line for the user, whichever process of the cluster raises them."""

import errno
import os
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from raykd import cli, errors
from raykd.errors import StageError, UserError
from raykd.pipeline import run

ROOT = Path(__file__).parents[2]


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/part-1.parquet")


def test_os_error_is_found_in_the_chain_of_causes():
    try:
        try:
            raise no_space()
        except OSError:
            raise KeyError("x") from None
    except KeyError as error:
        assert "No space left on device: '/data/part-1.parquet'" in errors.os_error_message(error)
    remote = RayTaskError("f", f"Traceback ...\nOSError: {no_space()}\n\nThe above exception ...", ValueError())
    assert errors.os_error_message(remote) == "[Errno 28] No space left on device: '/data/part-1.parquet'"
    assert errors.os_error_message(FileNotFoundError(errno.ENOENT, "no such file")) == ""
    assert errors.os_error_message("ValueError: 28 problems") == ""


def test_root_cause_is_last_exception_line():
    text = "ray::f() (pid=1)\n  File x\nTimeoutError: the teacher was not up after 3 s\n"
    assert errors.root_cause(RayTaskError("f", text, ValueError())) == "TimeoutError: the teacher was not up after 3 s"
    assert errors.is_cluster_error(RayTaskError("f", text, ValueError()).as_instanceof_cause())
    assert not errors.is_cluster_error(ValueError())


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (no_space(), "a file cannot be read or written: [Errno 28] No space left on device: '/data/part-1.parquet'"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            "[Errno 13] Permission denied: '/data/x'; free disk space",
        ),
        (StageError("students: 3 of 4 rows failed"), "raykd: students: 3 of 4 rows failed."),
        (RayTaskError("f", "", StageError("3 rows failed")).as_instanceof_cause(), "raykd: 3 rows failed."),
        # A bug, or an error of a library.
        (ValueError("zip() argument 2 is shorter than argument 1"), "raykd: unexpected error: ValueError: zip() arg"),
        (RuntimeError("CUDA error\nsecond line"), "raykd: unexpected error: RuntimeError: CUDA error\\nsecond line."),
        (ZeroDivisionError("division by zero"), "raykd: unexpected error: ZeroDivisionError: division by zero."),
        (RayTaskError("f", "ray::f()\nvllm.Error: no such layer\n", ValueError()), "raykd: vllm.Error: no such layer."),
        (RayTaskError("f", "ray::f()\nValueError: 7\n", ValueError(7)).as_instanceof_cause(), "raykd: ValueError: 7."),
    ],
)
def test_failure_is_one_line_with_a_traceback_in_the_log(tmp_path: Path, monkeypatch, capsys, fault, line: str):
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(run, "run_experiment", fail)
    assert cli.main(["run", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}"]) == 1
    message = capsys.readouterr().err
    log = tmp_path / "experiments" / "quickstart" / "driver.log"
    assert line in message and str(log) in message and "re-run to resume" in message
    assert message.count("\n") == 1
    assert "Traceback" in log.read_text() or "ray::f" in log.read_text()


IN_A_UDF = """ray::MapWorker(MapBatches(M)).submit() (pid=1, ip=127.0.0.1)
  File "udf.py", line 7, in __call__
raykd.errors.UserError: strategy 'a': no rows

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(M)).submit() (pid=1, ip=127.0.0.1)
ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure `ray.data.DataContext.get_current()`.
"""
ANOTHER = """ray::f() (pid=1)
raykd.errors.UserError: strategy 'a': no rows

During handling of the above exception, another exception occurred:

ray::f() (pid=1)
KeyError: 'rows'
"""


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (UserError("a: b"), UserError, "a: b"),
        (ValueError("a: b"), None, ""),
        (RayTaskError("f", "", UserError("a: b")).as_instanceof_cause(), UserError, "a: b"),
        (RayTaskError("f", "", ValueError("a: b")).as_instanceof_cause(), None, ""),
        # Ray has only the traceback of the exception.
        (RayTaskError("f", IN_A_UDF, RuntimeError()), UserError, "strategy 'a': no rows"),
        (
            RayTaskError("f", IN_A_UDF.replace("UserError", "StageError"), KeyError()),
            StageError,
            "strategy 'a': no rows",
        ),
        (RayTaskError("f", ANOTHER, KeyError()), None, ""),
    ],
)
def test_reported_error_finds_the_error_of_another_process(fault: Exception, kind: type | None, message: str):
    found = errors.reported_error(fault)
    assert type(found) is (kind or type(None))
    assert str(found or "") == message


def test_handled_user_error_before_a_bug_is_not_reported():
    try:
        try:
            raise UserError("a: b")
        except UserError:
            {}["key"]
    except KeyError as error:
        assert errors.reported_error(error) is None


def test_user_error_of_another_process_is_one_line_with_status_2(tmp_path: Path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RayTaskError("f", IN_A_UDF, RuntimeError())

    monkeypatch.setattr(run, "run_experiment", fail)
    assert cli.main(["run", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path / 'new'}"]) == 2
    assert capsys.readouterr().err == "raykd: strategy 'a': no rows\n"
    assert not (tmp_path / "new").exists(), "a refused run wrote files"


def test_bug_without_a_folder_shows_its_traceback(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(cli, "_preview", fail)
    assert cli.main(["plan", str(ROOT / "configs/quickstart.yaml")]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and message.endswith(
        "unexpected error: ValueError: zip() argument 2 is shorter than argument 1\n"
    )


def test_library_error_about_input_names_its_source():
    with pytest.raises(UserError, match=r"^teacher: no dtype$"), errors.as_user_error("teacher", ValueError):
        raise ValueError("no\ndtype")
    with pytest.raises(UserError, match=r"^own: words$"), errors.as_user_error("teacher", ValueError):
        raise UserError("own: words")
    with pytest.raises(KeyError), errors.as_user_error("teacher", ValueError):
        raise KeyError("x")
