"""The teacher on several processes and nodes: sharded, with replicas, and removed before training."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import ProxyLocation
from ray.util import placement_group, placement_group_table, remove_placement_group
from transformers import AutoModelForCausalLM

from clusters import cluster
from fake_gpu import FakeGpuServer, deployed, train_on
from oracles import greedy
from raykd.cluster import resources
from raykd.config.sections import Teacher
from raykd.config.training import Student, Train
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model
from raykd.teacher.deployment import TeacherDeployment

pytestmark = pytest.mark.timeout(600)

MODEL = "raykd/demo-teacher"
ENGINE = {"engine_kwargs": {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8}}
GREEDY = {"max_tokens": 12, "temperature": 0.0}
QUESTIONS = ["A box holds 4 pens. How many do 3 boxes hold?", "Ann has 7 eggs and eats 2. How many are left?"]
# The GPUs of these tests are fake; no model is loaded.
SHARDED = {"accelerator": "gpu", "tensor_parallel_size": 8, "pipeline_parallel_size": 2, "accelerator_type": "H100"}


class Located(TeacherDeployment):
    """A replica whose answers name its node."""

    async def answer(self, *arguments: Any) -> list[dict[str, Any]]:
        node = ray.get_runtime_context().get_node_id()
        return [{"node": node, **reply} for reply in await super().answer(*arguments)]


@contextlib.contextmanager
def connected(ray_cluster: Cluster) -> Iterator[None]:
    ray.init(address=ray_cluster.address, log_to_driver=False)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_for_all() -> None:
    """Wait until all replicas are up; otherwise the first one would answer all calls."""
    deadline = time.monotonic() + 240
    while any(app.status != "RUNNING" for app in serve.status().applications.values()):
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = loading.load_tokenizer(Student(model=MODEL))
    return [tokenization.prompt_token_ids(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32).eval()
    eos = loading.load_tokenizer(Student(model=MODEL)).eos_token_id
    return [greedy(model, prompt, eos, GREEDY["max_tokens"]) for prompt in prompts]


# Starts an engine of two processes. In `make test`, the test of 16 GPUs covers the placement of shards.
@pytest.mark.slow
def test_sharded_engine_answers_like_transformers(prompts: list[list[int]], expected: list[list[int]]):
    section = Teacher.model_validate(
        {
            "model": MODEL,
            # Without this variable, vLLM needs one NUMA node per process.
            "engine": {**ENGINE, "tensor_parallel_size": 2, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}},
        }
    )
    with cluster(2) as nodes, connected(nodes), deployed(section, "cpu", TeacherDeployment) as handle:
        replies = handle.answer.remote(prompts, GREEDY, 120).result(timeout_s=240)
        (group,) = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
    assert [reply["token_ids"].tolist() for reply in replies] == expected
    assert group["strategy"] == "PACK"
    assert len(set(group["bundles_to_node_id"].values())) == 1


# Starts two engines. In `make test`, the test of 16 GPUs covers the placement of one replica; nothing covers two.
@pytest.mark.slow
def test_two_replicas_on_two_nodes_both_answer(prompts: list[list[int]], expected: list[list[int]]):
    section = Teacher.model_validate({"model": MODEL, "engine": ENGINE, "replicas": {"min": 2, "max": 2}})
    with cluster(1, 1) as nodes, connected(nodes), deployed(section, "cpu", Located) as handle:
        wait_for_all()
        calls = [handle.answer.remote(prompts, GREEDY, 120) for _ in range(16)]
        replies = [reply for call in calls for reply in call.result(timeout_s=240)]
    assert [reply["token_ids"].tolist() for reply in replies] == expected * 16
    answered = Counter(reply["node"] for reply in replies)
    assert len(answered) == 2, answered


@pytest.fixture(scope="module")
def fake_gpu_cluster() -> Iterator[Cluster]:
    """Three nodes with eight fake GPUs each, of two types, and a head without GPUs."""
    with cluster() as ray_cluster:
        for kind in ("H100", "H100", "A10G"):
            # The nodes share this machine's memory.
            ray_cluster.add_node(num_cpus=10, num_gpus=8, resources={f"accelerator_type:{kind}": 1})
        with connected(ray_cluster):
            yield ray_cluster


def nodes_of(kind: str) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if f"accelerator_type:{kind}" in node["Resources"]}


def test_16_gpu_replica_spans_two_nodes_and_frees_them_for_students(fake_gpu_cluster: Cluster):
    section = Teacher.model_validate({"model": MODEL, "engine": SHARDED})
    workers = Train(num_workers=2, batch_size=2, accelerator="gpu", accelerator_type="H100")
    with deployed(section, "gpu", FakeGpuServer) as handle:
        assert handle.answer.remote(0).result(timeout_s=60) in nodes_of("H100")
        (group,) = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
        assert set(group["bundles_to_node_id"].values()) == nodes_of("H100")
        assert sorted(Counter(group["bundles_to_node_id"].values()).values()) == [8, 8]
        trial_group = placement_group(resources.trial_bundles(workers, "gpu"))
        assert not trial_group.wait(5), "the teacher does not hold all H100"
    assert trial_group.wait(60)
    remove_placement_group(trial_group)
    reports = train_on(workers)
    assert len(reports) == 2
    assert {node for node, _ in reports} <= nodes_of("H100")
    assert all(len(gpus) == 1 for _, gpus in reports)


# Serve adds a replica after 30 s of load. Nothing in `make test` scales replicas.
@pytest.mark.slow
def test_replicas_scale_up_with_load_and_down_to_zero(fake_gpu_cluster: Cluster):
    section = Teacher.model_validate(
        {
            "model": MODEL,
            "engine": {**SHARDED, "pipeline_parallel_size": 1},
            "replicas": {"min": 0, "max": 2},
            "concurrency": 2,
        }
    )
    with deployed(section, "gpu", FakeGpuServer) as handle:
        assert ray.available_resources()["GPU"] == 24
        # More requests than one replica answers in 30 s, after which Serve adds another replica.
        calls = [handle.answer.remote(20) for _ in range(16)]
        found = {call.result(timeout_s=300) for call in calls}
        assert found == nodes_of("H100"), "not every H100 node had a replica"
        deadline = time.monotonic() + 180
        while ray.available_resources()["GPU"] < 24:
            assert time.monotonic() < deadline, "the replicas were not removed"
            time.sleep(1)
