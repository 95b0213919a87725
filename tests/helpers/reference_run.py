"""The reference run: one experiment, submitted once as a job to a head with token authentication, read by many tests.

It is the longest fixture of the suite. test_run, test_reference_checks, test_job, test_run_metrics, test_resume and
test_endpoint read its files, its output and its metrics; none of them changes its files. Add an arm here before a test
starts an engine of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from raykd.models.builtin import resolve_model
from raykd.pipeline.plan import Plan
from raykd.runtime import metrics
from runs import FinishedRun, finish, free_port, head_ports, kill_family, plan_of

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
SAMPLE = ROOT / "tests" / "data"
"""Problems in GSM8K's form, two dozen of them for training."""
TOKEN = "a-token-for-this-test-alone-0123456789abcdef"
PLANTED = "hf_planted0aG9yc2ViYXR0ZXJ5c3RhcGxl"

NAME = "reference"
NUM_TRAIN, NUM_TOO_LONG, NUM_TEST = 24, 3, 11
"""Problems of the training split, those of them that exceed the context length, and problems of the test split."""
NUM_ANSWERED = NUM_TRAIN - NUM_TOO_LONG
MAX_TOKENS = 32
CONTEXT = 1024
TOP_K = 6
STEPS = 9
"""Optimizer steps of each student."""
NUM_WORKERS = {"greedy": 2, "soft": 1, "scored": 1}
"""Workers of each student's training."""
ENGINE = {"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 32}
ARMS: dict[str, dict[str, Any]] = {
    "greedy": {
        "teacher.sampling.temperature": 0,
        "teacher.num_samples": 1,
        "train.zero_stage": 3,
        "train.num_workers": NUM_WORKERS["greedy"],
    },
    "soft": {
        "prompt.strategy": "teacher",
        "targets": {"kind": "top_k", "top_k": TOP_K, "filter": "best"},
        "train.packing": True,
    },
    "scored": {
        "prompt.strategy": "ground_truth",
        "targets": {"source": "reference", "kind": "top_k", "top_k": TOP_K},
        "loss": {"divergence": "jensen_shannon", "missing_mass": "renormalize", "temperature": 2.0},
    },
}
STUDENTS = ["base", *ARMS]
# A driver that connects to the head and sets the gauges of a trial once.
SECOND_DRIVER = """
import sys
from pathlib import Path
from raykd.cluster import connection
from raykd.runtime import metrics
with connection.connected(Path(sys.argv[1]), "second", "show"):
    metrics.show_trials("second", {"one": "complete"})
    print("shown", file=sys.__stdout__, flush=True)
    sys.stdin.read()
"""

Tags = dict[str, str]


@dataclass
class Head:
    """A Ray head with token authentication."""

    environment: dict[str, str]
    """Environment variables of its clients."""
    address: str
    metrics_url: str
    invalid_job: subprocess.CompletedProcess[str]
    """The first submission, with an unknown field in the experiment."""


@dataclass
class NodeMetrics:
    """Metrics of a node: all scraped values of each series, in order."""

    url: str
    values: dict[str, dict[frozenset[tuple[str, str]], list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    last_series: list[tuple[str, Tags]] = field(default_factory=list)
    """The series of the last scrape."""

    def scrape(self) -> None:
        self.last_series = []
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        # Most metrics are Ray's own, and parsing all of them takes seconds.
        kept = [line for line in lines if any(name in line for name in ("ray_raykd_", "ray_vllm_"))]
        for family in text_string_to_metric_families("\n".join([*kept, ""])):
            for sample in family.samples:
                self.values[sample.name][frozenset(sample.labels.items())].append(sample.value)
                self.last_series.append((sample.name, sample.labels))

    def series(self, name: str, **tags: str) -> list[tuple[Tags, list[float]]]:
        """Return the series with these tags, and their values."""
        found = [(dict(labels), values) for labels, values in self.values.get(name, {}).items()]
        return [(labels, values) for labels, values in found if tags.items() <= labels.items()]

    def total(self, metric: metrics.Metric, **tags: str) -> float:
        """Return the last value of a counter."""
        return sum(values[-1] for _, values in self.series(metric.exported, **tags))


@dataclass
class Reference:
    """The finished run."""

    plan: Plan
    file: Path
    """The experiment."""
    output: str
    """The job's output, from `ray job submit`."""
    invalid_job: subprocess.CompletedProcess[str]
    """A submission with an unknown field in the experiment."""
    unauthorized_job: subprocess.CompletedProcess[str]
    """A submission with a wrong token."""
    job_list: str
    """The output of `ray job list` after the run."""
    jobs: list[dict[str, Any]]
    """The dashboard's records of the jobs."""
    metrics: NodeMetrics

    @property
    def arguments(self) -> list[str]:
        """The command line of the run."""
        return ["run", str(self.file), f"storage={self.plan.root}"]


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in teacher with sampling defaults in its files, like models on the hub."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    shutil.copytree(resolve_model("raykd/demo-teacher"), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.5, "top_k": 1, "top_p": 0.5}))
    return folder


@pytest.fixture(scope="session")
def experiment_file(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hard and soft targets, scored reference solutions; ZeRO stages 2 and 3, one worker and two."""
    folder = tmp_path_factory.mktemp("experiment")
    engine = {"engine_kwargs": ENGINE}
    tree = {
        "name": NAME,
        "dataset": {
            "source": "jsonl",
            "train_file": str(write_train_file(folder / "train.jsonl")),
            "test_file": str(SAMPLE / "test.jsonl"),
            "num_validation": 3,
        },
        "teacher": {
            "model": str(teacher_folder),
            "engine": engine,
            "sampling": {"max_tokens": MAX_TOKENS, "temperature": 0.7},
            "num_samples": 2,
            "batch_size": 5,
            "concurrency": 2,
            "max_error_rate": 0.15,
        },
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {
            "epochs": 3,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "max_length": 512,
            "dtype": "float32",
            "checkpoint_every_steps": 3,
        },
        "evaluate": {
            "engine": engine,
            "sampling": {"max_tokens": MAX_TOKENS},
            "batch_size": 8,
            "max_error_rate": 0.15,
        },
        "arms": ARMS,
    }
    file = folder / "reference.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def write_train_file(file: Path) -> Path:
    """Write the sample's training problems, some of them with a question that exceeds every context length."""
    lines = (SAMPLE / "train.jsonl").read_text().splitlines()
    for number in range(NUM_TOO_LONG):
        question = f"Ada has {number + 3} figs and buys 2. How many figs has she? " * 80
        answer = f"{number + 3} + 2 = {number + 5} figs.\n#### {number + 5}"
        lines.insert(7 * number + 5, json.dumps({"question": question, "answer": answer}))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def reference(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Run the experiment without interruption."""
    storage, folder = tmp_path_factory.mktemp("storage"), tmp_path_factory.mktemp("job")
    arguments = [str(experiment_file), f"storage={storage}"]
    with token_head(folder) as head, second_driver(head, folder):
        environment, node_metrics, output = head.environment, NodeMetrics(head.metrics_url), folder / "output"
        with output.open("w") as stream:
            run = subprocess.Popen(
                submission("rayjobs/run.py", "run", *arguments), env=environment, cwd=ROOT, stdout=stream, stderr=stream
            )
        try:
            # The teacher's engine loads during this submission.
            (folder / "wrong").write_text("another-token-altogether-0123456789abcdef")
            wrong = {**environment, "RAY_AUTH_TOKEN_PATH": str(folder / "wrong")}
            unauthorized_job = submit(wrong, "rayjobs/run.py", "--version")
            deadline = time.monotonic() + 2100
            while run.poll() is None:
                assert time.monotonic() < deadline, failure_message(output, "takes too long")
                node_metrics.scrape()
                # Each export takes a large part of a core.
                time.sleep(5)
        finally:
            run.kill()
            run.wait()
        assert run.returncode == 0, failure_message(output, f"ended with {run.returncode}")
        # Processes export their metrics every 10 s and at their end.
        time.sleep(12)
        node_metrics.scrape()
        listed = subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, text=True, timeout=120)
        jobs = list_jobs(environment)
    return Reference(
        plan=plan_of(["run", *arguments]),
        file=experiment_file,
        output=output.read_text(),
        invalid_job=head.invalid_job,
        unauthorized_job=unauthorized_job,
        job_list=listed.stdout + listed.stderr,
        jobs=jobs,
        metrics=node_metrics,
    )


def failure_message(output: Path, reason: str) -> str:
    """Return the reason of a failure in one line, and the end of the job's output."""
    lines = output.read_text().splitlines()
    return "\n".join([f"the reference run {reason}: {lines[-1] if lines else ''}", *lines[-60:]])


@pytest.fixture(scope="session")
def repeated_run(reference: Reference) -> FinishedRun:
    """The same command, run again on this machine after the run is complete."""
    return finish(reference.arguments, reference.plan.root)


@contextmanager
def token_head(folder: Path) -> Iterator[Head]:
    """Start a head of four cores; stop it with all its processes afterwards."""
    token, log = folder / "token", folder / "head.log"
    token.write_text(TOKEN)
    port, dashboard, exported = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "HF_TOKEN": PLANTED,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--include-dashboard=true", f"--metrics-export-port={exported}", *head_ports()]
    started = start_head(command, environment, log) or start_head(command, environment, log)
    assert started, log.read_text()
    process, invalid_job = started
    try:
        yield Head(environment, f"127.0.0.1:{port}", f"http://127.0.0.1:{exported}/metrics", invalid_job)
    finally:
        # On SIGTERM the head waits up to 30 s for its processes.
        kill_family(process)


def start_head(
    command: list[str], environment: dict[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], subprocess.CompletedProcess[str]] | None:
    """Start a head, and submit a job with an unknown field until the head accepts it.

    Returns:
        The head's process and the job; None if the head exited. A node exits if its agents take more than 15 s to load,
        which can happen when Ray's files are read for the first time.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                job = submit(environment, "rayjobs/run.py", "train", "configs/quickstart.yaml", "train.epoch=3")
                # The agent that starts jobs is up some seconds after the head.
                if "submitted successfully" in job.stdout + job.stderr:
                    return process, job
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        return None
    except BaseException:
        process.kill()
        raise


@contextmanager
def second_driver(head: Head, folder: Path) -> Iterator[None]:
    """Start a driver that connects to the head and sets the gauges of a trial once."""
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    command = [sys.executable, "-c", SECOND_DRIVER, str(folder / "second_driver.log")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "shown\n"
            yield
            process.communicate(timeout=60)
        finally:
            process.kill()


def submission(*arguments: str) -> list[str]:
    return [RAY, "job", "submit", "--working-dir", ".", "--", "python", *arguments]


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end."""
    return subprocess.run(
        submission(*arguments), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def list_jobs(environment: dict[str, str]) -> list[dict[str, Any]]:
    """Return the dashboard's records of the jobs."""
    url = f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
