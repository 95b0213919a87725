"""Failed rows have an error, and too many of them fail the stage.

test_run.py covers prompts that are too long.
"""

import signal
import time
from pathlib import Path

import psutil
import pytest

from raykd.storage import row_store, schemas
from runs import finish, parts, plan_of, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def rows_of(arguments: list[str]) -> list[dict]:
    (completions,) = plan_of(arguments).required_sets
    return row_store.read_rows(completions.folder, schemas.COMPLETION).to_pylist()


# Starts two engines. In `make test`, test_teacher_retries.py covers reply timeouts, test_row_store.py the error.
@pytest.mark.slow
def test_hanging_engine_fails_stage_and_rows_are_retried(tmp_path: Path):
    """Requests fail while the engine hangs, the stage ends with an error, and the same command retries these rows."""
    timeout_s = 15
    arguments = ["generate", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", "dataset.num_train=400"]
    arguments += ["teacher.max_error_rate=0.001"]
    arguments += [f"teacher.timeout_s={timeout_s}", "arms={one: {prompt.strategy: ground_truth}}"]
    with started(lambda: len(parts(tmp_path)) >= 2, arguments, tmp_path) as run:
        descendants = psutil.Process(run.pid).children(recursive=True)
        (engine,) = [each for each in descendants if "EngineCore" in " ".join(each.cmdline())]
        engine.send_signal(signal.SIGSTOP)
        time.sleep(timeout_s + 5)
        engine.send_signal(signal.SIGCONT)
        assert run.wait(300) == 1
    message = (tmp_path / "started.log").read_text().splitlines()[-1]
    failed = [row for row in rows_of(arguments) if row["error"]]
    answered = {row["problem_id"]: row["completion"] for row in rows_of(arguments) if not row["error"]}
    assert failed and len(answered) > 200
    assert f"{len(failed)} of 400 rows failed" in message and "teacher.max_error_rate=0.001" in message
    assert any(f"{row['problem_id']}: no answer within {timeout_s} s (teacher.timeout_s)" in message for row in failed)
    finish(arguments, tmp_path)
    again = {row["problem_id"]: row["completion"] for row in rows_of(arguments) if not row["error"]}
    assert len(rows_of(arguments)) == len(again) == 400
    assert answered.items() <= again.items(), "answered rows are not generated again"
