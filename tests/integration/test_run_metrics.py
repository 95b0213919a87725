"""What Ray's metrics say of a run, while it goes and afterwards, against the rows that it wrote."""

import math
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobSubmissionClient

from clusters import cluster, joining
from raykd import metrics, pipeline, records, storage
from raykd.variants import arm_of
from runs import plan_of, started

pytestmark = pytest.mark.timeout(1200)
NUM_PROBLEMS = 40

Tags = dict[str, str]


@dataclass
class Seen:
    """What was read from all nodes: of each series every value, from the first to the last."""

    pages: list[str]
    values: dict[str, dict[frozenset[tuple[str, str]], list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    now: list[tuple[str, Tags]] = field(default_factory=list)
    """The series that were there at the last look."""

    def look(self) -> None:
        self.now = []
        for page in self.pages:
            with urllib.request.urlopen(page, timeout=30) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith(("ray_raykd_", "ray_vllm_")):
                        self.values[sample.name][frozenset(sample.labels.items())].append(sample.value)
                        self.now.append((sample.name, sample.labels))

    def of(self, name: str, **tags: str) -> list[tuple[Tags, list[float]]]:
        """The series with these tags."""
        found = [(dict(series), values) for series, values in self.values.get(name, {}).items()]
        return [(series, values) for series, values in found if tags.items() <= series.items()]

    def total(self, metric: metrics.Metric, **tags: str) -> float:
        """Where a counter stands."""
        return sum(values[-1] for _, values in self.of(metric.exported, **tags))


@dataclass
class Watched:
    """A sweep that has come to its end, and what was seen of it."""

    plan: pipeline.Plan
    seen: Seen
    jobs: list[Any]


def tree() -> dict[str, Any]:
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32}}
    return {
        "name": "counted",
        "problems": {"source": "demo", "num_train": NUM_PROBLEMS, "num_validation": 4, "num_test": 4},
        "teacher": {
            "model": "raykd/demo-teacher",
            "engine": engine,
            "sampling": {"max_tokens": 96},
            "batch_size": 8,
        },
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "num_workers": 2, "dtype": "float32"},
        "evaluate": {"engine": engine, "sampling": {"max_tokens": 16}},
        "attention": None,
        "arms": {"none": {}, "taught": {"prompt.strategy": "ground_truth"}},
        "sweep": {
            "space": {"train.learning_rate": {"grid": [5e-3]}},
            "metric": "loss",
            "validations": 2,
            "scheduler": "none",
        },
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    file = folder / "counted.yaml"
    file.write_text(yaml.safe_dump(tree(), sort_keys=False))
    arguments = ["sweep", str(file), f"storage={folder}"]
    with cluster(3) as nodes:
        context = ray.init(address=nodes.address, log_to_driver=False)
        try:
            seen = Seen(pages())
            # Of this process, and only once.
            metrics.show_trials("kept", {"one": "complete"})
            with started(lambda: True, arguments, folder, joining(nodes)) as driver:
                while driver.poll() is None:
                    seen.look()
                    time.sleep(1)
            assert driver.returncode == 0, (folder / "started.log").read_text()
            # Processes send what they have counted every 10 s, and at their end.
            time.sleep(15)
            seen.look()
            jobs = JobSubmissionClient(f"http://{context.dashboard_url}").list_jobs()
        finally:
            metrics.forget()
            ray.shutdown()
    yield Watched(plan_of(arguments), seen, jobs)


def pages() -> list[str]:
    """Where the nodes offer their metrics, which is known once their agents are up."""
    deadline = time.monotonic() + 120
    while not all(node["MetricsExportPort"] for node in ray.nodes()):
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(1)
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]


def rows_of(run: Watched, arm: str) -> list[dict[str, Any]]:
    (request,) = [asked for lesson, asked in run.plan.asked.items() if arm_of(lesson) == arm]
    assert request
    return storage.read_rows(request.folder, records.COMPLETION).to_pylist()


@pytest.mark.parametrize(("arm", "strategy"), [("none", "none"), ("taught", "ground_truth")])
def test_completions_are_counted_as_they_were_written(watched: Watched, arm: str, strategy: str):
    rows, seen = rows_of(watched, arm), watched.seen
    tags = {"experiment": "counted", "strategy": strategy, "sequence": "teacher"}
    assert len(rows) == NUM_PROBLEMS
    assert seen.total(metrics.COMPLETIONS, **tags, outcome="done") == NUM_PROBLEMS
    assert seen.total(metrics.COMPLETIONS, **tags, outcome="failed") == 0
    assert seen.total(metrics.TOKENS, **tags) == sum(len(row["completion_token_ids"]) for row in rows)
    correct = sum(row["is_correct"] for row in rows)
    assert seen.total(metrics.CORRECT, **tags) == correct
    ((series, shares),) = seen.of(metrics.SHARE.exported, **tags)
    assert shares[-1] == pytest.approx(correct / NUM_PROBLEMS)
    assert series["ray_job"]


def test_a_trials_training_is_seen_from_its_workers(watched: Watched):
    assert len(watched.plan.jobs) == 2
    for job in watched.plan.jobs:
        tags = {"experiment": "counted", "trial": job.trial_id}
        ((_, losses),) = watched.seen.of(metrics.LOSS.exported, **tags)
        curve = storage.read_json_lines(job.folder / "metrics.jsonl")
        assert all(any(math.isclose(loss, point["loss"], rel_tol=1e-6) for point in curve) for loss in losses)
        assert watched.seen.of(metrics.SPEED.exported, **tags)[0][1][-1] > 0
        ranks = {series["rank"] for series, _ in watched.seen.of(metrics.WORKER_SPEED.exported, **tags)}
        assert ranks == {"0", "1"}


def test_trials_are_seen_in_their_states(watched: Watched):
    def reached(state: str) -> float:
        return max(max(each) for _, each in watched.seen.of(metrics.TRIALS.exported, experiment="counted", state=state))

    assert 1 <= reached(metrics.TRAINING) <= 2
    ((_, complete),) = watched.seen.of(metrics.TRIALS.exported, experiment="counted", state="complete")
    assert complete[-1] == 2
    assert reached("failed") == reached("stopped") == 0


def test_a_gauge_stands_though_nothing_sets_it_again(watched: Watched):
    kept = [tags for name, tags in watched.seen.now if name == metrics.TRIALS.exported and tags["experiment"] == "kept"]
    assert sorted(tags["state"] for tags in kept) == sorted(metrics.STATES)
    ((_, complete),) = watched.seen.of(metrics.TRIALS.exported, experiment="kept", state="complete")
    assert set(complete) == {1}


def test_vllm_tells_of_both_engines(watched: Watched):
    tokens = sum(len(row["completion_token_ids"]) for arm in ("none", "taught") for row in rows_of(watched, arm))
    written = watched.seen.of("ray_vllm_generation_tokens_total")
    # A replica of Ray Serve has an id; Ray Data's engine has none.
    served = sum(values[-1] for series, values in written if series["ReplicaId"])
    assert served >= tokens
    assert sum(values[-1] for series, values in written if not series["ReplicaId"]) > 0
    assert watched.seen.of("ray_vllm_num_requests_running")


def test_the_job_is_told_apart_by_its_metadata(watched: Watched):
    told = [job.metadata for job in watched.jobs if (job.metadata or {}).get("experiment")]
    assert told == [{"job_name": "counted sweep", "experiment": "counted", "stage": "sweep"}]


def test_the_dashboard_asks_for_what_the_nodes_offer(watched: Watched):
    board = (Path(__file__).parents[2] / "cluster" / "grafana" / "raykd.json").read_text(encoding="utf-8")
    assert {metric.exported for metric in metrics.METRICS} <= set(watched.seen.values)
    assert all(metric.exported in board for metric in metrics.METRICS)
