"""A teacher elsewhere in the run: its rows, what ends it, what identifies it, what is refused and not written."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from fake_openai_server import KEY, KEY_ENV, Answer, Asked, Elsewhere, as_wanted, serving
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
from raykd.storage import row_store, schemas
from raykd.storage.files import read_json
from raykd.teacher import completion_set, generate
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
    told = {"model": "raykd/demo-teacher", "batch_size": 4, "timeout_s": 20, **teacher}
    return Experiment.model_validate(
        {
            "name": "small",
            "storage": str(root),
            "dataset": {"source": "demo", "num_train": 6, "num_test": 2},
            "teacher": told | ({"endpoint": endpoint} if endpoint else {}),
            "student": {"model": "raykd/demo-student"},
            "arms": arms,
        }
    )


def at(elsewhere: Elsewhere, **endpoint: Any) -> dict[str, Any]:
    return {"url": elsewhere.url, "max_retries": 0, "api_key_env": KEY_ENV, **endpoint}


def prepared(told: Experiment) -> tuple[Plan, CompletionSet]:
    plan = started_plan(told)
    (request,) = plan.required_sets
    return plan, request


def make(plan: Plan, request: CompletionSet) -> list[dict[str, Any]]:
    """Asks as Ray Data does, call by call, and reads what was written."""
    told, instruction = plan.experiment.teacher, plan.experiment.prompt.instruction
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet")
    rows = generate.BuildTeacherPrompts([request], told, instruction, {request.folder: set()})(problems)

    async def asked() -> None:
        teacher = TeacherClient("", "elsewhere", told, [request], in_flight=2)
        for start in range(0, len(rows), told.batch_size):
            part = rows.slice(start, told.batch_size)
            batch = {name: np.array([*part[name].to_pylist(), None], dtype=object)[:-1] for name in part.column_names}
            tokens = ("prompt_token_ids", "given_token_ids")
            batch |= {name: np.array([np.array(each) for each in batch[name]] + [None], object)[:-1] for name in tokens}
            async for _ in teacher(batch):
                pass

    asyncio.run(asked())
    return row_store.read_rows(request.folder, schemas.COMPLETION).to_pylist()


def test_soft_rows_hold_what_the_server_gave_token_by_token(tmp_path: Path):
    with serving(as_wanted) as elsewhere:
        plan, request = prepared(experiment(tmp_path, at(elsewhere), {"soft": SOFT}))
        rows = make(plan, request)
    tokenizer, prime = loading.load_tokenizer(plan.experiment.teacher), plan.experiment.strategies["teacher"].text
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    assert sorted(row["problem_id"] for row in rows) == sorted(problem["problem_id"] for problem in problems)
    assert len(elsewhere.asked) == len(rows) + 1, "and the check"
    sent = {tuple(asked.body["prompt"]) for asked in elsewhere.asked}
    for row in rows:
        assert not row["error"] and tuple(row["prompt_token_ids"]) in sent
        assert prime in tokenizer.decode(row["prompt_token_ids"])
        assert row["completion"] == f"{sum(row['prompt_token_ids'])}\n#### 4" and row["answer_strict"] == "4"
        assert row["completion_token_ids"] == [0, 1]
        assert row["topk_ids"] == [[0, 1, 2], [0, 1, 2]] and row["topk_logprobs"] == [[-1.0, -2.0, -3.0]] * 2


def test_the_reference_solutions_are_scored_elsewhere(tmp_path: Path):
    arms = {"scored": {"targets": {"source": "reference", "kind": "top_k", "top_k": 3}}}
    with serving(as_wanted) as elsewhere:
        told = experiment(tmp_path, at(elsewhere), arms)
        plan, request = prepared(told)
        rows = make(plan, request)
    solutions = {
        each["problem_id"]: each["reference_solution"]
        for each in pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    }
    sent = {tuple(asked.body["prompt"]) for asked in elsewhere.asked}
    for row in rows:
        assert row["completion"] == solutions[row["problem_id"]]
        assert tuple(row["prompt_token_ids"] + row["completion_token_ids"]) in sent
        assert row["topk_ids"] == [[0, 1, 2]] * len(row["completion_token_ids"])


def test_a_teacher_that_is_sent_messages_need_not_be_here_and_teaches_by_its_text(tmp_path: Path):
    arms = {"hard": {"prompt.strategy": "teacher"}}
    with serving(as_wanted) as elsewhere:
        told = experiment(tmp_path, at(elsewhere, api="chat", model="large-1"), arms, model="a-vendors-largest")
        plan, request = prepared(told)
        rows = make(plan, request)
    assert not plan.same_tokens
    problems = pyarrow.parquet.read_table(plan.problems / "train.parquet").to_pylist()
    messages = [
        prompts.teacher_messages(each, told.strategies["teacher"], told.prompt.instruction) for each in problems
    ]
    asked = [each.body for each in elsewhere.asked[1:]]
    assert sorted(map(str, messages)) == sorted(str(each["messages"]) for each in asked)
    assert {each["model"] for each in asked} == {"large-1"}
    tokenizer = loading.load_tokenizer(told.student)
    (job,) = plan.trials
    found, dropped = examples.build_examples(job.arm, job.problems, request.folder, tokenizer, job.same_tokens)
    said = {row["problem_id"]: row["completion"] for row in rows}
    assert len(found) == len(problems) and not dropped
    for target in found:
        assert target.completion_token_ids[-1] == tokenizer.eos_token_id
        expected = tokenizer(said[target.problem_id], add_special_tokens=False)["input_ids"]
        assert target.completion_token_ids[:-1] == expected
    # Before anything is asked it is shown, and its length is nobody's to check.
    assert "[user]\n" in preview.render_prompts(told, "0") and "a-vendors-largest" in preview.render_prompts(told, "0")
    generate.check_teacher_lengths([request], plan.problems, told.teacher, "", 10**9)


def test_a_row_that_is_refused_carries_that_and_the_others_are_there(tmp_path: Path):
    def says(asked: Asked, number: int) -> Answer:
        return (400, {}, {"error": {"message": "too long"}}) if number == 3 else as_wanted(asked)

    with serving(says) as elsewhere:
        rows = make(*prepared(experiment(tmp_path, at(elsewhere), {"soft": SOFT})))
    errors = [row["error"] for row in rows if row["error"]]
    assert (len(rows), errors) == (6, ["refused, status 400: too long"])


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_is_gone_ends_it_and_what_was_answered_stays(tmp_path: Path, status: int):
    def says(asked: Asked, number: int) -> Answer:
        return as_wanted(asked) if number < 3 else (status, {}, {"error": {"message": KEY}})

    with serving(says) as elsewhere:
        plan, request = prepared(experiment(tmp_path, at(elsewhere), {"soft": SOFT}))
        with pytest.raises(StageError, match=f"teacher.endpoint {elsewhere.url}: .*status {status}"):
            make(plan, request)
        assert len(elsewhere.asked) == 1 + 4 + 1, "the check, a call of four, and the check that failed"
    rows = row_store.read_rows(request.folder, schemas.COMPLETION).to_pylist()
    assert sorted(bool(row["error"]) for row in rows) == [False, False, True, True]
    done = row_store.done_ids(request.folder, schemas.COMPLETION, "completion_id")
    assert done == {row["completion_id"] for row in rows if not row["error"]}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_the_key_is_written_nowhere(tmp_path: Path):
    with serving(as_wanted) as elsewhere:
        plan, request = prepared(experiment(tmp_path, at(elsewhere), {"soft": SOFT}))
        make(plan, request)
    assert {asked.headers["authorization"] for asked in elsewhere.asked} == {f"Bearer {KEY}"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"experiment.yaml", "run.json"} <= {file.name for file in files}
    assert KEY_ENV in (plan.folder / "experiment.yaml").read_text()
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in json.dumps(request.content)


def request_of(told: Experiment, root: Path) -> CompletionSet:
    lessons, splits = (
        variants.arms_by_config_id(variants.variants(told, {})),
        datasets.resolve_splits(told.problems, root),
    )
    (found,) = completion_set.completion_sets_for(
        told, lessons, splits.identity, root, {"model": "a", "revision": "1"}
    ).values()
    assert found
    return found


def test_rows_are_those_of_a_model_and_an_api_wherever_it_is_asked_and_how_fast(tmp_path: Path):
    def of(endpoint: dict[str, Any] | None, **teacher: Any) -> tuple[str, dict[str, Any]]:
        told = experiment(tmp_path, endpoint, {"a": {}}, **teacher)
        return request_of(told, tmp_path).folder.name, identity.experiment_fields(told)

    first = of({"url": URL})
    more = {"api_key_env": "KEY", "max_retries": 1, "max_requests_per_minute": 3, "max_concurrent_requests": 2}
    assert of({"url": "https://elsewhere/v1", **more}) == first
    assert of({"url": URL, "model": "raykd/demo-teacher"}) == first, "the name that it has anyway"
    assert of({"url": URL}, engine={"engine_kwargs": {"quantization": "fp8"}}) == first, "no engine is started"
    others = [of(None), of({"url": URL, "model": "another"}), of({"url": URL, "api": "chat"})]
    assert len({key for key, _ in [first, *others]}) == 4
    # What was asked without one is found again.
    assert "endpoint" not in request_of(experiment(tmp_path, None, {"a": {}}), tmp_path).content
    assert not [
        path for path in identity.experiment_fields(experiment(tmp_path, None, {"a": {}})) if "endpoint" in path
    ]
    with pytest.raises(ValueError, match=r"teacher\.endpoint\.api was None, is 'chat'"):
        (tmp_path / "experiment.yaml").write_text(dump_experiment(experiment(tmp_path, None, {"a": {}})))
        run_record.check_compatible(experiment(tmp_path, {"url": URL, "api": "chat"}, {"a": {}}), tmp_path)


@pytest.mark.parametrize("source", ["teacher", "reference", "student"])
def test_soft_targets_of_text_alone_are_refused(tmp_path: Path, source: str):
    targets = {"targets": {"source": source, "kind": "top_k"}}
    assert experiment(tmp_path, {"url": URL}, {"soft": targets})
    with pytest.raises(ValueError) as caught:
        experiment(tmp_path, {"url": URL, "api": "chat"}, {"soft": targets})
    for word in ("arm 'soft'", "targets.kind=top_k", "teacher.endpoint.api=chat", "set targets.kind=hard"):
        assert word in str(caught.value)


def test_a_teacher_elsewhere_holds_nothing_of_the_cluster(tmp_path: Path):
    cluster = {"CPU": 2.0, "GPU": 0.0}
    told = experiment(tmp_path, {"url": URL}, {"soft": SOFT}, engine={"tensor_parallel_size": 8, "accelerator": "gpu"})
    assert resources.teacher_processors(told.teacher, cluster)[1] == 0
    assert resources.resources_beside_teacher(told.teacher, cluster) == cluster
    plan, _ = prepared(told)
    preflight.preflight(plan, cluster, ["generate"])
    with run_record.track_processors(
        plan.folder, run_record.TEACHER_ROLE, *resources.teacher_processors(told.teacher, cluster)
    ):
        pass
    assert read_json(plan.folder / "run.json")["processor_seconds"] == {}
    here, _ = prepared(
        experiment(tmp_path / "here", None, {"soft": SOFT}, engine={"tensor_parallel_size": 8, "accelerator": "gpu"})
    )
    with pytest.raises(ValueError, match=r"teacher\.engine: 1 x 8 x 1 shards"):
        preflight.preflight(here, cluster, ["generate"])
