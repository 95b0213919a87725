"""A teacher behind an endpoint: its rows, its failures, its identity, and the secrecy of its key."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from fake_openai_server import KEY, KEY_ENV, Answer, FakeServer, ReceivedRequest, complete_answer, serving
from raykd import identity
from raykd.cluster import resources
from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment
from raykd.data import datasets, prompts
from raykd.errors import StageError
from raykd.models import loading
from raykd.pipeline import preflight, run_record
from raykd.pipeline.plan import Plan
from raykd.planning import preview
from raykd.runtime import metrics
from raykd.storage import row_store, schemas
from raykd.storage.files import read_json
from raykd.teacher import build_prompts, completion_set
from raykd.teacher.client import TeacherClient
from raykd.teacher.completion_set import CompletionSet
from raykd.training import examples
from raykd.tuning import variants
from runs import started_plan

URL = "http://127.0.0.1:9/v1"
SOFT = {"prompt.strategy": "teacher", "targets.kind": "top_k", "targets.top_k": 3}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def experiment(root: Path, endpoint: dict[str, Any] | None, arms: dict[str, Any], **teacher: Any) -> Experiment:
    config = {"model": "raykd/demo-teacher", "batch_size": 4, "timeout_s": 20, **teacher}
    return Experiment.model_validate(
        {
            "name": "small",
            "storage": str(root),
            "dataset": {"source": "demo", "num_train": 6, "num_test": 2},
            "teacher": config | ({"endpoint": endpoint} if endpoint else {}),
            "student": {"model": "raykd/demo-student"},
            "arms": arms,
        }
    )


def at(server: FakeServer, **endpoint: Any) -> dict[str, Any]:
    return {"url": server.url, "max_retries": 0, "api_key_env": KEY_ENV, **endpoint}


def prepared(config: Experiment) -> tuple[Plan, CompletionSet]:
    plan = started_plan(config)
    (completions,) = plan.required_sets
    return plan, completions


def generate(plan: Plan, completions: CompletionSet) -> list[dict[str, Any]]:
    """Call the teacher as Ray Data does, batch by batch, and return the rows that were written."""
    config, instruction = plan.experiment.teacher, plan.experiment.prompt.instruction
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet")
    rows = build_prompts.BuildTeacherPrompts([completions], config, instruction, {completions.folder: set()})(problems)

    counts: list[dict[str, Any]] = []

    async def call_teacher() -> None:
        teacher = TeacherClient("", config, [completions], max_calls=2)
        for start in range(0, len(rows), config.batch_size):
            part = rows.slice(start, config.batch_size)
            batch = {name: np.array([*part[name].to_pylist(), None], dtype=object)[:-1] for name in part.column_names}
            tokens = ("prompt_token_ids", "given_token_ids")
            batch |= {name: np.array([np.array(each) for each in batch[name]] + [None], object)[:-1] for name in tokens}
            async for row in teacher(batch):
                counts.append({name: value for name, (value,) in row.items()})

    asyncio.run(call_teacher())
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION).to_pylist()
    # The driver adds up the counts of the calls.
    assert {(each["strategy"], each["source"]) for each in counts} == {(completions.strategy_name, completions.source)}
    for name, number in dataclasses.asdict(metrics.count_rows(rows)).items():
        assert sum(each[name] for each in counts) == number
    return rows


def test_endpoint_rows_have_soft_targets(tmp_path: Path):
    with serving(complete_answer) as server:
        plan, completions = prepared(experiment(tmp_path, at(server), {"soft": SOFT}))
        rows = generate(plan, completions)
    tokenizer, prime = loading.load_tokenizer(plan.experiment.teacher), plan.experiment.strategies["teacher"].text
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    assert sorted(row["problem_id"] for row in rows) == sorted(problem["problem_id"] for problem in problems)
    assert len(server.requests) == len(rows) + 1, "one request per row, and the check"
    sent = {tuple(request.body["prompt"]) for request in server.requests}
    for row in rows:
        assert not row["error"] and tuple(row["prompt_token_ids"]) in sent
        assert prime in tokenizer.decode(row["prompt_token_ids"])
        assert row["completion"] == f"{sum(row['prompt_token_ids'])}\n#### 4" and row["answer_strict"] == "4"
        assert row["completion_token_ids"] == [0, 1]
        assert row["topk_ids"] == [[0, 1, 2], [0, 1, 2]] and row["topk_logprobs"] == [[-1.0, -2.0, -3.0]] * 2


def test_endpoint_scores_reference_solutions(tmp_path: Path):
    arms = {"scored": {"targets": {"source": "reference", "kind": "top_k", "top_k": 3}}}
    with serving(complete_answer) as server:
        config = experiment(tmp_path, at(server), arms)
        plan, completions = prepared(config)
        rows = generate(plan, completions)
    solutions = {
        each["problem_id"]: each["reference_solution"]
        for each in pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    }
    sent = {tuple(request.body["prompt"]) for request in server.requests}
    for row in rows:
        assert row["completion"] == solutions[row["problem_id"]]
        assert tuple(row["prompt_token_ids"] + row["completion_token_ids"]) in sent
        assert row["topk_ids"] == [[0, 1, 2]] * len(row["completion_token_ids"])


def test_chat_teacher_needs_no_local_model(tmp_path: Path):
    arms = {"hard": {"prompt.strategy": "teacher"}}
    with serving(complete_answer) as server:
        config = experiment(tmp_path, at(server, api="chat", model="large-1"), arms, model="not-a-local-model")
        plan, completions = prepared(config)
        rows = generate(plan, completions)
    assert not plan.trials[0].same_tokens
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    messages = [
        prompts.teacher_messages(each, config.strategies["teacher"], config.prompt.instruction) for each in problems
    ]
    bodies = [each.body for each in server.requests[1:]]
    assert sorted(map(str, messages)) == sorted(str(each["messages"]) for each in bodies)
    assert {each["model"] for each in bodies} == {"large-1"}
    tokenizer = loading.load_tokenizer(config.student)
    (trial,) = plan.trials
    found, dropped = examples.build_examples(
        trial.arm, trial.problems, completions.folder, tokenizer, trial.same_tokens
    )
    completions_by_problem = {row["problem_id"]: row["completion"] for row in rows}
    assert len(found) == len(problems) and not dropped
    for target in found:
        assert target.completion_token_ids[-1] == tokenizer.eos_token_id
        expected = tokenizer(completions_by_problem[target.problem_id], add_special_tokens=False)["input_ids"]
        assert target.completion_token_ids[:-1] == expected
    # Prompts can be previewed, and their lengths are not checked.
    assert "[user]\n" in preview.render_prompts(config, "0") and "not-a-local-model" in preview.render_prompts(
        config, "0"
    )
    build_prompts.check_teacher_lengths([completions], plan.problems, config.teacher, "", 10**9)


def test_refused_row_has_error(tmp_path: Path):
    def respond(request: ReceivedRequest, number: int) -> Answer:
        return (400, {}, {"error": {"message": "too long"}}) if number == 3 else complete_answer(request)

    with serving(respond) as server:
        rows = generate(*prepared(experiment(tmp_path, at(server), {"soft": SOFT})))
    errors = [row["error"] for row in rows if row["error"]]
    assert (len(rows), errors) == (6, ["refused, status 400: too long"])


@pytest.mark.parametrize("status", [401, 500])
def test_unavailable_server_ends_the_stage_and_keeps_rows(tmp_path: Path, status: int):
    def respond(request: ReceivedRequest, number: int) -> Answer:
        return complete_answer(request) if number < 3 else (status, {}, {"error": {"message": KEY}})

    with serving(respond) as server:
        plan, completions = prepared(experiment(tmp_path, at(server), {"soft": SOFT}))
        with pytest.raises(StageError, match=f"teacher.endpoint {server.url}: .*status {status}"):
            generate(plan, completions)
        assert len(server.requests) == 1 + 4 + 1, "the check, a call of four, and the check that failed"
    rows = row_store.read_rows(completions.folder, schemas.COMPLETION).to_pylist()
    assert sorted(bool(row["error"]) for row in rows) == [False, False, True, True]
    done = row_store.done_ids(completions.folder, schemas.COMPLETION, "completion_id")
    assert done == {row["completion_id"] for row in rows if not row["error"]}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_key_is_not_written(tmp_path: Path):
    with serving(complete_answer) as server:
        plan, completions = prepared(experiment(tmp_path, at(server), {"soft": SOFT}))
        generate(plan, completions)
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"experiment.yaml", "run.json"} <= {file.name for file in files}
    assert KEY_ENV in (plan.folder / "experiment.yaml").read_text()
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in json.dumps(completions.content)


def completions_of(config: Experiment, root: Path) -> CompletionSet:
    arms, splits = (
        variants.arms_by_config_id(variants.variants(config, {})),
        datasets.resolve_splits(config.dataset, root),
    )
    (found,) = completion_set.completion_sets_for(
        config, arms, splits.content, root, {"model": "a", "revision": "1"}
    ).values()
    assert found
    return found


def test_completions_are_identified_by_server_model_and_api(tmp_path: Path):
    def identify(endpoint: dict[str, Any] | None, **teacher: Any) -> tuple[str, dict[str, Any]]:
        config = experiment(tmp_path, endpoint, {"a": {}}, **teacher)
        return completions_of(config, tmp_path).folder.name, identity.experiment_fields(config)

    first = identify({"url": URL})
    more = {
        "url": URL,
        "api_key_env": "KEY",
        "max_retries": 1,
        "max_requests_per_minute": 3,
        "max_concurrent_requests": 2,
    }
    assert identify(more) == first
    assert identify({"url": URL, "model": "raykd/demo-teacher"}) == first, "the default name is in the key"
    assert identify({"url": URL}, engine={"engine_kwargs": {"quantization": "fp8"}}) == first, (
        "engine arguments are in the key"
    )
    others = [identify(None), identify({"url": URL, "model": "another"}), identify({"url": URL, "api": "chat"})]
    others.append(identify({"url": "https://another.example/v1"}))
    assert len({key for key, _ in [first, *others]}) == 5
    # Completions generated without an endpoint keep their key.
    assert "endpoint" not in completions_of(experiment(tmp_path, None, {"a": {}}), tmp_path).content
    assert not [
        path for path in identity.experiment_fields(experiment(tmp_path, None, {"a": {}})) if "endpoint" in path
    ]
    with pytest.raises(ValueError, match=r"teacher\.endpoint\.api was None, is 'chat'"):
        (tmp_path / "experiment.yaml").write_text(dump_experiment(experiment(tmp_path, None, {"a": {}})))
        run_record.check_compatible(experiment(tmp_path, {"url": URL, "api": "chat"}, {"a": {}}), tmp_path)


@pytest.mark.parametrize("source", ["teacher", "reference", "student"])
def test_chat_api_refuses_soft_targets(tmp_path: Path, source: str):
    targets = {"targets": {"source": source, "kind": "top_k"}}
    assert experiment(tmp_path, {"url": URL}, {"soft": targets})
    with pytest.raises(ValueError) as caught:
        experiment(tmp_path, {"url": URL, "api": "chat"}, {"soft": targets})
    for word in ("arm 'soft'", "targets.kind=top_k", "teacher.endpoint.api=chat", "set targets.kind=hard"):
        assert word in str(caught.value)


def test_endpoint_teacher_needs_no_cluster_resources(tmp_path: Path):
    cluster = {"CPU": 2.0, "GPU": 0.0}
    config = experiment(
        tmp_path, {"url": URL}, {"soft": SOFT}, engine={"tensor_parallel_size": 8, "accelerator": "gpu"}
    )
    assert resources.teacher_processors(config.teacher, cluster)[1] == 0
    assert resources.resources_beside_teacher(config.teacher, cluster) == cluster
    plan, _ = prepared(config)
    preflight.preflight(plan, cluster, ["generate"])
    with run_record.track_processors(
        plan.folder, run_record.TEACHER_ROLE, *resources.teacher_processors(config.teacher, cluster)
    ):
        pass
    assert read_json(plan.folder / "run.json")["processor_seconds"] == {}
    local, _ = prepared(
        experiment(tmp_path / "local", None, {"soft": SOFT}, engine={"tensor_parallel_size": 8, "accelerator": "gpu"})
    )
    with pytest.raises(ValueError, match=r"teacher\.engine: 1 x 8 x 1 processes"):
        preflight.preflight(local, cluster, ["generate"])
