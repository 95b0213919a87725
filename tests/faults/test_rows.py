"""Rows that cannot be answered carry their error, and the others are there; too many of them fail the stage."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from raykd import records, storage
from runs import finish, parts, plan_of, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def rows_of(arguments: list[str]) -> list[dict]:
    (request,) = plan_of(arguments).requests
    return storage.read_rows(request.folder, records.COMPLETION).to_pylist()


def test_prompts_that_are_too_long(tmp_path: Path):
    """The engine refuses them, and answers what else is in their calls."""
    for split in ("train", "test"):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for number in range(40):
                question = f"Ada has {number} figs and buys 2. How many figs has she? " * (
                    60 if number % 13 == 5 else 1
                )
                print(
                    json.dumps({"question": question, "answer": f"It is {number + 2}.\n#### {number + 2}"}), file=file
                )
    files = ", ".join(f"{split}_file: {tmp_path / f'{split}.jsonl'}" for split in ("train", "test"))
    arguments = ["generate", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", "teacher.max_error_rate=0.1"]
    arguments += [f"problems={{source: jsonl, {files}}}", "arms={one: {prompt.strategy: teacher}}"]
    finish(arguments, tmp_path)
    rows = rows_of(arguments)
    failed = [row for row in rows if row["error"]]
    assert len(rows) == 40 and len(failed) == 3
    assert all("refused" in row["error"] and not row["completion"] for row in failed)
    assert all(row["completion_token_ids"] for row in rows if not row["error"])


@pytest.mark.slow
def test_an_engine_that_hangs(tmp_path: Path):
    """What it was asked meanwhile carries an error; that is too much, and the same command asks those rows again."""
    timeout_s = 15
    arguments = ["generate", str(ROOT / "configs/quickstart.yaml"), f"storage={tmp_path}", "problems.num_train=400"]
    arguments += ["teacher.max_error_rate=0.001"]
    arguments += [f"teacher.timeout_s={timeout_s}", "arms={one: {prompt.strategy: ground_truth}}"]
    with started(lambda: len(parts(tmp_path)) >= 2, arguments, tmp_path) as run:
        below = psutil.Process(run.pid).children(recursive=True)
        (engine,) = [each for each in below if "EngineCore" in " ".join(each.cmdline())]
        engine.send_signal(signal.SIGSTOP)
        time.sleep(timeout_s + 5)
        engine.send_signal(signal.SIGCONT)
        assert run.wait(300) == 1
    said = (tmp_path / "started.log").read_text().splitlines()[-1]
    failed = [row for row in rows_of(arguments) if row["error"]]
    answered = {row["problem_id"]: row["completion"] for row in rows_of(arguments) if not row["error"]}
    assert failed and len(answered) > 200
    assert f"{len(failed)} of 400 rows failed" in said and "teacher.max_error_rate=0.001" in said
    assert any(f"{row['problem_id']}: no answer within {timeout_s} s (teacher.timeout_s)" in said for row in failed)
    finish(arguments, tmp_path)
    again = {row["problem_id"]: row["completion"] for row in rows_of(arguments) if not row["error"]}
    assert len(rows_of(arguments)) == len(again) == 400
    assert answered.items() <= again.items(), "what was answered is not asked again"
